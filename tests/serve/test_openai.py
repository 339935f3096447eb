"""OpenAI's bodies: what answers, events and errors look like on the wire."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import BadRequest, DeadlineExceeded
from penstock.request import Token
from penstock.serve.openai import (
    CHAT,
    COMPLETIONS,
    DONE,
    Dialect,
    Ending,
    Heading,
    Shown,
    Usage,
    error_body,
    error_event,
)

HEADING = Heading("chatcmpl-1", 1_700_000_000, "demo")
USAGE = Usage(prompt_tokens=5, output_tokens=2, cached_tokens=4)


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
    for event in (events.token(text), events.finish(text, None, Ending("stop"), {}), events.token_with(text, {}, {})):
        choice = fields_of(event)["choices"][0]
        assert (choice["delta"]["content"] if dialect is CHAT else choice["text"]) == text
    choice = json.loads(dialect.choice(1, dialect.said(text), None, Ending("stop")))
    assert (choice["message"]["content"] if dialect is CHAT else choice["text"]) == text


def test_a_chat_stream() -> None:
    events = CHAT.events(HEADING, wants_usage=True)
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1_700_000_000, "model": "demo"}

    def chunk(delta: dict[str, str], reason: str | None) -> dict[str, object]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return head | {"choices": [choice], "usage": None}

    assert fields_of(events.opening({})) == chunk({"role": "assistant", "content": ""}, None)
    assert fields_of(events.token("hi")) == chunk({"content": "hi"}, None)
    last = chunk({"content": ""}, "length")
    last["choices"][0]["stop_reason"] = None  # type: ignore[index]
    assert fields_of(events.finish("", None, Ending("length"), {})) == last
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
    assert fields_of(events.token("hi")) == {
        "id": "chatcmpl-1",
        "object": "text_completion",
        "created": 1_700_000_000,
        "model": "demo",
        "choices": [{"index": 0, "text": "hi", "logprobs": None, "finish_reason": None}],
    }


def test_whole_answers() -> None:
    choices = [CHAT.choice(0, CHAT.said("hi"), None, Ending("stop", "."))]
    answer = json.loads(CHAT.answer(HEADING, choices, USAGE, {"penstock": {"timeline": None}}))
    message = {"role": "assistant", "content": "hi", "refusal": None}
    ended = {"logprobs": None, "finish_reason": "stop", "stop_reason": "."}
    assert answer["object"] == "chat.completion"
    assert answer["choices"] == [{"index": 0, "message": message} | ended]
    assert answer["penstock"] == {"timeline": None}
    choices = [COMPLETIONS.choice(i, COMPLETIONS.said("hi"), None, Ending("length", None, {"x": i})) for i in (0, 1)]
    answer = json.loads(COMPLETIONS.answer(HEADING, choices, Usage(1, 2, None), {}))
    ended = {"logprobs": None, "finish_reason": "length", "stop_reason": None}
    assert answer["choices"] == [{"index": i, "text": "hi", "x": i} | ended for i in (0, 1)]
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
        "top_logprobs": [{"hi": -0.5, "bytes:\\xf0\\x9f": -2.0}, {"é": -1.0}],
        "text_offset": [0, 2],
    }


def test_errors_have_openais_shape() -> None:
    error = BadRequest("stop: too many", "stop")
    fields = {"message": "stop: too many", "type": "invalid_request_error", "param": "stop", "code": None}
    assert json.loads(error_body(error)) == {"error": fields}
    event = fields_of(error_event(DeadlineExceeded("too late")))
    assert event["error"]["code"] == "deadline_exceeded"
