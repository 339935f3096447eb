"""Tools in OpenAI's chat: which a request offers, which the model must call, and calls as JSON. Pure.

Calls that are forced (tool_choice "required", or a tool's name) are met by guided decoding: `Tools.schema` says what
the engine must write, and `parsers.forced` reads it. Calls that the model is free to make its own parser finds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from penstock.errors import BadRequest, Unsupported
from penstock.serve.fields import convert
from penstock.serve.parsers.api import Call, ToolCallArguments, ToolCallStart

Schema = dict[str, object]  # JSON Schema

MAX_TOOLS = 128  # OpenAI's
MAX_TOOLS_BYTES = 1 << 19  # of all of them, as JSON: templates write it out
CALL_ID_CHARS = 9  # Mistral's templates take letters and digits, exactly so many; others take anything
_ID_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

_Name = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}\Z")]


class Tool(msgspec.Struct, frozen=True):
    """A function that the model may call."""

    name: str
    description: str
    parameters: Schema  # of an object

    def for_template(self) -> dict[str, object]:
        """As chat templates take it."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}


class Choice(msgspec.Struct, frozen=True):
    """Whether the model may call tools, must call some, or must call the one of this name."""

    mode: Literal["none", "auto", "required", "named"]
    name: str = ""


_CHOICES = {"none": Choice("none"), "auto": Choice("auto"), "required": Choice("required")}


class Tools(msgspec.Struct, frozen=True):
    """The tools of one request. `is_parallel`: an answer may have several calls."""

    offered: tuple[Tool, ...] = ()
    choice: Choice = _CHOICES["none"]
    is_parallel: bool = True

    @property
    def callable_names(self) -> tuple[str, ...]:
        """What parsers take for calls: nothing where none may be made."""
        return () if self.choice.mode == "none" else tuple(tool.name for tool in self.offered)

    def schema(self) -> Schema | None:
        """What the whole answer must follow; None where the model is free."""
        if self.choice.mode == "named":
            return next(tool.parameters for tool in self.offered if tool.name == self.choice.name)
        if self.choice.mode == "required":
            return _calls_schema(self.offered, self.is_parallel)
        return None


# Requests.


class _Function(msgspec.Struct, forbid_unknown_fields=True):
    name: _Name
    description: str | None = None
    parameters: dict[str, object] | None = None
    strict: bool | None = None  # changes nothing: calls that are forced follow their schema, others need not


class _Tool(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["function"]
    function: _Function


class _ChosenFunction(msgspec.Struct, forbid_unknown_fields=True):
    name: str


class _Choice(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["function"]
    function: _ChosenFunction


def parse_tools(
    tools: Sequence[object] | None, tool_choice: object = None, parallel_tool_calls: bool | None = None
) -> Tools:
    """Of a request's three fields of these names, null where they were not given. Raises BadRequest or Unsupported."""
    offered = _parse_offered(tools or ())
    choice = _parse_choice(tool_choice, offered)
    return Tools(offered, choice, parallel_tool_calls is not False)


def _parse_offered(raw: Sequence[object]) -> tuple[Tool, ...]:
    if len(raw) > MAX_TOOLS:
        raise BadRequest(f"tools has {len(raw)} tools; the most is {MAX_TOOLS}", "tools")
    if (size := len(msgspec.json.encode(raw))) > MAX_TOOLS_BYTES:
        raise BadRequest(f"tools has {size} bytes; the most is {MAX_TOOLS_BYTES}", "tools")
    offered = tuple(_parse_tool(tool, f"tools[{i}]") for i, tool in enumerate(raw))
    names: list[str] = []
    for i, tool in enumerate(offered):
        if tool.name in names:
            path = f"tools[{i}].function.name"
            raise BadRequest(f"{path}: {tool.name!r} is also the name of tools[{names.index(tool.name)}]", path)
        names.append(tool.name)
    return offered


def _parse_tool(raw: object, where: str) -> Tool:
    _refuse_other_types(raw, where)
    function = convert(raw, _Tool, where).function
    parameters = function.parameters or {}
    kind = parameters.get("type", "object")
    if kind != "object":
        path = f"{where}.function.parameters.type"
        raise BadRequest(f"{path}: arguments are an object, so this must be 'object'", path)
    schema = {"type": "object", "properties": {}} | parameters
    return Tool(function.name, function.description or "", schema)


def _parse_choice(raw: object, offered: Sequence[Tool]) -> Choice:
    """By default the model is free to call what there is."""
    choice = _read_choice(raw)
    if not offered:
        if choice.mode in ("required", "named"):
            raise BadRequest("tool_choice asks for a call, and tools is missing", "tool_choice")
        return _CHOICES["none"]
    if choice.mode == "named" and choice.name not in [tool.name for tool in offered]:
        path = "tool_choice.function.name"
        raise BadRequest(f"{path}: none of tools has the name {choice.name[:80]!r}", path)
    return choice


def _read_choice(raw: object) -> Choice:
    if raw is None:
        return _CHOICES["auto"]
    if isinstance(raw, str):
        if raw not in _CHOICES:
            taken = f"{', '.join(_CHOICES)}, or an object that names a tool"
            raise BadRequest(f"tool_choice = {raw[:40]!r}; it takes {taken}", "tool_choice")
        return _CHOICES[raw]
    _refuse_other_types(raw, "tool_choice")
    return Choice("named", convert(raw, _Choice, "tool_choice").function.name)


def _refuse_other_types(raw: object, where: str) -> None:
    """OpenAI has tools of its own, and ways to choose, that no open model was made for."""
    kind = raw.get("type") if isinstance(raw, dict) else None
    if isinstance(kind, str) and kind != "function":
        path = f"{where}.type"
        raise Unsupported(f"{path} = {kind[:40]!r} is not supported by this server; it takes 'function'", path)


# What guided decoding must follow.


def _calls_schema(offered: Sequence[Tool], is_parallel: bool) -> Schema:
    """Of an array of calls, see `parsers.forced`."""
    calls = {
        "type": "array",
        "minItems": 1,
        "items": {"anyOf": [_call_schema(tool) for tool in offered]},
        "$defs": {tool.name: _moved(tool.parameters, f"#/$defs/{tool.name}") for tool in offered},
    }
    return calls if is_parallel else calls | {"maxItems": 1}


def _call_schema(tool: Tool) -> Schema:
    return {
        "type": "object",
        "properties": {"name": {"enum": [tool.name]}, "parameters": {"$ref": f"#/$defs/{tool.name}"}},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


def _moved(schema: object, to: str) -> object:
    """A schema that stood alone, as it must be written where it is part of another: its references point there."""
    if isinstance(schema, list):
        return [_moved(each, to) for each in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {name: _moved(each, to) for name, each in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = to + reference.removeprefix("#")
    return moved


# Messages that a client sends back.


class _PastFunction(msgspec.Struct):
    name: str
    arguments: str | dict[str, object] | None = None


class _PastCall(msgspec.Struct):
    id: str
    function: _PastFunction
    type: Literal["function"] = "function"


def for_template(message: Mapping[str, object], where: str) -> dict[str, object]:
    """A message with its calls checked and complete, as `chat_template` takes it; `where` is its path in the request.

    Arguments stay as they were sent, JSON or not: a client sends back what a model wrote. Raises BadRequest for calls
    that are none, for calls that no assistant made, and for a tool's answer that does not say to which call.
    """
    if message.get("role") == "tool" and not isinstance(message.get("tool_call_id"), str):
        path = f"{where}.tool_call_id"
        raise BadRequest(f"{path}: the answer of a tool needs the id of the call that it answers", path)
    found = {name: value for name, value in message.items() if name != "tool_calls"}
    if not message.get("tool_calls"):
        return found
    path = f"{where}.tool_calls"
    if message.get("role") != "assistant":
        raise BadRequest(f"{path}: only the assistant calls tools", path)
    calls = [_past_call(call) for call in convert(message["tool_calls"], list[_PastCall], path)]
    return found | {"content": message.get("content") or "", "tool_calls": calls}


def _past_call(call: _PastCall) -> dict[str, object]:
    function = {"name": call.function.name, "arguments": call.function.arguments or "{}"}
    return {"id": call.id, "type": "function", "function": function}


# Answers.


def call_id(answer_id: str, choice: int, index: int) -> str:
    """The id of a call: the same in every piece of a stream, and nobody else's, as far as `answer_id` is not."""
    number = int.from_bytes(blake2b(f"{answer_id}/{choice}/{index}".encode(), digest_size=16).digest())
    chars = []
    for _ in range(CALL_ID_CHARS):
        number, char = divmod(number, len(_ID_ALPHABET))
        chars.append(_ID_ALPHABET[char])
    return "".join(chars)


def call_fields(call: Call, id: str) -> dict[str, object]:
    """A call as an entry of a message's `tool_calls`."""
    return {"id": id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def call_delta_fields(delta: ToolCallStart | ToolCallArguments, id: str) -> dict[str, object]:
    """A piece of a call as an entry of a delta's `tool_calls`: its id and name come first, then only arguments."""
    if isinstance(delta, ToolCallArguments):
        return {"index": delta.index, "function": {"arguments": delta.text}}
    return {"index": delta.index} | call_fields(Call(delta.name, ""), id)
