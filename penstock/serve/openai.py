"""OpenAI's bodies, the other way: answers, events and errors into bytes. Pure; used by `frontend` and `answer`.

What a client may ask is in `asks`. The two ways of asking, chat and plain completion, are two values of `Dialect`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import msgspec

from penstock.cluster import ModelCard
from penstock.errors import PenstockError
from penstock.request import Timeline, Token
from penstock.serve.asks import Ask, parse_chat, parse_completion

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, where /v1/completions is not told; a chat may fill the context
MIN_LOGPROB = -9999.0  # JSON has no infinity

_encode = msgspec.json.Encoder().encode

Fields = dict[str, object]


class Heading(msgspec.Struct, frozen=True):
    """What every answer and every event of a stream starts with."""

    id: str
    created: int
    model: str


class Usage(msgspec.Struct, frozen=True):
    """Of all choices; each prompt counts once. `cached_tokens` is None where no worker told before it was stopped."""

    prompt_tokens: int
    output_tokens: int
    cached_tokens: int | None

    def fields(self) -> Fields:
        cached = {} if self.cached_tokens is None else {"cached_tokens": self.cached_tokens}
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.output_tokens,
            "total_tokens": self.prompt_tokens + self.output_tokens,
            "prompt_tokens_details": cached,
        }


class Shown(msgspec.Struct, frozen=True):
    """A token whose log probabilities are shown; `offset` is where its text starts in the answer."""

    token: Token
    offset: int


Spell = Callable[[int], bytes]  # what a token is called, as bytes
LogprobFields = Callable[[Sequence[Shown], Spell], Fields]


class Ending(msgspec.Struct, frozen=True):
    """Why a choice ended: by `stop`, a string or a token, if by one. `more` are fields that were asked for."""

    reason: str
    stop: str | int | None = None
    more: Fields = {}

    def fields(self) -> bytes:
        """The end of a choice, with what comes after its log probabilities."""
        told = b',"finish_reason":' + _encode(self.reason) + b',"stop_reason":' + _encode(self.stop)
        return told + _joined(self.more) + b"}"


@dataclass(frozen=True, slots=True)
class Dialect:
    """One way of asking: how its request is read and its answer is written.

    A stream's text, as JSON, lies between the two halves of `chunk_choice`; `opening` is the choice of the event before
    the first token's, empty where there is none. `said` is what a whole answer's choice says.
    """

    id_prefix: str
    kind: str  # what OpenAI calls the "object"
    chunk_kind: str
    parse: Callable[[bytes], Ask]
    said: Callable[[str], bytes]
    chunk_choice: tuple[bytes, bytes]
    opening: bytes
    logprobs: LogprobFields
    default_tokens: int | None
    is_continuation: bool  # the answer goes on where the prompt ends, in the same text

    def answer(self, heading: Heading, choices: Iterable[bytes], usage: Usage, more: Fields) -> bytes:
        """The body of a whole answer; `choices` are made by `choice`."""
        opened = _opened(heading, self.kind) + b',"choices":[' + b",".join(choices)
        return opened + b'],"usage":' + _encode(usage.fields()) + _joined(more) + b"}"

    def choice(self, index: int, said: bytes, logprobs: Fields | None, ending: Ending) -> bytes:
        """One choice of a whole answer; `said` is made by the function of that name."""
        return b'{"index":%d,' % index + said + b',"logprobs":' + _encode(logprobs) + ending.fields()

    def events(self, heading: Heading, wants_usage: bool, index: int = 0) -> Events:
        return Events(self, heading, wants_usage, index)


class Events:
    """The server-sent events of one choice of a stream, as bytes. What does not change is made once."""

    __slots__ = ("_after", "_before", "_close", "_end", "_head", "_index", "_opening")

    def __init__(self, dialect: Dialect, heading: Heading, wants_usage: bool, index: int) -> None:
        before, self._close = dialect.chunk_choice
        self._head = b"data: " + _opened(heading, dialect.chunk_kind) + b',"choices":['
        self._index = b'{"index":%d,' % index
        self._end = b',"usage":null}\n\n' if wants_usage else b"}\n\n"
        self._before = self._head + self._index + before
        self._after = self._close + b',"logprobs":null,"finish_reason":null}]' + self._end
        self._opening = dialect.opening

    def opening(self, more: Fields) -> bytes:
        """The event before the first token's, in dialects that have one; `more` is beside the choices."""
        nothing = b',"logprobs":null,"finish_reason":null}]'
        return self._head + self._index + self._opening + nothing + _joined(more) + self._end

    def token(self, text: str) -> bytes:
        """One token's event; `text` is what it adds, perhaps nothing yet."""
        return self._before + _encode(text) + self._after

    def token_with(self, text: str, logprobs: Fields | None, more: Fields) -> bytes:
        """The same, with log probabilities or other fields of the choice."""
        shown = b',"logprobs":' + _encode(logprobs) + b',"finish_reason":null' + _joined(more) + b"}]"
        return self._before + _encode(text) + self._close + shown + self._end

    def delta(self, fields: Fields, logprobs: Fields | None, more: Fields) -> bytes:
        """An event of a chat that adds other things than text."""
        shown = b',"logprobs":' + _encode(logprobs) + b',"finish_reason":null' + _joined(more) + b"}]"
        return self._head + self._index + b'"delta":' + _encode(fields) + shown + self._end

    def finish(self, text: str, logprobs: Fields | None, ending: Ending, more: Fields) -> bytes:
        """The last event of this choice; `text` is what was held back until the end, `more` is beside the choices."""
        finished = b',"logprobs":' + _encode(logprobs) + ending.fields() + b"]" + _joined(more)
        return self._before + _encode(text) + self._close + finished + self._end

    def usage(self, usage: Usage) -> bytes:
        return self._head + b'],"usage":' + _encode(usage.fields()) + b"}\n\n"


DONE = b"data: [DONE]\n\n"


def error_body(error: PenstockError) -> bytes:
    fields = {"message": str(error), "type": error.type, "param": error.param, "code": error.code}
    return _encode({"error": fields})


def error_event(error: PenstockError) -> bytes:
    """What ends a stream that failed after its first event; no [DONE] follows."""
    return b"data: " + error_body(error) + b"\n\n"


def models_body(cards: Iterable[ModelCard], created: int) -> bytes:
    """Of GET /v1/models."""
    return _encode({"object": "list", "data": [_model_fields(card, created) for card in cards]})


def model_body(card: ModelCard, created: int) -> bytes:
    """Of GET /v1/models/{id}."""
    return _encode(_model_fields(card, created))


def _model_fields(card: ModelCard, created: int) -> Fields:
    return {
        "id": card.name,
        "object": "model",
        "created": created,
        "owned_by": "penstock",
        "max_model_len": card.max_context_tokens,
    }


def timeline_fields(timeline: Timeline) -> Fields:
    """All of it, what was not reached as null."""
    return msgspec.structs.asdict(timeline)


def _opened(heading: Heading, kind: str) -> bytes:
    """A JSON object that is not closed yet."""
    fields = {"id": heading.id, "object": kind, "created": heading.created, "model": heading.model}
    return _encode(fields)[:-1]


def _joined(more: Fields) -> bytes:
    """As they follow other fields of an object."""
    return b"," + _encode(more)[1:-1] if more else b""


def chat_message(fields: Fields) -> bytes:
    """What a chat's choice says: its `content`, and perhaps more."""
    return b'"message":' + _encode({"role": "assistant", "refusal": None} | fields)


def _chat_logprobs(shown: Sequence[Shown], spell: Spell) -> Fields:
    return {"content": [_chat_logprob(one.token, spell) for one in shown], "refusal": None}


def _chat_logprob(token: Token, spell: Spell) -> Fields:
    top = [_spelled(other, logprob, spell) for other, logprob in token.top]
    return _spelled(token.id, token.logprob, spell) | {"top_logprobs": top}


def _spelled(token: int, logprob: float | None, spell: Spell) -> Fields:
    piece = spell(token)
    return {"token": piece.decode(errors="replace"), "logprob": finite(logprob), "bytes": list(piece)}


def _completion_logprobs(shown: Sequence[Shown], spell: Spell) -> Fields:
    """Among the likeliest of each place is the token itself, however unlikely, as OpenAI has it."""
    likeliest = [((one.token.id, one.token.logprob), *one.token.top) for one in shown]
    tops = [{_name(other, spell): finite(logprob) for other, logprob in ranked} for ranked in likeliest]
    return {
        "tokens": [_name(one.token.id, spell) for one in shown],
        "token_logprobs": [finite(one.token.logprob) for one in shown],
        "top_logprobs": [top if one.token.logprob is not None else None for one, top in zip(shown, tops, strict=True)],
        "text_offset": [one.offset for one in shown],
    }


def _name(token: int, spell: Spell) -> str:
    """What plain completions call a token: its text, or its bytes where they are no text."""
    piece = spell(token)
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def finite(logprob: float | None) -> float | None:
    """As JSON can say it."""
    return None if logprob is None else max(logprob, MIN_LOGPROB)


CHAT = Dialect(
    id_prefix="chatcmpl-",
    kind="chat.completion",
    chunk_kind="chat.completion.chunk",
    parse=parse_chat,
    said=lambda text: chat_message({"content": text}),
    chunk_choice=(b'"delta":{"content":', b"}"),
    opening=b'"delta":{"role":"assistant","content":""}',
    logprobs=_chat_logprobs,
    default_tokens=None,
    is_continuation=False,
)

COMPLETIONS = Dialect(
    id_prefix="cmpl-",
    kind="text_completion",
    chunk_kind="text_completion",
    parse=parse_completion,
    said=lambda text: b'"text":' + _encode(text),
    chunk_choice=(b'"text":', b""),
    opening=b"",
    logprobs=_completion_logprobs,
    default_tokens=DEFAULT_COMPLETION_TOKENS,
    is_continuation=True,
)
