"""OpenAI's bodies: requests into values, answers and errors into bytes. Pure; used by `frontend`.

A request is understood in full or refused with a 400 that names the field: unknown fields, fields of the
standard that are not implemented here, wrong types and values out of range alike. Beyond the standard there are
`top_k`, `stop_token_ids`, `ignore_eos`, `priority`, and `penstock: {"timeline": true}`, which adds the request's
timeline to the answer. The two ways of asking, chat and plain completion, are two values of `Dialect`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from penstock.cluster import ModelCard
from penstock.errors import BadRequest, PenstockError, PromptTooLong, Unsupported
from penstock.request import FinishReason, Sampling, Timeline, Token
from penstock.serve.text import Message

T = TypeVar("T")

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, where /v1/completions is not told; a chat may fill the context
MIN_LOGPROB = -9999.0  # JSON has no infinity
SESSION_CHARS = 256  # of the name of a session that tell it from others
SEED_MASK = (1 << 63) - 1  # engines take seeds that are not negative

_encode = msgspec.json.Encoder().encode


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """What a client asks, checked as far as it can be without knowing the model."""

    model: str
    text: str | None = None  # the prompt is one of these three
    tokens: list[int] | None = None
    messages: list[Message] | None = None
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    is_stream: bool = False
    wants_usage: bool = False  # in a stream
    wants_timeline: bool = False
    priority: int = 0  # lower first, as in vLLM
    session: str = ""
    needs: tuple[tuple[str, str], ...] = ()  # (engine feature, field that asks for it)

    def sampling(self, max_tokens: int, seed: int) -> Sampling:
        return Sampling(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=seed,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
            logprobs=self.logprobs,
        )


def output_budget(prompt_tokens: int, asked: int | None, default: int | None, context_tokens: int) -> int:
    """How many tokens may be generated. Raises PromptTooLong if prompt and answer do not fit the context."""
    room = context_tokens - prompt_tokens
    if room < 1:
        raise PromptTooLong(
            f"the prompt has {prompt_tokens} tokens; this model takes {context_tokens - 1} here, and one for the "
            "answer. Shorten the prompt",
        )
    if asked is not None and asked > room:
        raise PromptTooLong(
            f"the prompt has {prompt_tokens} tokens and {asked} were asked for; prompt and answer share a context "
            f"of {context_tokens} tokens here. Shorten the prompt, or lower max_tokens to {room}",
        )
    return asked or min(room, default or room)


# Requests.

_Count = Annotated[int, Meta(ge=1, le=1 << 31)]
_TokenId = Annotated[int, Meta(ge=0, lt=1 << 31)]
_Stop = Annotated[str, Meta(min_length=1, max_length=512)]
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


# What is parsed in a second step, so that an error can say where it is wrong. `openapi` describes it by SHAPES.
_RawMessage = Annotated[dict[str, object], Meta(extra_json_schema={"$ref": "#/components/schemas/Message"})]
_RawPart = Annotated[dict[str, object], Meta(extra_json_schema={"$ref": "#/components/schemas/TextPart"})]
_RawPrompt = Annotated[object, Meta(extra_json_schema={"type": ["integer", "string", "array"]})]


class _StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool | None = None


class _Extra(msgspec.Struct, forbid_unknown_fields=True):
    timeline: bool | None = None


class _Body(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What both ways of asking share. Fields may be null, which clients send for "not given"."""

    model: str
    max_tokens: _Count | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=1 << 31)] | None = None
    seed: Annotated[int, Meta(ge=-(1 << 63), le=SEED_MASK)] | None = None
    stop: _Stop | Annotated[list[_Stop], Meta(max_length=16)] | None = None
    stop_token_ids: Annotated[list[_TokenId], Meta(max_length=256)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    user: str | None = None  # this and the next two are hints that by the standard change no answer
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None  # taken for the name of a session
    priority: Annotated[int, Meta(ge=-1000, le=1000)] | None = None
    penstock: _Extra | None = None


class _ChatBody(_Body):
    messages: Annotated[list[_RawMessage], Meta(min_length=1)]
    max_completion_tokens: _Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None


class _CompletionBody(_Body):
    prompt: Annotated[str, Meta(min_length=1)] | Annotated[list[_RawPrompt], Meta(min_length=1)]
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None


class _Message(msgspec.Struct, forbid_unknown_fields=True):
    role: Annotated[str, Meta(extra_json_schema={"enum": [*_ROLES]})]
    content: str | list[_RawPart]
    name: str | None = None


class _TextPart(msgspec.Struct, forbid_unknown_fields=True):
    type: Annotated[str, Meta(extra_json_schema={"enum": ["text"]})]
    text: str


# Fields of the standard, and of its usual extensions, accepted only with null or a value that asks for nothing.
_IDLE_FIELDS: dict[str, tuple[object, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "metadata": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
# The same in messages: clients send back the assistant's as they got them.
_IDLE_MESSAGE_FIELDS: dict[str, tuple[object, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "refusal": (),
    "tool_call_id": (),
    "tool_calls": ([],),
}
# What `openapi` describes: the structs that requests are parsed with, and the fields that each takes besides.
SHAPES: dict[type[msgspec.Struct], Mapping[str, tuple[object, ...]]] = {
    _ChatBody: _IDLE_FIELDS,
    _CompletionBody: _IDLE_FIELDS,
    _Message: _IDLE_MESSAGE_FIELDS,
    _TextPart: {},
}


def parse_chat(body: bytes) -> Ask:
    """Of POST /v1/chat/completions. Raises BadRequest or Unsupported."""
    fields = _convert(_supported(_load(body), _IDLE_FIELDS), _ChatBody)
    if fields.max_tokens is not None and fields.max_completion_tokens is not None:
        raise BadRequest("give max_tokens or max_completion_tokens, not both", "max_tokens")
    if fields.top_logprobs is not None and not fields.logprobs:
        raise BadRequest("top_logprobs needs logprobs: true", "top_logprobs")
    messages = [_parse_message(message, f"messages[{i}]") for i, message in enumerate(fields.messages)]
    return _ask(
        fields,
        messages=messages,
        max_tokens=fields.max_tokens or fields.max_completion_tokens,
        logprobs=(fields.top_logprobs or 0) if fields.logprobs else None,
    )


def parse_completion(body: bytes) -> Ask:
    """Of POST /v1/completions. Raises BadRequest or Unsupported."""
    fields = _convert(_supported(_load(body), _IDLE_FIELDS), _CompletionBody)
    prompt = _parse_prompt(fields.prompt)
    return _ask(
        fields,
        text=prompt if isinstance(prompt, str) else None,
        tokens=None if isinstance(prompt, str) else prompt,
        max_tokens=fields.max_tokens,
        logprobs=fields.logprobs,
    )


def _load(body: bytes) -> dict[str, object]:
    try:
        return msgspec.json.decode(body, type=dict[str, object])
    except msgspec.ValidationError as error:
        raise BadRequest(f"the body must be a JSON object with numbers of 64 bits: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"the body is not valid JSON: {error}") from error


def _supported(
    fields: dict[str, object], harmless: Mapping[str, tuple[object, ...]], where: str = ""
) -> dict[str, object]:
    """`fields` without those that ask for nothing. Raises Unsupported for those of `harmless` that do ask."""
    for name in [name for name in fields if name in harmless]:
        value = fields.pop(name)
        if value is not None and not _is_among(value, harmless[name]):
            path = _join(where, name)
            raise Unsupported(_refusal(path, value, harmless[name]), path)
    return fields


def _is_among(value: object, harmless: Sequence[object]) -> bool:
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in harmless)


def _refusal(field: str, value: object, harmless: Sequence[object]) -> str:
    shown = _encode(value).decode()
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    instead = "".join(f" or {_encode(one).decode()}" for one in harmless)
    return f"{field} = {shown} is not supported by this server; leave it out, or send null{instead}"


def _convert(value: object, shape: type[T], where: str = "") -> T:
    try:
        return msgspec.convert(value, shape)
    except msgspec.ValidationError as error:
        raise _translate(str(error), where) from None


_UNKNOWN, _MISSING = "Object contains unknown field `", "Object missing required field `"


def _translate(problem: str, where: str) -> BadRequest:
    """From msgspec's message, such as "Expected `int`, got `str` - at `$.stop[0]`"."""
    what, found, at = problem.rpartition(" - at `$")
    if not found:
        what, at = problem, ""
    path = _join(where, at.removesuffix("`").removeprefix("."))
    for start, meaning in ((_UNKNOWN, "there is no such field"), (_MISSING, "this field is required")):
        if what.startswith(start):
            path, what = _join(path, what.removeprefix(start).removesuffix("`")), meaning
    path = path[:200]  # a client may have sent any name
    return BadRequest(f"{path}: {what}", path or None)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name and not name.startswith("[") else path + name


def _parse_message(raw: dict[str, object], where: str) -> Message:
    message = _convert(_supported(raw, _IDLE_MESSAGE_FIELDS, where), _Message, where)
    role = _ROLES.get(message.role)
    if role is None:
        raise Unsupported(
            f"{where}.role = {message.role[:40]!r}; this server takes {', '.join(_ROLES)}", f"{where}.role"
        )
    content = message.content
    if not isinstance(content, str):
        parts = [_parse_part(part, f"{where}.content[{i}]") for i, part in enumerate(content)]
        content = "\n".join(parts)
    return {"role": role, "content": content} | ({"name": message.name} if message.name else {})


def _parse_part(raw: dict[str, object], where: str) -> str:
    kind = raw.get("type", "text")
    if isinstance(kind, str) and kind != "text":
        raise Unsupported(f"{where}.type = {kind[:40]!r}; this server takes text only", f"{where}.type")
    return _convert(raw, _TextPart, where).text


def _parse_prompt(prompt: str | list[object]) -> str | list[int]:
    """A text, token ids, or a list of one of these."""
    if isinstance(prompt, str):
        return prompt
    first = prompt[0]
    if not isinstance(first, str | list):
        return _convert(prompt, list[_TokenId], "prompt")
    if len(prompt) > 1:
        raise Unsupported(f"prompt holds {len(prompt)} prompts; send each in a request of its own", "prompt")
    return first if isinstance(first, str) else _convert(first, list[_TokenId], "prompt[0]")


def _ask(
    fields: _Body,
    *,
    text: str | None = None,
    tokens: list[int] | None = None,
    messages: list[Message] | None = None,
    max_tokens: int | None,
    logprobs: int | None,
) -> Ask:
    if fields.stream_options is not None and not fields.stream:
        raise BadRequest("stream_options needs stream: true", "stream_options")
    stop = fields.stop
    return Ask(
        model=fields.model,
        text=text,
        tokens=tokens,
        messages=messages,
        max_tokens=max_tokens,
        temperature=1.0 if fields.temperature is None else fields.temperature,
        top_p=1.0 if fields.top_p is None else fields.top_p,
        top_k=max(0, fields.top_k or 0),  # -1 and 0 both keep all tokens
        seed=None if fields.seed is None else fields.seed & SEED_MASK,
        stop=(stop,) if isinstance(stop, str) else tuple(stop or ()),
        stop_token_ids=tuple(fields.stop_token_ids or ()),
        ignore_eos=bool(fields.ignore_eos),
        logprobs=logprobs,
        is_stream=bool(fields.stream),
        wants_usage=fields.stream_options is not None and bool(fields.stream_options.include_usage),
        wants_timeline=fields.penstock is not None and bool(fields.penstock.timeline),
        priority=fields.priority or 0,
        session=(fields.prompt_cache_key or "")[:SESSION_CHARS],
        needs=_needs(fields, logprobs),
    )


def _needs(fields: _Body, logprobs: int | None) -> tuple[tuple[str, str], ...]:
    """What the client asked for that not every engine has. A default temperature is not a wish."""
    wishes = {
        "temperature": fields.temperature is not None and fields.temperature > 0,
        "top_p": fields.top_p is not None and fields.top_p < 1,
        "top_k": (fields.top_k or 0) > 0,
    }
    needs = [("sampling", name) for name, is_wished in wishes.items() if is_wished]
    return (*needs, *((("logprobs", "logprobs"),) if logprobs is not None else ()))


# Answers.


class Heading(msgspec.Struct, frozen=True):
    """What every answer and every event of a stream starts with."""

    id: str
    created: int
    model: str


class Usage(msgspec.Struct, frozen=True):
    """`cached_tokens` is None where the worker was stopped before it could tell."""

    prompt_tokens: int
    output_tokens: int
    cached_tokens: int | None

    def fields(self) -> dict[str, object]:
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


Spell = Callable[[int], bytes]  # the bytes of a token
LogprobFields = Callable[[Sequence[Shown], Spell], dict[str, object]]


@dataclass(frozen=True, slots=True)
class Dialect:
    """One way of asking: how its request is read and its answer is written.

    An answer's text, as JSON, lies between the two halves of `choice`, or of `chunk_choice` in a stream; `opening`
    is the choice of the event before the first token's.
    """

    id_prefix: str
    kind: str  # what OpenAI calls the "object"
    chunk_kind: str
    body: type[msgspec.Struct]  # of a request, as it is described
    parse: Callable[[bytes], Ask]
    choice: tuple[bytes, bytes]
    chunk_choice: tuple[bytes, bytes]
    opening: bytes
    logprobs: LogprobFields
    default_tokens: int | None
    is_continuation: bool  # the answer goes on where the prompt ends, in the same text

    def answer(
        self,
        heading: Heading,
        text: str,
        reason: FinishReason,
        logprobs: dict[str, object] | None,
        usage: Usage,
        timeline: Timeline | None,
    ) -> bytes:
        """The body of a whole answer."""
        before, after = self.choice
        return b"".join(
            (
                _opened(heading, self.kind),
                b',"choices":[{"index":0,' + before + _encode(text) + after,
                b',"logprobs":' + _encode(logprobs) + b',"finish_reason":' + _encode(reason) + b"}]",
                b',"usage":' + _encode(usage.fields()) + _extra(timeline) + b"}",
            )
        )

    def events(self, heading: Heading, wants_usage: bool) -> Events:
        return Events(self, heading, wants_usage)


class Events:
    """The server-sent events of one stream, as bytes. What does not change is made once."""

    __slots__ = ("_after", "_before", "_close", "_end", "_head", "opening")

    def __init__(self, dialect: Dialect, heading: Heading, wants_usage: bool) -> None:
        before, self._close = dialect.chunk_choice
        self._head = b"data: " + _opened(heading, dialect.chunk_kind) + b',"choices":['
        self._end = b',"usage":null}\n\n' if wants_usage else b"}\n\n"
        self._before = self._head + b'{"index":0,' + before
        self._after = self._close + b',"logprobs":null,"finish_reason":null}]' + self._end
        self.opening = b""
        if dialect.opening:
            nothing = b',"logprobs":null,"finish_reason":null}]'
            self.opening = self._head + b'{"index":0,' + dialect.opening + nothing + self._end

    def token(self, text: str) -> bytes:
        """One token's event; `text` is what it adds, perhaps nothing yet."""
        return self._before + _encode(text) + self._after

    def token_logprobs(self, text: str, logprobs: dict[str, object]) -> bytes:
        shown = b',"logprobs":' + _encode(logprobs) + b',"finish_reason":null}]'
        return self._before + _encode(text) + self._close + shown + self._end

    def finish(self, text: str, reason: FinishReason, timeline: Timeline | None) -> bytes:
        """The last event with a choice; `text` is what was held back until the end."""
        finished = b',"logprobs":null,"finish_reason":' + _encode(reason) + b"}]" + _extra(timeline)
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


def _model_fields(card: ModelCard, created: int) -> dict[str, object]:
    return {
        "id": card.name,
        "object": "model",
        "created": created,
        "owned_by": "penstock",
        "max_model_len": card.max_context_tokens,
    }


def timeline_fields(timeline: Timeline) -> dict[str, object]:
    """All of it, what was not reached as null."""
    return msgspec.structs.asdict(timeline)


def _opened(heading: Heading, kind: str) -> bytes:
    """A JSON object that is not closed yet."""
    fields = {"id": heading.id, "object": kind, "created": heading.created, "model": heading.model}
    return _encode(fields)[:-1]


def _extra(timeline: Timeline | None) -> bytes:
    if timeline is None:
        return b""
    return b',"penstock":' + _encode({"timeline": timeline_fields(timeline)})


def _chat_logprobs(shown: Sequence[Shown], spell: Spell) -> dict[str, object]:
    return {"content": [_chat_logprob(one.token, spell) for one in shown], "refusal": None}


def _chat_logprob(token: Token, spell: Spell) -> dict[str, object]:
    top = [_spelled(other, logprob, spell) for other, logprob in token.top]
    return _spelled(token.id, token.logprob, spell) | {"top_logprobs": top}


def _spelled(token: int, logprob: float | None, spell: Spell) -> dict[str, object]:
    piece = spell(token)
    return {"token": piece.decode(errors="replace"), "logprob": _finite(logprob), "bytes": list(piece)}


def _completion_logprobs(shown: Sequence[Shown], spell: Spell) -> dict[str, object]:
    tops = [{_name(other, spell): _finite(logprob) for other, logprob in one.token.top} for one in shown]
    return {
        "tokens": [_name(one.token.id, spell) for one in shown],
        "token_logprobs": [_finite(one.token.logprob) for one in shown],
        "top_logprobs": tops,
        "text_offset": [one.offset for one in shown],
    }


def _name(token: int, spell: Spell) -> str:
    """What plain completions call a token: its text, or its bytes where they are no text."""
    piece = spell(token)
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, MIN_LOGPROB)


CHAT = Dialect(
    id_prefix="chatcmpl-",
    kind="chat.completion",
    chunk_kind="chat.completion.chunk",
    body=_ChatBody,
    parse=parse_chat,
    choice=(b'"message":{"role":"assistant","content":', b',"refusal":null}'),
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
    body=_CompletionBody,
    parse=parse_completion,
    choice=(b'"text":', b""),
    chunk_choice=(b'"text":', b""),
    opening=b"",
    logprobs=_completion_logprobs,
    default_tokens=DEFAULT_COMPLETION_TOKENS,
    is_continuation=True,
)
