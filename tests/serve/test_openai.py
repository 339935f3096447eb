"""OpenAI's bodies: what is understood, what is refused and how, and what answers look like on the wire."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import BadRequest, DeadlineExceeded, PromptTooLong, RequestError, Unsupported
from penstock.request import Timeline, Token
from penstock.serve.openai import (
    CHAT,
    COMPLETIONS,
    DONE,
    Ask,
    Dialect,
    Heading,
    Shown,
    Usage,
    error_body,
    error_event,
    output_budget,
    parse_chat,
    parse_completion,
)

HEADING = Heading("chatcmpl-1", 1_700_000_000, "demo")
USAGE = Usage(prompt_tokens=5, output_tokens=2, cached_tokens=4)


def chat(**fields: object) -> Ask:
    body = {"model": "demo", "messages": [{"role": "user", "content": "hi"}]} | fields
    return parse_chat(json.dumps(body).encode())


def completion(**fields: object) -> Ask:
    return parse_completion(json.dumps({"model": "demo", "prompt": "hi"} | fields).encode())


def test_a_short_chat_gets_openais_defaults() -> None:
    assert chat() == Ask(model="demo", messages=[{"role": "user", "content": "hi"}])


def test_every_supported_field_arrives() -> None:
    ask = chat(
        max_completion_tokens=7,
        temperature=0,
        top_p=0.5,
        top_k=3,
        seed=-1,
        stop=["a", "b"],
        stop_token_ids=[4],
        ignore_eos=True,
        logprobs=True,
        top_logprobs=2,
        stream=True,
        stream_options={"include_usage": True},
        user="me",
        penstock={"timeline": True},
    )
    assert ask == Ask(
        model="demo",
        messages=[{"role": "user", "content": "hi"}],
        max_tokens=7,
        temperature=0.0,
        top_p=0.5,
        top_k=3,
        seed=(1 << 63) - 1,
        stop=("a", "b"),
        stop_token_ids=(4,),
        ignore_eos=True,
        logprobs=2,
        is_stream=True,
        wants_usage=True,
        wants_timeline=True,
        needs=(("sampling", "top_p"), ("sampling", "top_k"), ("logprobs", "logprobs")),
    )


def test_null_means_not_given() -> None:
    names = ["max_tokens", "temperature", "top_p", "seed", "stop", "logprobs", "stream", "stream_options", "tools"]
    assert chat(**dict.fromkeys(names)) == chat()


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 1},
        {"frequency_penalty": 0, "presence_penalty": 0.0},
        {"logit_bias": {}, "tools": [], "tool_choice": "none"},
        {"response_format": {"type": "text"}},
        {"parallel_tool_calls": True, "service_tier": "auto", "store": False, "metadata": {}},
    ],
)
def test_fields_that_ask_for_nothing_are_accepted(fields: dict[str, object]) -> None:
    assert chat(**fields) == chat()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 2),
        ("n", True),
        ("best_of", 3),
        ("echo", True),
        ("suffix", "x"),
        ("frequency_penalty", 0.1),
        ("logit_bias", {"5": 1}),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("functions", [{}]),
        ("response_format", {"type": "json_object"}),
        ("reasoning_effort", "high"),
        ("modalities", ["text", "audio"]),
        ("metadata", {"a": "b"}),
        ("store", True),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(Unsupported, match=f"^{name} = .* is not supported") as caught:
        chat(**{name: value})
    assert caught.value.param == name


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temprature": 1}, "temprature"),
        ({"model": None}, "model"),
        ({"model": 3}, "model"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens"),
        ({"seed": 1 << 63}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", 1]}, "stop[1]"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": "a" * 513}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"logprobs": 1}, "logprobs"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"x": True}}, "stream_options.x"),
        ({"penstock": {"timelin": True}}, "penstock.timelin"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "hi", "tone": "warm"}]}, "messages[0].tone"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{"text": "hi"}]}]}, "messages[0].content[0].type"),
    ],
)
def test_mistakes_are_named(fields: dict[str, object], param: str | None) -> None:
    with pytest.raises(BadRequest) as caught:
        chat(**fields)
    assert caught.value.param == param
    assert param is None or param in str(caught.value)


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "tool", "content": "4"}, "messages[0].role"),
        ({"role": "assistant", "content": "", "tool_calls": [{}]}, "messages[0].tool_calls"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "messages[0].content[0].type"),
    ],
)
def test_messages_that_need_more_than_text_are_refused(message: dict[str, object], param: str) -> None:
    with pytest.raises(Unsupported) as caught:
        chat(messages=[message])
    assert caught.value.param == param


def test_messages_become_what_templates_know() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    answered = {"role": "assistant", "content": "ok", "refusal": None, "tool_calls": None, "annotations": []}
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": parts, "name": "Ann"},
        answered,
    ]
    assert chat(messages=messages).messages == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one\ntwo", "name": "Ann"},
        {"role": "assistant", "content": "ok"},
    ]


@pytest.mark.parametrize(
    ("prompt", "text", "tokens"),
    [("hi", "hi", None), (["hi"], "hi", None), ([1, 2], None, [1, 2]), ([[1, 2]], None, [1, 2])],
)
def test_prompts(prompt: object, text: str | None, tokens: list[int] | None) -> None:
    ask = completion(prompt=prompt, logprobs=0)
    assert (ask.text, ask.tokens, ask.logprobs) == (text, tokens, 0)


@pytest.mark.parametrize("prompt", ["", [], None, 1, [True], [1, "a"], [-1], [1.5], [[1, -1]], [[[1]]]])
def test_prompts_that_are_none(prompt: object) -> None:
    with pytest.raises(BadRequest) as caught:
        completion(prompt=prompt)
    assert caught.value.param is not None
    assert caught.value.param.startswith("prompt")


@pytest.mark.parametrize("prompt", [["a", "b"], [[1], [2]]])
def test_several_prompts_are_refused(prompt: object) -> None:
    with pytest.raises(Unsupported) as caught:
        completion(prompt=prompt)
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff",
        b'{"model":"\xff"}',
        b'{"model":"\\ud800"}',
        b'{"model":"a","temperature":NaN}',
        b'{"model":"a","temperature":1e999}',
        b'{"model":"a","seed":' + b"1" * 5000 + b"}",
        b'{"model":"a","messages":' + b"[" * 100_000,
    ],
)
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    for parse in (parse_chat, parse_completion):
        with pytest.raises(BadRequest, match=r"^the body "):
            parse(body)


FIELDS = [
    *("model", "messages", "prompt", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "seed"),
    *("stop", "stop_token_ids", "ignore_eos", "logprobs", "top_logprobs", "stream", "stream_options", "penstock"),
    *("user", "n", "echo", "tools", "response_format"),
]
INNER = ["role", "content", "name", "type", "text", "include_usage", "timeline", "tool_calls"]
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
values = st.recursive(
    scalars | st.sampled_from(["user", "text", "demo"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(INNER), inner, max_size=3),
    max_leaves=8,
)
SOUND = {"model": "demo", "messages": [{"role": "user", "content": "hi"}]}


@given(st.dictionaries(st.sampled_from(FIELDS), values, max_size=4), st.booleans())
def test_any_body_is_understood_or_refused(fields: dict[str, object], is_nearly_sound: bool) -> None:
    body = json.dumps(SOUND | fields if is_nearly_sound else fields).encode()
    for parse in (parse_chat, parse_completion):
        try:
            assert isinstance(parse(body), Ask)
        except RequestError as error:
            assert error.status == 400
            json.loads(error_body(error))


@given(st.binary(max_size=30))
def test_any_bytes_are_refused(body: bytes) -> None:
    with pytest.raises(BadRequest):
        parse_chat(body)


# Budgets


def test_the_budget() -> None:
    assert output_budget(10, 5, None, 100) == 5
    assert output_budget(10, 90, None, 100) == 90
    assert output_budget(10, None, None, 100) == 90
    assert output_budget(10, None, 16, 100) == 16
    assert output_budget(90, None, 16, 100) == 10


@pytest.mark.parametrize(("prompt", "asked"), [(100, None), (500, 1), (10, 91)])
def test_what_does_not_fit_is_told_the_numbers(prompt: int, asked: int | None) -> None:
    with pytest.raises(PromptTooLong, match=f"has {prompt} tokens.*(99|100)") as caught:
        output_budget(prompt, asked, None, 100)
    assert caught.value.code == "context_length_exceeded"


# Answers


def fields_of(event: bytes) -> dict[str, Any]:
    assert event.startswith(b"data: ")
    assert event.endswith(b"\n\n")
    assert event.count(b"\n") == 2
    fields: dict[str, Any] = json.loads(event[6:])
    return fields


@pytest.mark.parametrize("dialect", [CHAT, COMPLETIONS], ids=lambda dialect: dialect.id_prefix)
@given(text=st.text(st.characters(codec="utf-8")))
def test_any_text_is_carried(dialect: Dialect, text: str) -> None:
    events = dialect.events(HEADING, wants_usage=False)
    for event in (events.token(text), events.finish(text, "stop", None), events.token_logprobs(text, {})):
        choice = fields_of(event)["choices"][0]
        assert (choice["delta"]["content"] if dialect is CHAT else choice["text"]) == text
    answer = json.loads(dialect.answer(HEADING, text, "stop", None, USAGE, None))["choices"][0]
    assert (answer["message"]["content"] if dialect is CHAT else answer["text"]) == text


def test_a_chat_stream() -> None:
    events = CHAT.events(HEADING, wants_usage=True)
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1_700_000_000, "model": "demo"}

    def chunk(delta: dict[str, str], reason: str | None) -> dict[str, object]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return head | {"choices": [choice], "usage": None}

    assert fields_of(events.opening) == chunk({"role": "assistant", "content": ""}, None)
    assert fields_of(events.token("hi")) == chunk({"content": "hi"}, None)
    assert fields_of(events.finish("", "length", None)) == chunk({"content": ""}, "length")
    assert fields_of(events.usage(USAGE)) == head | {
        "choices": [],
        "usage": {
            "prompt_tokens": 5,
            "completion_tokens": 2,
            "total_tokens": 7,
            "prompt_tokens_details": {"cached_tokens": 4},
        },
    }
    assert DONE == b"data: [DONE]\n\n"


def test_a_completion_stream() -> None:
    events = COMPLETIONS.events(HEADING, wants_usage=False)
    assert events.opening == b""
    assert fields_of(events.token("hi")) == {
        "id": "chatcmpl-1",
        "object": "text_completion",
        "created": 1_700_000_000,
        "model": "demo",
        "choices": [{"index": 0, "text": "hi", "logprobs": None, "finish_reason": None}],
    }


def test_whole_answers() -> None:
    timeline = Timeline(decode_worker="decode-0")
    answer = json.loads(CHAT.answer(HEADING, "hi", "stop", None, USAGE, timeline))
    message = {"role": "assistant", "content": "hi", "refusal": None}
    assert answer["object"] == "chat.completion"
    assert answer["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]
    assert answer["penstock"]["timeline"]["decode_worker"] == "decode-0"
    assert answer["penstock"]["timeline"]["first_token_s"] is None
    answer = json.loads(COMPLETIONS.answer(HEADING, "hi", "length", None, Usage(1, 2, None), None))
    assert answer["choices"] == [{"index": 0, "text": "hi", "logprobs": None, "finish_reason": "length"}]
    assert answer["usage"]["prompt_tokens_details"] == {}
    assert "penstock" not in answer


PIECES = {1: b"hi", 2: "é".encode(), 3: b"\xf0\x9f"}


def test_chat_logprobs() -> None:
    shown = [Shown(Token(1, -0.5, ((1, -0.5), (3, float("-inf")))), 0)]
    assert json.loads(msgspec.json.encode(CHAT.logprobs(shown, PIECES.__getitem__))) == {
        "content": [
            {
                "token": "hi",
                "logprob": -0.5,
                "bytes": [104, 105],
                "top_logprobs": [
                    {"token": "hi", "logprob": -0.5, "bytes": [104, 105]},
                    {"token": "\ufffd", "logprob": -9999.0, "bytes": [0xF0, 0x9F]},
                ],
            }
        ],
        "refusal": None,
    }


def test_completion_logprobs() -> None:
    shown = [Shown(Token(1, -0.5, ((1, -0.5), (3, -2.0))), 0), Shown(Token(2, -1.0, ()), 2)]
    assert COMPLETIONS.logprobs(shown, PIECES.__getitem__) == {
        "tokens": ["hi", "é"],
        "token_logprobs": [-0.5, -1.0],
        "top_logprobs": [{"hi": -0.5, "bytes:\\xf0\\x9f": -2.0}, {}],
        "text_offset": [0, 2],
    }


def test_errors_have_openais_shape() -> None:
    error = BadRequest("stop: too many", "stop")
    fields = {"message": "stop: too many", "type": "invalid_request_error", "param": "stop", "code": None}
    assert json.loads(error_body(error)) == {"error": fields}
    event = fields_of(error_event(DeadlineExceeded("too late")))
    assert event["error"]["code"] == "deadline_exceeded"
