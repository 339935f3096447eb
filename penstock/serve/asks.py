"""What a client asks, in OpenAI's words and vLLM's: bodies of requests into values. Pure; used by `frontend`.

A request is understood in full or refused with a 400 that names the field: unknown fields, fields of the standard
that are not implemented here, wrong types and values out of range alike. docs/api.md lists them all.

`penstock: {"timeline": true}` adds the request's timeline to the answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from penstock.errors import BadRequest, PromptTooLong, Unsupported
from penstock.request import Sampling
from penstock.serve.chat_template import Chat, Message
from penstock.serve.fields import convert, join
from penstock.serve.guides import FIELDS, check, find_guide, schema_guide
from penstock.serve.tools import Schema, Tools, for_template, parse_tools

T = TypeVar("T")

SESSION_CHARS = 256  # of the name of a session that tell it from others
SEED_MASK = (1 << 63) - 1  # engines take seeds that are not negative
STRING_CHARS = 512  # of a stop string, or a bad word
MOST_CHOICES = 128  # of one request, over all its prompts
# What keeps a body from holding up everybody else: its values cost more than its bytes.
MOST_COMMAS = 1 << 20  # of a body, in texts, too: nearly each is a token
MOST_BRACKETS = 1 << 17  # of a body, opening ones; objects cost most of all
MOST_MESSAGES = 1 << 12  # of a conversation; so many parts, too, and calls, of all of them
BAD_CHARS = 1 << 13  # of all bad words

_encode = msgspec.json.Encoder().encode

Prompt = str | list[int]


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """What a client asks, checked as far as it can be without knowing the model.

    `given` has the fields of `Sampling` that it names, under these names.
    """

    model: str
    prompts: tuple[Prompt, ...] = ()  # texts or token ids; none: a chat
    chat: Chat | None = None
    tools: Tools = Tools()
    shows_reasoning: bool = True
    max_tokens: int | None = None
    given: dict[str, object] = {}
    seed: int | None = None
    bad_words: tuple[str, ...] = ()
    n: int = 1  # choices that are answered, of `best_of` that are generated
    best_of: int = 1
    stop: tuple[str, ...] = ()
    includes_stop: bool = False  # the text ends with the stop string that ended it
    shows_special: bool = False  # tokens such as <|im_end|> are text, too
    echoes: bool = False  # the text begins with the prompt
    takes_last_tokens: int | None = None  # so many of the prompt; None: all
    adds_special: bool = True  # what the tokenizer puts around a plain prompt
    prompt_logprobs: int | None = None  # that are told in a field of their own
    shows_token_ids: bool = False
    names_tokens_by_id: bool = False  # in log probabilities
    is_stream: bool = False
    wants_usage: bool = False  # in a stream
    wants_timeline: bool = False
    priority: int = 0  # lower first, as in vLLM
    session: str = ""
    salt: str = ""  # cached blocks are shared only among requests that have the same one
    needs: tuple[tuple[str, str], ...] = ()  # (engine feature, field that asks for it)

    @property
    def logprobs(self) -> int | None:
        return self.given.get("logprobs")  # type: ignore[return-value]

    @property
    def min_tokens(self) -> int:
        return self.given.get("min_tokens", 0)  # type: ignore[return-value]

    def sampling(self, defaults: Mapping[str, object], **known: object) -> Sampling:
        """`defaults` are the model's own, where the client says nothing; `known` is what no client says."""
        return Sampling(**{**defaults, **self.given, **known})  # type: ignore[arg-type]


def output_budget(
    prompt_tokens: int, asked: int | None, default: int | None, context_tokens: int, field: str = "prompt"
) -> int:
    """How many tokens may be generated. Raises PromptTooLong if prompt and answer do not fit the context.

    `field` is where the prompt was given.
    """
    room = context_tokens - prompt_tokens
    if room < 1:
        raise PromptTooLong(
            f"the prompt has {prompt_tokens} tokens; this model takes {context_tokens - 1} here, and one for the "
            "answer. Shorten the prompt",
            field,
        )
    if asked is not None and asked > room:
        raise PromptTooLong(
            f"the prompt has {prompt_tokens} tokens and {asked} were asked for; prompt and answer share a context "
            f"of {context_tokens} tokens here. Shorten the prompt, or lower max_tokens to {room}",
            "max_tokens",
        )
    return asked or min(room, default or room)


# Shapes.

_Count = Annotated[int, Meta(ge=1, le=1 << 31)]
_TokenId = Annotated[int, Meta(ge=0, lt=1 << 31)]
_Stop = Annotated[str, Meta(min_length=1, max_length=STRING_CHARS)]
_Penalty = Annotated[float, Meta(ge=-2, le=2)]
_Share = Annotated[float, Meta(ge=0, le=1)]
_Bias = Annotated[float, Meta(ge=-100, le=100)]
_Tops = Annotated[int, Meta(ge=0, le=20)]
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}

# What is parsed in a second step, so that an error can say where it is wrong. `openapi` describes it by SHAPES.
RawMessage = Annotated[dict[str, object], Meta(extra_json_schema={"$ref": "#/components/schemas/Message"})]
RawMessages = Annotated[list[RawMessage], Meta(min_length=1, max_length=MOST_MESSAGES)]
_RawPart = Annotated[dict[str, object], Meta(extra_json_schema={"$ref": "#/components/schemas/TextPart"})]
_RawPrompt = Annotated[object, Meta(extra_json_schema={"type": ["integer", "string", "array"]})]


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool | None = None


class Extra(msgspec.Struct, forbid_unknown_fields=True):
    timeline: bool | None = None


class Body(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What both ways of asking share. Fields may be null, which clients send for "not given"."""

    model: str
    max_tokens: Annotated[int, Meta(ge=0, le=1 << 31)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=1 << 31)] | None = None
    min_p: _Share | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    logit_bias: Annotated[dict[str, _Bias], Meta(max_length=1024)] | None = None
    bad_words: Annotated[list[_Stop], Meta(max_length=128)] | None = None
    seed: Annotated[int, Meta(ge=-(1 << 63), le=SEED_MASK)] | None = None
    n: Annotated[int, Meta(ge=1, le=MOST_CHOICES)] | None = None
    stop: _Stop | Annotated[list[_Stop], Meta(max_length=16)] | None = None
    stop_token_ids: Annotated[list[_TokenId], Meta(max_length=256)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=1 << 31)] | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: _Tops | None = None
    truncate_prompt_tokens: _Count | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: dict[str, object] | None = None
    structured_outputs: dict[str, object] | None = None
    guided_json: dict[str, object] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    user: str | None = None  # this and the next two are hints that by the standard change no answer
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None  # taken for the name of a session
    cache_salt: Annotated[str, Meta(min_length=1, max_length=256)] | None = None
    priority: Annotated[int, Meta(ge=-1000, le=1000)] | None = None
    penstock: Extra | None = None


class ChatBody(Body):
    messages: RawMessages
    max_completion_tokens: _Count | None = None
    tools: list[object] | None = None
    tool_choice: str | dict[str, object] | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, object] | None = None
    documents: Annotated[list[dict[str, object]], Meta(max_length=MOST_MESSAGES)] | None = None
    logprobs: bool | None = None
    top_logprobs: _Tops | None = None


class CompletionBody(Body):
    prompt: Annotated[str, Meta(min_length=1)] | Annotated[list[_RawPrompt], Meta(min_length=1)]
    logprobs: _Tops | None = None
    best_of: Annotated[int, Meta(ge=1, le=MOST_CHOICES)] | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None


class _Message(msgspec.Struct, forbid_unknown_fields=True):
    role: Annotated[str, Meta(extra_json_schema={"enum": [*_ROLES]})]
    content: str | list[_RawPart] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[dict[str, object]] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _TextPart(msgspec.Struct, forbid_unknown_fields=True):
    type: Annotated[str, Meta(extra_json_schema={"enum": ["text"]})]
    text: str


Idle = Mapping[str, tuple[object, ...]]

# Fields of the standard, and of its usual extensions, accepted only with null or a value that asks for nothing.
IDLE_FIELDS: Idle = {
    "function_call": ("none", "auto"),
    "functions": ([],),
    "length_penalty": (1,),
    "metadata": ({},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "use_beam_search": (False,),
}
IDLE_IN_CHATS: Idle = {
    **IDLE_FIELDS,
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "modalities": (["text"],),
    "prediction": (),
    "suffix": ("",),
    "verbosity": (),
    "web_search_options": (),
}
IDLE_IN_COMPLETIONS: Idle = {**IDLE_FIELDS, "suffix": ("",)}
# The same in messages: clients send back the assistant's as they got them.
IDLE_IN_MESSAGES: Idle = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "refusal": (),
}
# What `openapi` describes: the structs that requests are parsed with, and what each takes besides.
SHAPES: Mapping[type[msgspec.Struct], Idle] = {
    ChatBody: IDLE_IN_CHATS,
    CompletionBody: IDLE_IN_COMPLETIONS,
    _Message: IDLE_IN_MESSAGES,
    _TextPart: {},
}


# From bytes to an Ask.


def parse_chat(body: bytes) -> Ask:
    """Of POST /v1/chat/completions. Raises BadRequest or Unsupported."""
    fields = convert(_supported(_load(body), IDLE_IN_CHATS), ChatBody, "")
    if fields.max_tokens is not None and fields.max_completion_tokens is not None:
        raise BadRequest("give max_tokens or max_completion_tokens, not both", "max_tokens")
    if fields.max_tokens == 0:
        raise BadRequest("max_tokens: a chat has at least one token of answer", "max_tokens")
    if fields.top_logprobs and not fields.logprobs:
        raise BadRequest("top_logprobs needs logprobs: true", "top_logprobs")
    ask = _ask(fields, (fields.top_logprobs or 0) if fields.logprobs else None)
    max_tokens = fields.max_tokens or fields.max_completion_tokens
    tools = parse_tools(fields.tools, fields.tool_choice, fields.parallel_tool_calls)
    if (schema := tools.schema()) is not None:
        ask = _with_forced_call(ask, schema)
    return msgspec.structs.replace(
        ask,
        chat=conversation_of(fields, tools),
        tools=tools,
        shows_reasoning=fields.include_reasoning is not False,
        max_tokens=max_tokens,
    )


def parse_completion(body: bytes) -> Ask:
    """Of POST /v1/completions. Raises BadRequest or Unsupported."""
    fields = convert(_supported(_load(body), IDLE_IN_COMPLETIONS), CompletionBody, "")
    prompts, n = _parse_prompts(fields.prompt), fields.n or 1
    best_of = fields.best_of or n
    if best_of < n:
        raise BadRequest(f"best_of = {best_of} is less than n = {n}, the number of choices to answer", "best_of")
    if best_of > n and fields.stream:
        raise BadRequest("best_of more than n cannot be streamed: the best is known at the end", "best_of")
    if best_of * len(prompts) > MOST_CHOICES:
        raise BadRequest(f"{len(prompts)} prompts with {best_of} choices each are over {MOST_CHOICES} choices", "n")
    if fields.max_tokens == 0 and not (fields.echo or fields.prompt_logprobs is not None):
        raise BadRequest("max_tokens = 0 leaves nothing to answer but the prompt: set echo", "max_tokens")
    ask = _ask(fields, fields.logprobs)
    if fields.echo and fields.logprobs is not None:
        ask.given["prompt_logprobs"] = max(fields.logprobs, fields.prompt_logprobs or 0)
    return msgspec.structs.replace(
        ask,
        prompts=prompts,
        max_tokens=fields.max_tokens,
        best_of=best_of,
        echoes=bool(fields.echo),
        adds_special=fields.add_special_tokens is not False,
        needs=(*ask.needs, *_needs_of_completion(fields, best_of > n)),
    )


def read_body(body: bytes, shape: type[T]) -> T:
    """Raises BadRequest for what is not of this shape."""
    return convert(_load(body), shape, "")


def _with_forced_call(ask: Ask, schema: Schema) -> Ask:
    """The whole answer is a call, whatever the model's own way of calling."""
    if "guide" in ask.given:
        raise BadRequest("tool_choice asks for a call, and the output is guided already; leave one out", "tool_choice")
    guide = schema_guide(schema)
    check(guide, "tools")
    given = ask.given | {"guide": guide}
    return msgspec.structs.replace(ask, given=given, needs=(*ask.needs, ("guide", "tool_choice")))


def conversation_of(fields: ChatBody, tools: Tools) -> Chat:
    """What the template is told. Raises BadRequest or Unsupported."""
    effort = {} if fields.reasoning_effort is None else {"reasoning_effort": fields.reasoning_effort}
    if fields.add_generation_prompt and fields.continue_final_message:
        raise BadRequest(
            "continue_final_message goes on with the last message: leave add_generation_prompt out",
            "continue_final_message",
        )
    _refuse_many_parts(fields.messages)
    return Chat(
        [_parse_message(message, f"messages[{i}]") for i, message in enumerate(fields.messages)],
        tools=[tool.for_template() for tool in tools.offered] if tools.choice.mode != "none" else (),
        documents=fields.documents or (),
        add_generation_prompt=fields.add_generation_prompt is not False,
        continue_final_message=bool(fields.continue_final_message),
        template_kwargs=effort | (fields.chat_template_kwargs or {}),
    )


def _refuse_many_parts(messages: Sequence[Mapping[str, object]]) -> None:
    for name in ("content", "tool_calls"):
        parts = sum(len(value) for message in messages if isinstance(value := message.get(name), list))
        if parts > MOST_MESSAGES:
            raise BadRequest(f"messages: {name} has {parts} parts in all; the most is {MOST_MESSAGES}", "messages")


def _load(body: bytes) -> dict[str, object]:
    if body.count(b",") > MOST_COMMAS:
        raise BadRequest(f"the body has more than {MOST_COMMAS} commas, and so more values or tokens; shorten it")
    if body.count(b"{") + body.count(b"[") > MOST_BRACKETS:
        raise BadRequest(f"the body has more than {MOST_BRACKETS} opening brackets; shorten it")
    try:
        return msgspec.json.decode(body, type=dict[str, object])
    except msgspec.ValidationError as error:
        raise BadRequest(f"the body must be a JSON object with numbers of 64 bits: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"the body is not valid JSON: {error}") from error


def _supported(fields: dict[str, object], idle: Idle, where: str = "") -> dict[str, object]:
    """`fields` without those that ask for nothing. Raises Unsupported for those of `idle` that do ask."""
    for name in [name for name in fields if name in idle]:
        value = fields.pop(name)
        if value is not None and not _is_among(value, idle[name]):
            path = join(where, name)
            raise Unsupported(_refusal(path, value, idle[name]), path)
    return fields


def _is_among(value: object, harmless: Sequence[object]) -> bool:
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in harmless)


def _refusal(field: str, value: object, harmless: Sequence[object]) -> str:
    shown = _encode(value).decode()
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    instead = "".join(f" or {_encode(one).decode()}" for one in harmless)
    return f"{field} = {shown} is not supported by this server; leave it out, or send null{instead}"


def _parse_message(raw: dict[str, object], where: str) -> Message:
    message = convert(_supported(raw, IDLE_IN_MESSAGES, where), _Message, where)
    role = _ROLES.get(message.role)
    if role is None:
        raise Unsupported(
            f"{where}.role = {message.role[:40]!r}; this server takes {', '.join(_ROLES)}", f"{where}.role"
        )
    if message.content is None and not message.tool_calls:
        raise BadRequest(f"{where}.content: this field is required", f"{where}.content")
    content = message.content
    if isinstance(content, list):
        content = "\n".join([_parse_part(part, f"{where}.content[{i}]") for i, part in enumerate(content)])
    told = {
        **{"role": role, "content": content or "", "name": message.name, "tool_calls": message.tool_calls},
        **{"tool_call_id": message.tool_call_id, "reasoning_content": message.reasoning_content or message.reasoning},
    }
    return for_template({name: value for name, value in told.items() if value is not None}, where)


def _parse_part(raw: dict[str, object], where: str) -> str:
    kind = raw.get("type", "text")
    if isinstance(kind, str) and kind != "text":
        raise Unsupported(f"{where}.type = {kind[:40]!r}; this server takes text only", f"{where}.type")
    return convert(raw, _TextPart, where).text


def _parse_prompts(prompt: str | list[object]) -> tuple[Prompt, ...]:
    """A text, token ids, or a list of texts or of token ids."""
    if isinstance(prompt, str):
        return (prompt,)
    first = prompt[0]
    if isinstance(first, str | list) and len(prompt) > MOST_CHOICES:
        raise BadRequest(f"prompt: there are {len(prompt)}; the most is {MOST_CHOICES}", "prompt")
    if isinstance(first, str):
        return tuple(convert(prompt, list[Annotated[str, Meta(min_length=1)]], "prompt"))
    if isinstance(first, list):
        return tuple(convert(prompt, list[Annotated[list[_TokenId], Meta(min_length=1)]], "prompt"))
    return (convert(prompt, list[_TokenId], "prompt"),)


def _ask(fields: Body, logprobs: int | None) -> Ask:
    if fields.stream_options is not None and not fields.stream:
        raise BadRequest("stream_options needs stream: true", "stream_options")
    if fields.prompt_logprobs is not None and fields.stream:
        raise BadRequest("prompt_logprobs are told with a whole answer: leave stream out", "prompt_logprobs")
    if (chars := sum(map(len, fields.bad_words or ()))) > BAD_CHARS:
        raise BadRequest(f"bad_words: they have {chars} characters in all; the most is {BAD_CHARS}", "bad_words")
    stop = fields.stop
    n = fields.n or 1
    asked = find_guide({name: value for name in FIELDS if (value := getattr(fields, name)) is not None})
    return Ask(
        model=fields.model,
        given=_given(fields, logprobs) | ({} if asked is None else {"guide": asked.guide}),
        seed=None if fields.seed is None else fields.seed & SEED_MASK,
        bad_words=tuple(fields.bad_words or ()),
        n=n,
        best_of=n,
        stop=(stop,) if isinstance(stop, str) else tuple(stop or ()),
        includes_stop=bool(fields.include_stop_str_in_output),
        shows_special=fields.skip_special_tokens is False,
        takes_last_tokens=fields.truncate_prompt_tokens,
        prompt_logprobs=fields.prompt_logprobs,
        shows_token_ids=bool(fields.return_token_ids),
        names_tokens_by_id=bool(fields.return_tokens_as_token_ids),
        is_stream=bool(fields.stream),
        wants_usage=fields.stream_options is not None and bool(fields.stream_options.include_usage),
        wants_timeline=fields.penstock is not None and bool(fields.penstock.timeline),
        priority=fields.priority or 0,
        session=(fields.prompt_cache_key or "")[:SESSION_CHARS],
        salt=fields.cache_salt or "",
        needs=_needs(fields, logprobs) + (() if asked is None else (("guide", asked.field),)),
    )


_SAMPLED_AS_GIVEN = (
    *("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens"),
    *("ignore_eos", "prompt_logprobs"),
)


def _given(fields: Body, logprobs: int | None) -> dict[str, object]:
    """The fields of `Sampling` that the client names."""
    given = {name: value for name in _SAMPLED_AS_GIVEN if (value := getattr(fields, name)) is not None}
    if fields.top_k is not None:
        given["top_k"] = max(0, fields.top_k)  # -1 and 0 both keep all tokens
    if fields.stop_token_ids:
        given["stop_token_ids"] = tuple(fields.stop_token_ids)
    if fields.logit_bias:
        given["logit_bias"] = tuple((_biased(token), bias) for token, bias in fields.logit_bias.items())
    if logprobs is not None:
        given["logprobs"] = logprobs
    return given


def _biased(token: str) -> int:
    if not (token.isascii() and token.isdigit() and len(token) < 10):
        raise BadRequest(f"logit_bias: {token[:40]!r} is no token id", "logit_bias")
    return int(token)


def _needs_of_completion(fields: CompletionBody, has_best: bool) -> Iterator[tuple[str, str]]:
    if fields.echo and fields.logprobs is not None:
        yield "prompt_logprobs", "echo"
    if has_best:
        yield "logprobs", "best_of"


def _needs(fields: Body, logprobs: int | None) -> tuple[tuple[str, str], ...]:
    """What the client asked for that not every engine has. A default is not a wish."""
    wishes = (
        ("sampling", "temperature", bool(fields.temperature)),
        ("sampling", "top_p", (fields.top_p or 1) < 1),
        ("sampling", "top_k", (fields.top_k or 0) > 0),
        ("sampling", "min_p", bool(fields.min_p)),
        ("penalties", "repetition_penalty", (fields.repetition_penalty or 1) != 1),
        ("penalties", "presence_penalty", bool(fields.presence_penalty)),
        ("penalties", "frequency_penalty", bool(fields.frequency_penalty)),
        ("penalties", "logit_bias", bool(fields.logit_bias)),
        ("penalties", "bad_words", bool(fields.bad_words)),
        ("logprobs", "logprobs", logprobs is not None),
        ("prompt_logprobs", "prompt_logprobs", fields.prompt_logprobs is not None),
    )
    return tuple((feature, name) for feature, name, is_wished in wishes if is_wished)
