"""Answers: which events have tokens, however the stream is cut, and what counts as a failure."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.load.answer import Answer, reason, refusal
from penstock.load.record import UNKNOWN, Usage

USAGE = {"prompt_tokens": 12, "completion_tokens": 3, "total_tokens": 15, "prompt_tokens_details": {"cached_tokens": 8}}
DONE = b"data: [DONE]\n\n"


def event(body: object) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def chat(finish: str | None = None, **delta: object) -> bytes:
    return event({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}], "usage": None})


def text(said: str, finish: str | None = None) -> bytes:
    return event({"choices": [{"index": 0, "text": said, "finish_reason": finish}]})


CHAT = (
    chat(role="assistant", content="")
    + chat(content="a")
    + chat(content="")  # a token that is part of a character
    + chat(content="é")
    + chat("stop", content="")
    + event({"choices": [], "usage": USAGE})
    + DONE
)
COMPLETION = text("a") + text("é") + text("", "length") + DONE


def heard(stream: bytes, cuts: tuple[int, ...] = ()) -> tuple[Answer, list[float]]:
    """An answer whose pieces come at 0, 1, 2, ..."""
    notes: list[float] = []
    answer = Answer(notes.append, keeps_text=True)
    ends = [*sorted(cut for cut in cuts if cut < len(stream)), len(stream)]
    begin = 0
    for number, end in enumerate(ends):
        answer.feed(stream[begin:end], float(number))
        begin = end
    return answer, notes


@given(st.lists(st.integers(0, len(CHAT)), max_size=20))
def test_a_chat_is_the_same_however_it_is_cut(cuts: list[int]) -> None:
    answer, notes = heard(CHAT, tuple(cuts))
    assert (answer.text, answer.error, len(notes)) == ("aé", "", 3)
    assert answer.usage == Usage(12, 3, 8)
    assert notes == sorted(notes)


def test_an_event_counts_when_its_end_is_there() -> None:
    stream = text("a") + text("b") + DONE
    _, notes = heard(stream, (3, len(text("a")) - 2, len(text("a")) + 5))
    assert notes == [2.0, 3.0]


def test_a_completion_has_no_role_and_its_end_no_token() -> None:
    answer, notes = heard(COMPLETION)
    assert (answer.text, answer.error, len(notes), answer.usage) == ("aé", "", 2, Usage(UNKNOWN, UNKNOWN, UNKNOWN))


def test_what_is_thought_aloud_is_a_token_but_not_said() -> None:
    thought = chat(reasoning_content="hm") + chat(reasoning="hm", role="assistant") + chat(tool_calls=[{"index": 0}])
    answer, notes = heard(chat(role="assistant") + thought + chat(content="a") + DONE)
    assert (answer.text, len(notes)) == ("a", 4)


def test_lines_may_end_in_both_ways_and_say_other_things() -> None:
    stream = b": a comment\r\nevent: message\r\n" + (text("a") + DONE).replace(b"\n", b"\r\n")
    answer, notes = heard(stream)
    assert (answer.error, notes) == ("", [0.0])


@pytest.mark.parametrize(
    ("stream", "error"),
    [
        (text("a"), "stream ended without [DONE]"),
        (b"", "stream ended without [DONE]"),
        (chat(role="assistant", content="") + chat("stop") + DONE, "answer without a token"),
        (text("a") + b"data: {\n\n" + DONE, "event that is no OpenAI event"),
        (text("a") + event({"error": {"message": "m", "type": "server_error"}}), "error in mid-stream: server_error"),
        (event({"error": "all is lost"}) + DONE, "error in mid-stream: all is lost"),
    ],
)
def test_what_is_no_whole_answer(stream: bytes, error: str) -> None:
    assert heard(stream)[0].error == error


@pytest.mark.parametrize(
    ("body", "kind", "why"),
    [
        ({"error": {"message": "too many", "type": "overloaded"}}, "HTTP 503: overloaded", "too many"),
        ({"error": {"message": "too many", "code": 7}}, "HTTP 503: 7", "too many"),
        (
            {"object": "error", "message": "too long", "type": "BadRequestError"},
            "HTTP 503: BadRequestError",
            "too long",
        ),
        ({"error": "no"}, "HTTP 503: no", "no"),
        ({}, "HTTP 503", ""),
        ([], "HTTP 503", ""),
    ],
)
def test_refusals_have_a_kind_and_a_reason(body: object, kind: str, why: str) -> None:
    encoded = json.dumps(body).encode()
    assert (refusal(503, encoded), reason(encoded)) == (kind, why)
