"""/tokenize and /detokenize: the tokens that the model would get, and their text."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from penstock.cluster import ModelCard
from penstock.serve.chat_template import ChatTemplate
from penstock.serve.frontend import Frontend
from penstock.serve.text import Tokenizer
from penstock.tokens import unpack
from tests.serve.fake_backend import Client, FakeBackend
from tests.serve.test_frontend import play
from tests.serve.tokenizers_made import TEXT, byte_level, sentencepiece

MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "water?"}]


async def ask(app: Frontend, path: str, **fields: Any) -> Client:
    return await Client(app).ask("POST", path, fields)


async def tokens_of(app: Frontend, **fields: Any) -> list[int]:
    client = await ask(app, "/tokenize", **fields)
    assert client.status == 200, client.json
    tokens: list[int] = client.json["tokens"]
    return tokens


def test_a_prompt_comes_back_as_tokens_and_the_tokens_as_the_prompt() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        client = await ask(app, "/tokenize", model="demo", prompt=TEXT)
        expected = byte_level().encode(TEXT).ids
        assert client.json == {"count": len(expected), "max_model_len": 200, "tokens": expected, "token_strs": None}
        client = await ask(app, "/detokenize", model="demo", tokens=expected)
        assert client.json == {"prompt": TEXT}
        assert (await ask(app, "/detokenize", tokens=[])).json == {"prompt": ""}

    play(story)


def test_tokens_have_names() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        client = await ask(app, "/tokenize", prompt=TEXT * 200, return_token_strs=True)
        assert client.json["token_strs"] == byte_level().encode(TEXT * 200).tokens

    play(story)


CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "look", "arguments": "{}"}}
ANSWERED = [
    *MESSAGES,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "abcdefghi", "content": "wet"},
]
TEMPLATE = "{{ (tools or []) | tojson }}{{ mood }}{% for message in messages %}{{ message | tojson }}{% endfor %}"


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": MESSAGES},
        {"messages": ANSWERED, "tools": [{"type": "function", "function": {"name": "look"}}]},
        {"messages": MESSAGES, "chat_template_kwargs": {"mood": "sad"}, "add_generation_prompt": False},
        {"messages": [*MESSAGES, {"role": "assistant", "content": "wat"}], "continue_final_message": True},
    ],
)
def test_a_conversation_has_the_tokens_that_are_computed_for_it(fields: dict[str, Any]) -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        tokenizer = Tokenizer(byte_level(), ChatTemplate(TEMPLATE, {}), "demo")
        app = Frontend(backend, {"demo": tokenizer}, app._rng)
        backend.models["demo"] = ModelCard("demo", 10_000)
        tokens = await tokens_of(app, **fields)
        client = await ask(app, "/v1/chat/completions", model="demo", **fields)
        assert client.status == 200, client.json
        (request,) = backend.requests
        assert tokens == list(unpack(request.prompt))

    play(story)


def test_a_conversation_can_end_elsewhere() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        messages = [*MESSAGES, {"role": "assistant", "content": "wat"}]
        closed = await tokens_of(app, messages=messages, add_generation_prompt=False)
        assert byte_level().decode(closed, skip_special_tokens=False).endswith("<|assistant|>wat</s>")
        open_ = await tokens_of(app, messages=messages, continue_final_message=True)
        assert open_ == closed[:-1]
        refused = await ask(app, "/tokenize", messages=messages, chat_template_kwargs={"messages": []})
        assert (refused.status, refused.json["error"]["param"]) == (400, "chat_template_kwargs")

    play(story)


def test_special_tokens_stand_around_a_prompt_unless_told_otherwise() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        codec = type(sentencepiece()).from_str(sentencepiece().to_str())
        codec.post_processor = TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
        app = Frontend(backend, {"demo": Tokenizer(codec, None, "demo")}, app._rng)
        plain = codec.encode("water", add_special_tokens=False).ids
        assert await tokens_of(app, prompt="water") == [1, *plain, 2] == codec.encode("water").ids
        assert await tokens_of(app, prompt="water", add_special_tokens=False) == plain

    play(story)


def test_longer_than_the_context_is_counted_all_the_same() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        assert len(await tokens_of(app, prompt="x y" * 1000)) > 200

    play(story)


@pytest.mark.parametrize(
    ("path", "fields", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, 400, "prompt"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", {"prompt": 3}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404, "model"),
        ("/tokenize", {"prompt": "a", "chat_template": "{{ 1 }}"}, 400, "chat_template"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens[0]"),
        ("/detokenize", {"tokens": [10_000_000]}, 400, "tokens"),
    ],
)
def test_what_is_wrong_is_named(path: str, fields: dict[str, Any], status: int, param: str) -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        client = await ask(app, path, **fields)
        assert (client.status, client.json["error"]["param"]) == (status, param)

    play(story)


def test_the_model_goes_without_saying_where_there_is_one() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        tokenizer = Tokenizer(byte_level(), None, "demo")
        app = Frontend(backend, {"demo": tokenizer, "other": tokenizer}, app._rng)
        backend.models["adapted"] = ModelCard("adapted", 100, base="demo")
        assert (await ask(app, "/tokenize", prompt="a")).json["max_model_len"] == 200
        assert (await ask(app, "/tokenize", prompt="a", model="adapted")).json["max_model_len"] == 100
        backend.models["other"] = ModelCard("other", 300)
        assert (await ask(app, "/tokenize", prompt="a")).status == 400
        backend.models.clear()
        assert (await ask(app, "/tokenize", prompt="a")).status == 503

    play(story)


def test_a_server_that_is_full_says_so() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        assert (await ask(app, "/tokenize", prompt="a")).status == 503

    play(story, inflight=0)
