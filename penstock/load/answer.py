"""An answer as it comes: server-sent events, of which those with tokens are noted, and the server's own counts."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from penstock.load.record import Usage

Note = Callable[[float], None]  # when an event with tokens came
Parts = list[str]


class _Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: msgspec.Raw = msgspec.Raw(b"null")


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None


class _Error(msgspec.Struct):
    message: str | None = None
    type: str | None = None
    code: str | int | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: _Error | str | None = None


class _Refusal(msgspec.Struct):
    error: _Error | str | None = None
    message: str | None = None  # as some servers have it
    type: str | None = None


_decode = msgspec.json.Decoder(_Event).decode
_NULL = b"null"
_DONE = b"[DONE]"


class Answer:
    """The sink of one request's stream; `note` hears of every event with a token.

    That is one with text, or one in mid-stream without: a token that is part of a character, or a special one. The
    role that opens a chat, and the end, have none.
    """

    def __init__(self, note: Note, keeps_text: bool = False) -> None:
        self.usage = Usage()
        self.problem = ""  # what ended the answer instead of its end
        self._note = note
        self._keeps_text = keeps_text
        self._parts: Parts = []
        self._rest = b""
        self._is_done = False
        self._events = 0

    @property
    def text(self) -> str:
        """Without what was thought aloud, which is no part of a conversation."""
        return "".join(self._parts)

    @property
    def error(self) -> str:
        """Why the answer is none, once it is over; empty if it is one."""
        if self.problem:
            return self.problem
        if not self._is_done:
            return "stream ended without [DONE]"
        return "" if self._events else "answer without a token"

    def feed(self, piece: bytes, at_s: float) -> None:
        """A piece of the body, cut anywhere."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._take(line[5:].strip(), at_s)

    def _take(self, data: bytes, at_s: float) -> None:
        if data == _DONE:
            self._is_done = True
            return
        try:
            event = _decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError):
            self.problem = "event that is no OpenAI event"
            return
        if event.error is not None:
            self.problem = f"error in mid-stream: {_name(event.error)}"
        if event.usage is not None:
            self.usage = _counts(event.usage)
        for choice in event.choices or ():
            if self._has_token(choice):
                self._events += 1
                self._note(at_s)

    def _has_token(self, choice: _Choice) -> bool:
        delta = choice.delta
        if delta is None:
            said, role = choice.text, None
        else:
            said, role = delta.content, delta.role
        if said:
            if self._keeps_text:
                self._parts.append(said)
            return True
        if delta is not None and (delta.reasoning_content or delta.reasoning or bytes(delta.tool_calls) != _NULL):
            return True
        return role is None and choice.finish_reason is None


def _counts(usage: _Usage) -> Usage:
    counted = Usage()
    details = usage.prompt_tokens_details
    found = {
        "prompt_tokens": usage.prompt_tokens,
        "output_tokens": usage.completion_tokens,
        "cached_tokens": None if details is None else details.cached_tokens,
    }
    return msgspec.structs.replace(counted, **{name: count for name, count in found.items() if count is not None})


def _name(error: _Error | str) -> str:
    if isinstance(error, str):
        return error[:80]
    return str(error.type or error.code or error.message)[:80]


def refusal(status: int, body: bytes) -> str:
    """The kind of an error that a server's answer of another status than 200 is: the same for all alike."""
    try:
        found = msgspec.json.decode(body, type=_Refusal)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return f"HTTP {status}"
    kind = found.type if found.error is None else _name(found.error)
    return f"HTTP {status}: {kind}" if kind else f"HTTP {status}"


def reason(body: bytes) -> str:
    """What a refusal says to people; empty if nothing that is understood."""
    try:
        found = msgspec.json.decode(body, type=_Refusal)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return ""
    if isinstance(found.error, _Error):
        return found.error.message or ""
    return found.error or found.message or ""
