"""The frontend as clients meet it, over ASGI and in virtual time; real sockets are in test_http_server."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from penstock.blocks import KvLayout
from penstock.cluster import Load, Member, ModelCard, Standing
from penstock.errors import (
    DeadlineExceeded,
    EngineFailed,
    NoWorker,
    Overloaded,
    PenstockError,
    WorkerLost,
)
from penstock.request import Request, Token
from penstock.serve.chat_template import ChatTemplate
from penstock.serve.frontend import Frontend
from penstock.serve.text import Tokenizer
from penstock.sim.loop import run_virtual
from penstock.tokens import unpack
from tests.serve.fake_backend import (
    CALLER,
    CARD,
    TOKENIZER,
    Client,
    FakeBackend,
    News,
    Script,
    chat,
    chat_body,
    complete,
    decided,
    failing,
    finish,
    frontend,
    get,
    saying,
    scored_as,
    stuck,
    tokens_of,
)
from tests.serve.tokenizers_made import CHAT, byte_level, sentencepiece

Story = Callable[[Frontend, FakeBackend], Awaitable[None]]


def play(story: Story, script: Script | None = None, **options: Any) -> None:
    """Runs `story` in virtual time, and looks whether anything is left behind."""

    async def bounded() -> None:
        backend = FakeBackend() if script is None else FakeBackend(script)
        async with asyncio.timeout(10_000), frontend(backend, **options) as app:
            await story(app, backend)
            assert backend.live == 0
            assert app.metrics.inflight == 0

    run_virtual(bounded())


# Answers


def test_a_chat() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        client = await chat(app, max_tokens=50)
        assert client.status == 200
        assert client.headers["content-type"] == "application/json"
        answer = client.json
        assert answer["choices"][0]["message"]["content"] == "water and power"
        assert answer["choices"][0]["finish_reason"] == "length"
        asked = backend.requests[0]
        prompt = list(unpack(asked.prompt))
        assert byte_level().decode(prompt, skip_special_tokens=False) == "<|user|>water</s><|assistant|>"
        assert asked.sampling.max_tokens == 50
        usage = answer["usage"]
        assert usage["prompt_tokens"] == asked.prompt_tokens
        assert usage["completion_tokens"] == len(tokens_of("water and power"))
        assert usage["prompt_tokens_details"] == {"cached_tokens": 3}

    play(story)


def test_a_chat_stream_has_one_event_for_each_token() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        client = await chat(app, stream=True, stream_options={"include_usage": True})
        assert client.headers["content-type"] == "text/event-stream"
        role, *tokens, last, usage, done = client.events
        assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert len(tokens) == len(tokens_of("water and power"))
        assert "".join(event["choices"][0]["delta"]["content"] for event in tokens) == "water and power"
        assert [event["choices"][0]["finish_reason"] for event in (*tokens, last)] == [None] * len(tokens) + ["length"]
        assert usage["usage"]["completion_tokens"] == len(tokens)
        assert done == "[DONE]"
        assert {event["id"] for event in (role, *tokens, last, usage)} == {"chatcmpl-" + backend.requests[0].id}

    play(story)


def counting() -> Script:
    """Each choice says its number; its tokens' log probabilities are its own."""

    async def script(request: Request) -> AsyncGenerator[News, None]:
        choice = request.sampling.choice
        *first, last = [Token(token.id, -1.0 / (1 + choice)) for token in tokens_of(f"number {choice}")]
        for token in first:
            yield [token], None
        yield [last], finish()

    return script


def test_several_choices_share_a_seed_and_wait_for_the_first_ones_prompt() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        client = await chat(app, n=3, seed=5)
        said = [(each["index"], each["message"]["content"]) for each in client.json["choices"]]
        assert said == [(0, "number 0"), (1, "number 1"), (2, "number 2")]
        first = backend.requests[0].id
        assert [request.id for request in backend.requests] == [first, f"{first}-1", f"{first}-2"]
        assert {request.sampling.seed for request in backend.requests} == {5}
        assert client.json["usage"]["prompt_tokens"] == backend.requests[0].prompt_tokens
        assert client.json["usage"]["completion_tokens"] == sum(len(tokens_of(text)) for _, text in said)
        record = (await get(app, f"/debug/requests/{first}-2")).json
        assert (record["state"], record["id"]) == ("finished", f"chatcmpl-{first}-2")

    play(story, counting())


def test_several_choices_of_several_prompts_stream_side_by_side() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        options = {"include_usage": True}
        client = await complete(app, prompt=["a", "bb"], n=2, stream=True, stream_options=options)
        *events, usage, done = client.events
        assert done == "[DONE]"
        texts, reasons = ["", "", "", ""], []
        for event in events:
            (choice,) = event["choices"]
            texts[choice["index"]] += choice["text"]
            reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
        assert texts == ["number 0", "number 1"] * 2
        assert reasons == ["length"] * 4
        prompts = {request.prompt: request.prompt_tokens for request in backend.requests}
        assert usage["usage"]["prompt_tokens"] == sum(prompts.values())

    play(story, counting())


def test_a_choice_that_fails_ends_them_all() -> None:
    async def script(request: Request) -> AsyncGenerator[News, None]:
        for token in tokens_of("water"):
            yield [token], None
        if request.sampling.choice == 1:
            raise WorkerLost("decode-0 is gone")
        await asyncio.Event().wait()

    async def story(app: Frontend, backend: FakeBackend) -> None:
        client = await chat(app, n=3)
        assert (client.status, client.json["error"]["code"]) == (502, "worker_lost")
        client = await chat(app, n=3, stream=True)
        assert client.events[-1]["error"]["code"] == "worker_lost"

    play(story, script)


def test_the_best_of_several_choices_is_the_likeliest() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        client = await complete(app, n=2, best_of=4)
        assert [(each["index"], each["text"]) for each in client.json["choices"]] == [(0, "number 3"), (1, "number 2")]
        assert client.json["choices"][0]["logprobs"] is None
        assert client.json["usage"]["completion_tokens"] == sum(len(tokens_of(f"number {i}")) for i in range(4))
        records = (await get(app, "/debug/requests")).json["requests"]
        assert [record["state"] for record in records] == ["finished"] * 4

    play(story, counting())


def test_echoed_prompts_come_with_their_log_probabilities() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        (choice,) = (await complete(app, prompt="fire and water", echo=True, logprobs=1)).json["choices"]
        prompt, output = tokens_of("fire and water"), tokens_of("water and power")
        assert choice["text"] == "fire and waterwater and power"
        shown = choice["logprobs"]
        assert len(shown["tokens"]) == len(prompt) + len(output)
        assert shown["token_logprobs"][: len(prompt)] == [None, *(-token.id / 100 for token in prompt[1:])]
        assert shown["top_logprobs"][0] is None
        assert shown["text_offset"][0] == 0
        assert shown["text_offset"][len(prompt)] == len("fire and water")
        whole = (await complete(app, prompt="fire", echo=True, max_tokens=0)).json
        assert whole["choices"][0]["text"] == "fire"
        assert whole["usage"]["completion_tokens"] == 0
        assert backend.requests[-1].sampling.max_tokens == 1
        assert whole["choices"][0]["finish_reason"] == "length"
        (short,) = (await complete(app, prompt=[70], echo=True, logprobs=0, max_tokens=0)).json["choices"]
        assert short["logprobs"]["token_logprobs"] == [None]
        first, *_ = (await complete(app, prompt=[70], echo=True, logprobs=0, stream=True)).events
        assert first["choices"][0]["logprobs"] == short["logprobs"]
        events = (await complete(app, prompt="fire", echo=True, stream=True)).events
        assert "".join(event["choices"][0]["text"] for event in events[:-1]) == "firewater and power"

    play(story)


def test_a_prompt_alone_has_no_output_even_if_the_model_would_end_there() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        whole = (await complete(app, echo=True, max_tokens=0)).json
        assert whole["usage"]["completion_tokens"] == 0
        assert whole["choices"][0]["finish_reason"] == "length"

    play(story, saying("w", finish("stop", stop_token=1)))


def test_others_have_their_turn_while_many_log_probabilities_are_written() -> None:
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def script(request: Request) -> AsyncGenerator[News, None]:
        yield [scored_as(70)] * 1000, finish()

    async def story(app: Frontend, backend: FakeBackend) -> None:
        backend.models["demo"] = ModelCard("demo", 10_000, CARD.supports)
        counting = asyncio.create_task(count_turns())
        for asked in ({"logprobs": 0}, {"prompt_logprobs": 0}):
            turns_before = turns
            assert (await complete(app, prompt=[70] * 1000, **asked)).status == 200
            assert turns - turns_before >= 1000 // 64
        shown = (await chat(app, logprobs=True)).json["choices"][0]["logprobs"]["content"]
        assert [one["logprob"] for one in shown] == [-0.7] * 1000
        (answer,) = (await complete(app, prompt=[70] * 1000, echo=True, logprobs=1)).json["choices"]
        assert answer["logprobs"]["text_offset"] == list(range(2000))
        assert answer["logprobs"]["token_logprobs"] == [None] + [-0.7] * 1999
        counting.cancel()

    play(story, script)


def test_prompt_logprobs_in_vllms_form() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        (choice,) = (await complete(app, prompt="fire and", prompt_logprobs=1)).json["choices"]
        prompt = tokens_of("fire and")
        assert choice["prompt_logprobs"][0] is None
        second = choice["prompt_logprobs"][1]
        name = byte_level().decode([prompt[1].id])
        assert second[str(prompt[1].id)] == {"logprob": -prompt[1].id / 100, "rank": None, "decoded_token": name}
        assert second["0"]["rank"] == 1
        both = (await complete(app, prompt="fire and", prompt_logprobs=1, n=2)).json["choices"]
        assert both[0]["prompt_logprobs"] == both[1]["prompt_logprobs"] == choice["prompt_logprobs"]
        assert [request.sampling.prompt_logprobs for request in backend.requests[-2:]] == [1, None]
        (echoed,) = (await complete(app, prompt="fire and", prompt_logprobs=1, echo=True)).json["choices"]
        assert (echoed["prompt_logprobs"], echoed["logprobs"]) == (choice["prompt_logprobs"], None)
        (echoed,) = (await complete(app, prompt="fire and", prompt_logprobs=1, echo=True, logprobs=0)).json["choices"]
        assert echoed["prompt_logprobs"] == choice["prompt_logprobs"]
        assert echoed["logprobs"]["top_logprobs"][1] == {name: -prompt[1].id / 100}
        chatted = (await chat(app, prompt_logprobs=1)).json
        assert len(chatted["prompt_logprobs"]) == backend.requests[-1].prompt_tokens

    play(story)


def test_token_ids_are_told_where_they_are_asked_for() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        (choice,) = (await complete(app, return_token_ids=True, truncate_prompt_tokens=1)).json["choices"]
        assert choice["token_ids"] == [token.id for token in tokens_of("water and power")]
        assert choice["prompt_token_ids"] == list(unpack(backend.requests[-1].prompt)) == [tokens_of("water")[-1].id]
        first, *events, _, _ = (await complete(app, return_token_ids=True, stream=True)).events
        assert first["choices"][0]["prompt_token_ids"] == list(unpack(backend.requests[-1].prompt))
        assert [event["choices"][0]["token_ids"] for event in events] == [[id] for id in choice["token_ids"]]
        first, *_ = (await chat(app, return_token_ids=True, stream=True)).events
        assert first["prompt_token_ids"] == list(unpack(backend.requests[-1].prompt))
        named = await complete(app, logprobs=0, return_tokens_as_token_ids=True)
        assert named.json["choices"][0]["logprobs"]["tokens"][0] == f"token_id:{choice['token_ids'][0]}"

    play(story)


def test_a_prompt_that_is_to_be_cut_may_be_longer_than_the_model_takes() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        text = " ".join(map(str, range(CARD.max_context_tokens)))
        assert (await complete(app, prompt=text)).status == 400
        client = await complete(app, prompt=text, truncate_prompt_tokens=7)
        assert client.json["usage"]["prompt_tokens"] == 7

    play(story)


def test_stop_strings_may_be_included_and_wait_for_the_least_number_of_tokens() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        (choice,) = (await complete(app, stop=[" and"], include_stop_str_in_output=True)).json["choices"]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("water and", "stop", " and")
        (choice,) = (await complete(app, stop=["w"], min_tokens=len(tokens_of("water and p")))).json["choices"]
        assert choice["text"] == "water and po"

    play(story)


def test_what_samples_reaches_the_worker() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        await complete(app, min_p=0.1, presence_penalty=1, logit_bias={"5": 2}, bad_words=["water"], min_tokens=3)
        asked = backend.requests[-1].sampling
        assert (asked.min_p, asked.presence_penalty, asked.logit_bias, asked.min_tokens) == (0.1, 1.0, ((5, 2.0),), 3)
        spellings = {tuple(byte_level().encode(word).ids) for word in ("water", " water")}
        assert set(asked.bad_words) <= spellings
        assert tuple(byte_level().encode("water").ids) in asked.bad_words

    play(story)


TOOLS = [{"type": "function", "function": {"name": "weather"}}, {"type": "function", "function": {"name": "time"}}]
CALLING = """<think>Where?</think>I look.<tool_call>
{"name": "weather", "arguments": {"city": "Ulm"}}
</tool_call><tool_call>
{"name": "time", "arguments": {}}
</tool_call>"""


def calls_of(events: list[Any]) -> dict[int, Any]:
    """Pieces of calls, put together as clients do."""
    calls: dict[int, Any] = {}
    for event in events:
        for piece in event["choices"][0]["delta"].get("tool_calls", ()):
            call = calls.setdefault(piece["index"], {"arguments": ""})
            call["arguments"] += piece["function"]["arguments"]
            call |= {"id": piece["id"], "name": piece["function"]["name"]} if "id" in piece else {}
    return calls


def test_reasoning_and_calls_are_told_apart_from_content() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        (choice,) = (await chat(app, tools=TOOLS, logprobs=True)).json["choices"]
        message = choice["message"]
        assert (message["content"], message["reasoning_content"]) == ("I look.", "Where?")
        called = [(call["type"], call["function"]) for call in message["tool_calls"]]
        assert [kind for kind, _ in called] == ["function", "function"]
        assert called[0][1] == {"name": "weather", "arguments": '{"city": "Ulm"}'}
        assert choice["finish_reason"] == "tool_calls"
        assert len(choice["logprobs"]["content"]) == len(tokens_of(CALLING))

        *events, done = (await chat(app, tools=TOOLS, logprobs=True, stream=True)).events
        last = events[-1]
        assert done == "[DONE]" and last["choices"][0]["finish_reason"] == "tool_calls"
        deltas = [event["choices"][0]["delta"] for event in events]
        assert "".join(delta.get("content") or "" for delta in deltas) == "I look."
        assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Where?"
        calls = calls_of(events)
        assert [(call["name"], call["arguments"]) for call in calls.values()] == [
            ("weather", '{"city": "Ulm"}'),
            ("time", "{}"),
        ]
        assert calls[0]["id"] != calls[1]["id"]
        told = [one for event in events for one in (event["choices"][0]["logprobs"] or {"content": []})["content"]]
        assert told == choice["logprobs"]["content"]  # the last ones come with the end
        assert all(event["choices"][0]["logprobs"] != {"content": []} for event in (*events, last))

    play(story, saying(CALLING, finish("stop")), tokenizer=CALLER)


def test_a_message_that_is_continued_keeps_the_space_before_its_next_word() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        messages = [{"role": "assistant", "content": "fire and"}]
        continued = await chat(app, messages=messages, continue_final_message=True)
        assert continued.json["choices"][0]["message"]["content"] == " water"
        assert (await chat(app)).json["choices"][0]["message"]["content"] == "water"

    async def script(request: Request) -> AsyncGenerator[News, None]:
        yield [Token(token) for token in sentencepiece().encode("water").ids], finish()

    play(story, script, tokenizer=Tokenizer(sentencepiece(), ChatTemplate(CHAT, {}), "demo"))


@pytest.mark.parametrize("tokenizer", [TOKENIZER, CALLER], ids=["plain", "parsed"])
def test_a_stream_keeps_nothing_of_what_it_told(tokenizer: Tokenizer) -> None:
    references: list[int] = []

    async def script(request: Request) -> AsyncGenerator[News, None]:
        first = scored_as(tokens_of("</think>")[0].id)
        yield [first, *tokens_of("/think>a b")], None
        yield tokens_of("c"), None
        references.append(sys.getrefcount(first))
        yield tokens_of("d"), finish()

    async def story(app: Frontend, backend: FakeBackend) -> None:
        await chat(app, logprobs=True)
        await chat(app, logprobs=True, stream=True)
        whole, streamed = references
        assert streamed < whole

    play(story, script, tokenizer=tokenizer)


def test_the_ids_of_all_tokens_are_told_of_a_parsed_stream() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        client = await chat(app, tools=TOOLS, return_token_ids=True, stream=True)
        told = [id for event in client.events[:-1] for id in event["choices"][0].get("token_ids", [])]
        assert told == [token.id for token in tokens_of(CALLING)]

    play(story, saying(CALLING, finish("stop")), tokenizer=CALLER)


def test_what_a_guide_describes_is_neither_reasoning_nor_a_call() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        backend.models["demo"] = ModelCard("demo", 200, (*CARD.supports, "guide"))
        asked = {"response_format": {"type": "json_object"}, "tools": TOOLS}
        (choice,) = (await chat(app, **asked)).json["choices"]
        assert choice["message"] == {"role": "assistant", "refusal": None, "content": '{"a": 1}'}
        *events, _ = (await chat(app, **asked, stream=True)).events
        assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == '{"a": 1}'

    play(story, saying('{"a": 1}', finish("stop")), tokenizer=CALLER)


def test_calls_are_content_where_none_may_be_made_and_end_the_answer_where_one_may() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        (choice,) = (await chat(app, include_reasoning=False)).json["choices"]
        assert choice["message"]["content"].startswith("I look.<tool_call>")
        assert "reasoning_content" not in choice["message"]
        assert choice["finish_reason"] == "stop"
        client = await chat(app, tools=TOOLS, parallel_tool_calls=False)
        assert [call["function"]["name"] for call in client.json["choices"][0]["message"]["tool_calls"]] == ["weather"]
        assert client.json["usage"]["completion_tokens"] < len(tokens_of(CALLING))
        client = await chat(app, tools=TOOLS, parallel_tool_calls=False, stream=True)
        assert len(calls_of(client.events[:-1])) == 1

    play(story, saying(CALLING, finish("stop")), tokenizer=CALLER)


def test_plain_completions_are_not_parsed() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        assert (await complete(app)).json["choices"][0]["text"] == CALLING

    play(story, saying(CALLING), tokenizer=CALLER)


def test_completions_whole_and_streamed() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        whole = await complete(app)
        assert whole.json["choices"][0]["text"] == "water and power"
        streamed = await complete(app, stream=True)
        *events, done = streamed.events
        assert "".join(event["choices"][0]["text"] for event in events) == "water and power"
        assert done == "[DONE]"
        assert [request.sampling.max_tokens for request in backend.requests] == [16, 16]
        assert list(unpack(backend.requests[0].prompt)) == byte_level().encode("water").ids

    play(story)


def test_several_tokens_in_one_read_are_several_events() -> None:
    async def script(request: Request) -> AsyncGenerator[News, None]:
        yield tokens_of("water and"), None
        yield [], finish()

    async def story(app: Frontend, backend: FakeBackend) -> None:
        client = await complete(app, stream=True)
        assert len(client.events) == len(tokens_of("water and")) + 2

    play(story, script)


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_stop_string_stops_the_workers(is_stream: bool) -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        client = await complete(app, stop=[" power"], stream=is_stream)  # the script never ends by itself
        choices = [event["choices"][0] for event in client.events[:-1]] if is_stream else client.json["choices"]
        assert "".join(choice["text"] for choice in choices) == "water and"
        assert choices[-1]["finish_reason"] == "stop"

    play(story, stuck(after="water and power and more"))


def test_usage_counts_up_to_the_stop_string() -> None:
    async def script(request: Request) -> AsyncGenerator[News, None]:
        yield tokens_of("water and power"), finish()

    async def story(app: Frontend, backend: FakeBackend) -> None:
        answer = (await complete(app, stop="water")).json
        assert answer["choices"][0]["text"] == ""
        assert answer["usage"]["completion_tokens"] == len(tokens_of("water"))

    play(story, script)


@pytest.mark.parametrize("is_stream", [False, True])
def test_the_token_that_ends_an_answer_counts_and_is_not_shown(is_stream: bool) -> None:
    last = tokens_of("power")[-1].id

    async def story(app: Frontend, backend: FakeBackend) -> None:
        options = {"stream": True, "stream_options": {"include_usage": True}} if is_stream else {}
        client = await complete(app, stop_token_ids=[last], logprobs=1, **options)
        events = client.events if is_stream else [client.json]
        choices = [event["choices"][0] for event in events if event != "[DONE]" and event["choices"]]
        text = "".join(choice["text"] for choice in choices)
        shown = [token for choice in choices if choice["logprobs"] for token in choice["logprobs"]["tokens"]]
        assert text == byte_level().decode([token.id for token in tokens_of("power")][:-1])
        assert "".join(shown) == text
        assert choices[-1]["finish_reason"] == "stop"
        usage = events[-2]["usage"] if is_stream else events[0]["usage"]
        assert usage["completion_tokens"] == len(tokens_of("power"))

    play(story, saying("power", finish("stop", last)))


@pytest.mark.parametrize("is_stream", [False, True])
def test_logprobs(is_stream: bool) -> None:
    async def script(request: Request) -> AsyncGenerator[News, None]:
        assert request.sampling.logprobs == 1
        first, second = tokens_of("ab")
        yield [Token(first.id, -0.5, ((second.id, -0.25),)), Token(second.id, -1.0, ())], finish()

    async def story(app: Frontend, backend: FakeBackend) -> None:
        client = await chat(app, logprobs=True, top_logprobs=1, stream=is_stream)
        choices = [event["choices"][0] for event in client.events[:-1]] if is_stream else client.json["choices"]
        shown = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
        assert shown == [
            {
                "token": "a",
                "logprob": -0.5,
                "bytes": [97],
                "top_logprobs": [{"token": "b", "logprob": -0.25, "bytes": [98]}],
            },
            {"token": "b", "logprob": -1.0, "bytes": [98], "top_logprobs": []},
        ]

    play(story, script)


def test_seeds_are_drawn_or_the_clients() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        for fields in ({}, {}, {"seed": 5}):
            await complete(app, **fields)
        first, second, third = (request.sampling.seed for request in backend.requests)
        assert first != second
        assert third == 5

    play(story)


# Refusals


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2", 404),
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/v1/models", 405),
        ("GET", "/v1/models/x", 404),
    ],
)
def test_wrong_paths_and_methods(method: str, path: str, status: int) -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        client = await Client(app).ask(method, path)
        assert client.status == status
        assert set(client.json["error"]) == {"message", "type", "param", "code"}
        assert (status == 405) == ("allow" in client.headers)

    play(story)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"model": "other"}, "model", "model_not_found"),
        ({"min_tokens": 21, "max_tokens": 20}, "min_tokens", None),
        ({"logit_bias": {"10000": 1}}, "logit_bias", None),
        ({"bad_words": ["water " * 100]}, "bad_words[0]", None),
        ({"use_beam_search": True}, "use_beam_search", "unsupported_parameter"),
        ({"max_tokens": 200}, "max_tokens", "context_length_exceeded"),
        ({"prompt": "water " * 500}, "prompt", "context_length_exceeded"),
        ({"prompt": list(range(200))}, "prompt", "context_length_exceeded"),
        ({"prompt": "water " * 100_000}, "prompt", "context_length_exceeded"),
        ({"prompt": ""}, "prompt", None),
        ({"prompt": [10_000]}, "prompt", None),
        ({"stop_token_ids": [10_000]}, "stop_token_ids", None),
    ],
)
def test_what_the_model_cannot_take_reaches_no_worker(
    fields: dict[str, object], param: str | None, code: str | None
) -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        client = await complete(app, **fields)
        assert client.status == (404 if code == "model_not_found" else 400)
        error = client.json["error"]
        assert (error["param"], error["code"]) == (param, code)
        assert code != "context_length_exceeded" or any(limit in error["message"] for limit in ("199", "200"))
        assert not backend.requests

    play(story)


def test_a_feature_that_the_engine_lacks_is_refused_by_name() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        backend.models = {"demo": ModelCard("demo", 200)}
        for name, value in (("temperature", 0.5), ("top_p", 0.5), ("top_k", 4), ("logprobs", 1), ("best_of", 2)):
            client = await complete(app, **{name: value})
            assert (client.status, client.json["error"]["param"]) == (400, name)
        assert (await complete(app, temperature=0)).status == 200

    play(story)


@pytest.mark.parametrize("wish", [{"prompt_logprobs": 20}, {"echo": True, "logprobs": 20}, {"return_token_ids": True}])
def test_a_long_prompt_is_not_told_by_many_choices(wish: dict[str, object]) -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        backend.models["demo"] = ModelCard("demo", 20_000, CARD.supports)
        client = await complete(app, prompt=[70] * 17_000, n=128, **wish)
        assert (client.status, client.json["error"]["param"]) == (400, "n")
        assert (await complete(app, prompt=[70] * 17_000, n=2, **wish)).status == 200

    play(story)


def test_a_model_without_a_template_has_no_chat() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        app = Frontend(backend, {"demo": Tokenizer(byte_level(), None, "demo")}, app._rng)
        client = await chat(app)
        assert client.status == 400
        assert "no chat template" in client.json["error"]["message"]

    play(story)


def test_bodies_over_the_limit_are_not_read() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        declared = await Client(app).ask("POST", "/v1/completions", headers={"content-length": "101"}, chunks=[])
        assert declared.status == 413
        assert "100 bytes" in declared.json["error"]["message"]
        chunks = [b" " * 60] * 1000
        assert (await Client(app).ask("POST", "/v1/completions", chunks=chunks)).status == 413
        absurd = await Client(app).ask("POST", "/v1/completions", headers={"content-length": "9" * 5000}, chunks=[])
        assert absurd.status == 413

    play(story, body_bytes=100)


@pytest.mark.parametrize("chunks", [[b""], [b"{"], [b"[]"], [b"\xff"], [b'{"model":', b"1}"]])
def test_bodies_that_are_no_request(chunks: list[bytes]) -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        client = await Client(app).ask("POST", "/v1/completions", chunks=chunks)
        assert client.status == 400
        assert client.json["error"]["type"] == "invalid_request_error"

    play(story)


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": {"name": "time"}}])
@pytest.mark.parametrize("depth", [50, 120, 200, 600, 900, 5000])
def test_no_depth_is_a_fault_of_ours(depth: int, choice: object) -> None:
    deep = '{"a":' * depth + "1" + "}" * depth
    call = {"id": "1", "type": "function", "function": {"name": "time", "arguments": deep}}
    messages = [{"role": "assistant", "tool_calls": [call]}]
    parameters = {"properties": {"DEEP": 1}}
    tools = [{"type": "function", "function": {"name": "time", "parameters": parameters}}]

    async def story(app: Frontend, backend: FakeBackend) -> None:
        backend.models["demo"] = ModelCard("demo", 200, (*CARD.supports, "guide"))
        assert (await chat(app, messages=messages)).status == 200
        for asked in (
            chat_body(tools=tools, tool_choice=choice),
            chat_body(response_format={"type": "json_schema", "json_schema": {"schema": parameters}}),
            chat_body(metadata=parameters),
            chat_body(chat_template_kwargs=parameters),
        ):
            body = json.dumps(asked).replace('{"DEEP": 1}', deep).encode()
            client = await Client(app).ask("POST", "/v1/chat/completions", chunks=[body])
            assert client.status in (200, 400), client.body

    play(story)


def test_bodies_must_say_that_they_are_json() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        for kind, status in (("text/plain", 400), ("application/json; charset=utf-8", 200)):
            for path, body in (("/v1/chat/completions", chat_body()), ("/tokenize", {"prompt": "water"})):
                client = await Client(app).ask("POST", path, body, {"content-type": kind})
                assert client.status == status

    play(story)


def test_the_key() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
            client = await get(app, "/v1/models", **headers)
            assert client.status == 401
            assert client.headers["www-authenticate"] == "Bearer"
            assert client.json["error"]["code"] == "invalid_api_key"
        assert (await get(app, "/v1/models", authorization="Bearer secret")).status == 200
        assert (await chat(app)).status == 401
        assert (await get(app, "/metrics")).status == 401
        for path in ("/health", "/live", "/ready"):
            assert (await get(app, path)).status == 200
        assert "secret" not in repr(app._options)

    play(story, api_key="secret")


def test_a_full_house_says_when_to_come_back() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        async with asyncio.TaskGroup() as group:
            first = Client(app)
            group.create_task(first.ask("POST", "/v1/completions", {"model": "demo", "prompt": "water"}))
            await backend.entered.wait()
            second = await complete(app)
            assert (second.status, second.headers["retry-after"]) == (503, "1")
            assert second.json["error"]["code"] == "overloaded"
            first.leave()
        backend.script = saying("water")
        assert (await complete(app)).status == 200

    play(story, stuck(), inflight=1)


# Failures


ERRORS: list[tuple[Exception, int, str | None]] = [
    (Overloaded("full", 2.5), 503, "overloaded"),
    (NoWorker("nobody"), 503, "no_worker"),
    (WorkerLost("gone"), 502, "worker_lost"),
    (EngineFailed("broken"), 500, "engine_failed"),
    (DeadlineExceeded("late"), 504, "deadline_exceeded"),
    (PenstockError("odd"), 500, None),
    (ZeroDivisionError("secret"), 500, None),
]


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(("error", "status", "code"), ERRORS)
def test_failures_before_the_first_token_have_a_status(
    error: Exception, status: int, code: str | None, is_stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        client = await chat(app, stream=is_stream)
        assert client.status == status
        assert client.json["error"]["code"] == code
        assert ("retry-after" in client.headers) == (status == 503)
        if isinstance(error, ZeroDivisionError):
            assert "secret" not in client.json["error"]["message"]
            assert "secret" in caplog.text

    play(story, failing(error))


@pytest.mark.parametrize(("error", "status", "code"), ERRORS)
def test_failures_in_mid_stream_end_it_with_an_error(error: Exception, status: int, code: str | None) -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        streamed = await complete(app, stream=True)
        assert streamed.status == 200
        *tokens, last = streamed.events
        assert len(tokens) == len(tokens_of("water and"))
        assert last["error"]["code"] == code
        whole = await complete(app)
        assert (whole.status, whole.json["error"]["code"]) == (status, code)

    play(story, failing(error, after="water and"))


def test_a_request_that_a_worker_gives_up_is_an_error() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        client = await complete(app, stream=True)
        assert (client.status, client.json["error"]["code"]) == (500, "engine_failed")

    play(story, saying("a", finish("abort")))


@pytest.mark.parametrize("after", ["", "water"])
def test_the_deadline(after: str) -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        assert (await complete(app)).status == 504
        client = await complete(app, stream=True)
        error = client.events[-1]["error"] if after else client.json["error"]
        assert error["code"] == "deadline_exceeded"
        assert asyncio.get_running_loop().time() == 40.0
        assert backend.requests[0].timeout_s == 20.0

    play(story, stuck(after), timeout_s=20.0)


# Clients that leave


async def leave_at(app: Frontend, backend: FakeBackend, is_stream: bool, moment: str) -> None:
    client = Client(app)
    body = {"model": "demo", "prompt": "water", "stream": is_stream}
    async with asyncio.TaskGroup() as group:
        group.create_task(client.ask("POST", "/v1/completions", body))
        await backend.entered.wait()
        if moment == "in mid-stream":
            await client.got_part.wait()
        client.leave()
        await backend.left.wait()
    assert not client.is_over
    assert client.is_aborted


@pytest.mark.parametrize(
    ("is_stream", "moment", "after"),
    [
        (False, "before the first token", ""),
        (False, "after some tokens", "water and"),
        (True, "before the first token", ""),
        (True, "in mid-stream", "water and"),
    ],
)
def test_a_client_that_leaves_stops_the_workers(is_stream: bool, moment: str, after: str) -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        await leave_at(app, backend, is_stream, moment)
        record = (await get(app, "/debug/requests/" + backend.requests[0].id)).json
        assert (record["state"], record["error"]) == ("cancelled", "the client left")

    play(story, stuck(after))


def test_a_client_that_leaves_before_its_body_is_whole() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        client = Client(app)
        client.leave()
        await client.ask("POST", "/v1/completions", chunks=[])
        assert client.status == 0
        assert not backend.requests

    play(story)


def test_a_client_that_sends_no_body_is_not_waited_for() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        assert (await Client(app).ask("POST", "/v1/completions", chunks=[])).status == 408

    play(story)


@pytest.mark.parametrize("is_done", [False, True])
def test_a_client_that_does_not_read_is_cut(is_done: bool) -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        client = Client(app)
        client.may_read.clear()
        await client.ask("POST", "/v1/completions", {"model": "demo", "prompt": "water", "stream": True})
        assert client.is_aborted
        assert 30 <= asyncio.get_running_loop().time() <= 40
        record = (await get(app, "/debug/requests/" + backend.requests[0].id)).json
        assert "read nothing for 30 s" in record["error"]

    play(story, saying("water") if is_done else stuck("water and power"), slow_client_s=30.0)


def test_a_client_that_does_not_read_gets_no_error_either() -> None:
    async def script(request: Request) -> AsyncGenerator[News, None]:
        yield tokens_of("water"), None
        await asyncio.sleep(10)
        raise EngineFailed("broken")

    async def story(app: Frontend, backend: FakeBackend) -> None:
        client = Client(app)
        body = {"model": "demo", "prompt": "water", "stream": True}
        async with asyncio.TaskGroup() as group:
            group.create_task(client.ask("POST", "/v1/completions", body))
            await asyncio.sleep(5)
            client.may_read.clear()
        assert client.is_aborted
        assert asyncio.get_running_loop().time() == 11

    play(story, script)


def test_a_client_that_waits_long_is_left_in_peace() -> None:
    async def script(request: Request) -> AsyncGenerator[News, None]:
        await asyncio.sleep(200)
        yield tokens_of("water"), None
        await asyncio.sleep(200)
        yield [], finish()

    async def story(app: Frontend, backend: FakeBackend) -> None:
        assert (await complete(app, stream=True)).events[-1] == "[DONE]"

    play(story, script, slow_client_s=5.0)


# Shutting down


def test_draining_lets_requests_end_and_takes_no_new_ones() -> None:
    async def script(request: Request) -> AsyncGenerator[News, None]:
        await asyncio.sleep(10)
        yield tokens_of("water"), finish()

    async def story(app: Frontend, backend: FakeBackend) -> None:
        client = Client(app)
        async with asyncio.TaskGroup() as group:
            group.create_task(client.ask("POST", "/v1/completions", {"model": "demo", "prompt": "water"}))
            await backend.entered.wait()
            group.create_task(app.drain(30))
            await asyncio.sleep(1)
            refused = await complete(app)
            assert (refused.status, refused.json["error"]["code"]) == (503, "worker_draining")
            assert (await get(app, "/ready")).status == 503
            assert (await get(app, "/live")).status == 200
        assert client.status == 200
        assert asyncio.get_running_loop().time() == 10

    play(story, script)


def test_draining_ends_what_does_not_end_by_an_error() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        client = Client(app)
        body = {"model": "demo", "prompt": "water", "stream": True}
        async with asyncio.TaskGroup() as group:
            group.create_task(client.ask("POST", "/v1/completions", body))
            await client.got_part.wait()
            await app.drain(30)
        assert client.events[-1]["error"]["code"] == "worker_draining"
        assert asyncio.get_running_loop().time() == 30

    play(story, stuck("water"))


def test_other_servers_may_run_it() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        said: list[str] = []
        orders = iter(["lifespan.startup", "lifespan.shutdown"])

        async def receive() -> dict[str, str]:
            return {"type": next(orders)}

        async def send(message: Any) -> None:
            said.append(message["type"])

        fresh = frontend(backend)
        await fresh({"type": "lifespan"}, receive, send)
        assert said == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
        with pytest.raises(NotImplementedError, match="websocket"):
            await fresh({"type": "websocket"}, receive, send)

    play(story)


# What people and Prometheus see


def test_models() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        backend.models["untold"] = ModelCard("untold", 10)  # no tokenizer here
        listed = (await get(app, "/v1/models")).json
        assert [model["id"] for model in listed["data"]] == ["demo"]
        assert (await get(app, "/v1/models/demo")).json == listed["data"][0]
        assert listed["data"][0]["max_model_len"] == CARD.max_context_tokens

    play(story)


def test_health() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        assert (await get(app, "/health")).json["status"] == "ready"
        assert b"POST /v1/completions" in (await get(app, "/")).body
        assert (await Client(app).ask("HEAD", "/live")).status == 200
        backend.models = {}
        for path, status in (("/health", 503), ("/ready", 503), ("/live", 200)):
            assert (await get(app, path)).status == status
        client = await complete(app)
        assert (client.status, client.json["error"]["code"]) == (503, "no_worker")

    play(story)


def test_a_request_can_be_looked_up_by_either_name() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        headers = {"x-request-id": "mine-1", "x-penstock-timeline": "1"}
        client = await Client(app).ask("POST", "/v1/chat/completions", chat_body(), headers)
        assert client.headers["x-request-id"] == "mine-1"
        assert client.json["penstock"]["timeline"]["decode_worker"] == "decode-0"
        record = (await get(app, "/debug/requests/mine-1")).json
        assert record == (await get(app, "/debug/requests/" + client.json["id"])).json
        assert (record["state"], record["finish_reason"], record["model"]) == ("finished", "length", "demo")
        assert record["timeline"]["prefill_started_s"] == 0.1
        assert (await get(app, "/debug/requests/unknown")).status == 404

    play(story)


def test_the_last_requests_are_listed_newest_first_and_without_what_they_said() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        assert (await get(app, "/debug/requests")).json == {"requests": []}
        first = await complete(app, prompt="quicksilver")
        await Client(app).ask("POST", "/v1/chat/completions", chat_body(), {"x-request-id": "mine-1"})
        page = await get(app, "/debug/requests")
        newest, oldest = page.json["requests"]
        assert newest["id"].startswith("chatcmpl-") and oldest["id"] == first.json["id"]
        assert (oldest["state"], oldest["decode_worker"]) == ("finished", "decode-0")
        record = await get(app, "/debug/requests/" + oldest["id"])
        assert b"quicksilver" not in page.body + record.body and b"water and power" not in page.body + record.body
        for _ in range(150):
            await complete(app)
        assert len((await get(app, "/debug/requests")).json["requests"]) == 100

    play(story)


def test_a_record_says_how_the_request_was_routed_and_how_that_turned_out() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        client = await complete(app)
        name = backend.requests[0].id
        backend.decided[name] = decided()
        record = (await get(app, "/debug/requests/" + client.json["id"])).json
        lost, kept = record["decisions"]
        assert (lost["decode"], kept["decode"], kept["passed_over"]) == ("decode-1", "decode-0", ["decode-1"])
        assert kept["parts"] == {"wait": 0.05, "later": 0.01} and kept["runners_up"][0]["cost"] == 0.2
        compared = {one["part"]: (one["predicted_s"], one["actual_s"]) for one in record["compared"]}
        assert list(compared) == ["wait", "prefill", "transfer", "later"]
        assert compared["wait"] == (0.05, None) and compared["prefill"] == (None, pytest.approx(0.2))

    play(story)


def test_why_is_told_to_those_with_the_key_alone() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        for path in ("/debug/requests", "/debug/requests/x"):
            assert (await get(app, path)).status == 401
        assert (await get(app, "/debug/requests", authorization="Bearer secret")).status == 200

    play(story, api_key="secret")


@pytest.mark.parametrize("name", ["", "a b", "x" * 129, "\r\nset-cookie: a"])
def test_odd_request_ids_are_replaced(name: str) -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        client = await get(app, "/live", x_request_id=name)
        assert client.headers["x-request-id"].isalnum()

    play(story)


def test_a_streams_last_choice_may_carry_the_timeline() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        *_, last, _ = (await chat(app, stream=True, penstock={"timeline": True})).events
        assert last["penstock"]["timeline"]["decode_worker"] == "decode-0"
        *_, last, _ = (await chat(app, stream=True)).events
        assert "penstock" not in last

    play(story)


def test_old_records_are_forgotten() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        for _ in range(30):
            await complete(app)
        assert len(app._records) <= 10
        assert (await get(app, "/debug/requests/" + backend.requests[-5].id)).status == 200
        assert (await get(app, "/debug/requests/" + backend.requests[0].id)).status == 404

    play(story, records=5)


def samples(page: bytes) -> dict[tuple[str, frozenset[str]], float]:
    families = text_string_to_metric_families(page.decode())
    return {
        (sample.name.removeprefix("penstock_"), frozenset(sample.labels.values())): sample.value
        for family in families
        for sample in family.samples
    }


def test_metrics() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        layout = KvLayout(1, 1, 8, 16, "float32")
        member = Member("decode-0", 1, "decode", "demo", (), layout, blocks=100, max_context_tokens=200)
        load = Load(blocks=100, free_blocks=75, running=2, handoffs=3, in_place_bytes=4096, cached_tokens=5)
        backend.workers = {"decode-0": Standing(member, load)}
        backend.still = ["decode-0"]
        assert (await get(app, "/health")).json["stalled"] == ["decode-0"]
        await complete(app)
        await complete(app, model="other")
        page = await get(app, "/metrics")
        assert page.headers["content-type"].startswith("text/plain")
        found = samples(page.body)
        tokens = len(tokens_of("water and power"))
        worker = ("decode-0", "decode", "demo")
        expected = {
            ("generation_tokens_total", "demo"): tokens,
            ("prompt_tokens_total", "demo"): backend.requests[0].prompt_tokens,
            ("time_to_first_token_seconds_count", "demo"): 1,
            ("inter_token_latency_seconds_count", "demo"): tokens - 1,
            ("inter_token_latency_seconds_bucket", "demo", "+Inf"): tokens - 1,
            ("request_queue_time_seconds_sum", "demo"): 0.1,
            ("request_success_total", "demo", "length"): 1,
            ("request_errors_total", "model_not_found"): 1,
            ("num_requests_running", *worker): 2,
            ("kv_cache_usage_perc", *worker): 0.25,
            ("handoffs_total", *worker): 3,
            ("kv_bytes_total", *worker, "in-place"): 4096,
            ("kv_bytes_total", *worker, "copied"): 0,
            ("prefix_cache_hits_total", *worker): 5,
            ("event_loop_delay_seconds", "frontend", "0.99"): 0,
        }
        assert {key: found[key[0], frozenset(key[1:])] for key in expected} == expected

    play(story)


# Anything at all

scalars = st.none() | st.booleans() | st.integers(-5, 300) | st.floats() | st.text(max_size=5)
values = scalars | st.lists(scalars, max_size=3) | st.dictionaries(st.text(max_size=3), scalars, max_size=2)
FIELDS = ["model", "prompt", "messages", "max_tokens", "temperature", "stop", "stream", "logprobs", "seed", "n", "x"]


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), values, max_size=4), st.booleans())
def test_any_body_gets_an_answer(fields: dict[str, object], is_chat: bool) -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        client = await (chat if is_chat else complete)(app, **fields)
        assert client.is_over
        assert client.status in (200, 400, 404)
        if client.status != 200:
            assert json.loads(client.body)["error"]["message"]

    play(story)
