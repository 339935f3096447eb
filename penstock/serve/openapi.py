"""The API's description of itself, an OpenAPI 3.1 document. Pure; `frontend` serves it at /openapi.json.

Requests are described by the structs that parse them and pages by the structs they show, so a field that is added there
appears here by itself. Answers are written by hand in `openai`, for speed; the structs below say what a client may
count on in them, and tests hold the answers against them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import msgspec

from penstock import __version__
from penstock.request import FinishReason, Timeline
from penstock.serve import wishes
from penstock.serve.answer import Record
from penstock.serve.asks import SHAPES, ChatBody, CompletionBody
from penstock.serve.tokenize import DetokenizeBody, Detokenized, TokenizeBody, Tokenized

Json = dict[str, Any]
Scores = list[dict[str, object] | None]  # by position, then by token id
_REF = "#/components/schemas/{name}"


class Problem(msgspec.Struct):
    """What went wrong; `param` names the field, where there is one to name."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(msgspec.Struct):
    """The body of every answer that is not a 2xx, and the last event of a stream that failed."""

    error: Problem


class CachedTokens(msgspec.Struct):
    cached_tokens: int


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens | None


class Told(msgspec.Struct):
    """What happened to the request, if it asked for that."""

    timeline: Timeline


class CalledFunction(msgspec.Struct):
    name: str
    arguments: str  # JSON


class ToolCall(msgspec.Struct):
    id: str
    type: Literal["function"]
    function: CalledFunction


class FunctionPiece(msgspec.Struct):
    arguments: str  # more of them
    name: str | None = None


class ToolCallPiece(msgspec.Struct):
    """Of one call the first has its `id` and name."""

    index: int
    function: FunctionPiece
    id: str | None = None
    type: Literal["function"] | None = None


class Said(msgspec.Struct):
    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class Delta(msgspec.Struct):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallPiece] | None = None


class ChatChoice(msgspec.Struct):
    index: int
    message: Said
    logprobs: dict[str, object] | None
    finish_reason: FinishReason | Literal["tool_calls"]
    stop_reason: str | int | None
    token_ids: list[int] | None = None


class ChatEventChoice(msgspec.Struct):
    index: int
    delta: Delta
    logprobs: dict[str, object] | None = None
    finish_reason: FinishReason | Literal["tool_calls"] | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None


class TextChoice(msgspec.Struct):
    index: int
    text: str
    logprobs: dict[str, object] | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: Scores | None = None


class Heading(msgspec.Struct):
    """What every answer and every event begins with."""

    id: str
    created: int
    model: str


class ChatAnswer(Heading, kw_only=True):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: Scores | None = None
    penstock: Told | None = None


class ChatEvent(Heading, kw_only=True):
    """One token, or what is said before and after them."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatEventChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None
    penstock: Told | None = None


class TextAnswer(Heading, kw_only=True):
    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: Usage
    penstock: Told | None = None


class TextEvent(Heading, kw_only=True):
    """One token, or what is said after them."""

    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: Usage | None = None
    penstock: Told | None = None


class Model(msgspec.Struct):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class Models(msgspec.Struct):
    object: Literal["list"]
    data: list[Model]


class Status(msgspec.Struct):
    status: str


class Health(msgspec.Struct):
    """`workers` are their roles by name; those in `stalled` stand still in a step."""

    status: Literal["ready", "draining", "no worker"]
    version: str
    models: list[str]
    workers: dict[str, str]
    stalled: list[str]
    requests: int


class RecordHead(msgspec.Struct):
    """What tells one request from another in a list."""

    id: str
    model: str
    created: int
    state: str


class Records(msgspec.Struct):
    requests: list[RecordHead]


@dataclass(frozen=True, slots=True)
class Page:
    """What is at a path; a path that ends in / goes on with `parameter`. `shows` is a struct, or a type of content.

    `also` are statuses other than 200 under which it is shown.
    """

    summary: str
    shows: type[msgspec.Struct] | str
    parameter: str = ""
    also: tuple[int, ...] = ()
    body: type[msgspec.Struct] | None = None
    event: type[msgspec.Struct] | None = None

    @property
    def suffix(self) -> str:
        """What a described path has at its end."""
        return f"{{{self.parameter}}}" if self.parameter else ""


PAGES: dict[str, Page] = {
    "/": Page("What there is", "text/plain; charset=utf-8"),
    "/v1/models": Page("The models that workers serve now", Models),
    "/v1/models/": Page("One of them", Model, "model"),
    "/v1/completions": Page("Continue a text", TextAnswer, body=CompletionBody, event=TextEvent),
    "/v1/chat/completions": Page("Answer in a chat", ChatAnswer, body=ChatBody, event=ChatEvent),
    "/tokenize": Page("A prompt or a conversation in tokens", Tokenized, body=TokenizeBody),
    "/detokenize": Page("The text of tokens", Detokenized, body=DetokenizeBody),
    "/health": Page("How the server is, and who its workers are", Health, also=(503,)),
    "/live": Page("Whether this process lives", Status),
    "/ready": Page("Whether requests would be served", Status, also=(503,)),
    "/metrics": Page("What Prometheus scrapes", "text/plain; version=1.0.0; charset=utf-8"),
    "/debug/requests": Page("The last requests, the newest first", Records),
    "/debug/requests/": Page("What happened to a request, and why it was routed so", Record, "id"),
    "/openapi.json": Page("This document", "application/json"),
}

_IDLE = "Of OpenAI's API or its extensions, and not implemented: only what asks for nothing is taken."
_HEADERS = {
    wishes.REQUIRE: "Labels of the workers that may answer, as zone=a,rack=b",
    wishes.PREFER: "Labels of the workers that had better answer, the most important first",
    wishes.SESSION: "Requests of one session meet at one worker",
    wishes.TIMEOUT: "Seconds for the whole answer",
    wishes.TENANT: "Whose share of the server this uses",
    b"x-request-id": "A name for the request",
}


@cache
def body() -> bytes:
    """The document, in JSON."""
    return msgspec.json.encode(document())


def document() -> Json:
    schemas = _schemas()
    return {
        "openapi": "3.1.0",
        "info": {"title": "penstock", "version": __version__},
        "paths": {path + page.suffix: _path(page) for path, page in PAGES.items()},
        "components": {"schemas": schemas, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"key": []}],  # a server may have keys or none
    }


def _schemas() -> Json:
    """Of all structs, by name; those of requests with the fields that are taken and do nothing."""
    shown = [one for page in PAGES.values() for one in (page.shows, page.body, page.event)]
    shown = [one for one in shown if isinstance(one, type)]
    _, schemas = msgspec.json.schema_components([*SHAPES, *shown, Error], schema_hook=_anything, ref_template=_REF)
    for shape, idle in SHAPES.items():
        schemas[shape.__name__]["properties"] |= {name: _idle(values) for name, values in idle.items()}
    found: Json = _with_public_names(schemas)
    return found


def _anything(kind: type) -> Json:
    if kind is object:
        return {"description": "any JSON value"}
    raise NotImplementedError(f"no schema for {kind}")


def _idle(values: Sequence[object]) -> Json:
    return {"enum": [None, *values], "description": _IDLE}


def _with_public_names(schemas: Mapping[str, Any]) -> Any:
    """The same, where structs that are private to their module go by names without an underscore."""
    text = msgspec.json.encode({name.lstrip("_"): schema for name, schema in schemas.items()})
    for private, public in ((b'"#/components/schemas/_', b'"#/components/schemas/'), (b'"title":"_', b'"title":"')):
        text = text.replace(private, public)
    return msgspec.json.decode(text)


def _path(page: Page) -> Json:
    operation: Json = {"summary": page.summary, "responses": dict(_responses(page))}
    if page.parameter:
        operation["parameters"] = [_parameter(page.parameter, "path", "")]
    if page.body is None:
        return {"get": operation}
    if page.event is not None:
        operation["parameters"] = [_parameter(name.decode(), "header", text) for name, text in _HEADERS.items()]
    operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": _ref(page.body)}}}
    return {"post": operation}


def _parameter(name: str, where: Literal["path", "header"], description: str) -> Json:
    schema = {"type": "string", "minLength": 1} if where == "path" else {"type": "string"}
    parameter = {"name": name, "in": where, "required": where == "path", "schema": schema}
    return parameter | ({"description": description} if description else {})


def _responses(page: Page) -> Iterator[tuple[str, Json]]:
    shown = _content(page)
    yield "200", {"description": page.summary, "content": shown}
    for status in page.also:
        yield str(status), {"description": "The same, and not ready", "content": shown}
    refused = {"content": {"application/json": {"schema": _ref(Error)}}}
    yield "4XX", {"description": "The request is wrong, as the message says", **refused}
    yield "5XX", {"description": "The server could not; with Retry-After if it may soon", **refused}


def _content(page: Page) -> Json:
    if isinstance(page.shows, str):
        return {page.shows: {"schema": {} if page.shows == "application/json" else {"type": "string"}}}
    content = {"application/json": {"schema": _ref(page.shows)}}
    if page.event is not None:
        content["text/event-stream"] = {"schema": _event(page.event)}
    return content


def _event(shape: type[msgspec.Struct]) -> Json:
    """Of each event in a stream. The last is [DONE], or an Error."""
    told = [
        {"type": "string", "contentMediaType": "application/json", "contentSchema": _ref(one)} for one in (shape, Error)
    ]
    return {"type": "object", "properties": {"data": {"anyOf": [*told, {"const": "[DONE]"}]}}, "required": ["data"]}


def _ref(shape: type[msgspec.Struct]) -> Json:
    return {"$ref": _REF.format(name=shape.__name__.lstrip("_"))}
