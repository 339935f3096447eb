"""What the output must look like, from the fields of a request. Pure; used by `asks`.

    response_format       OpenAI's: {"type": "text" | "json_object" | "json_schema", "json_schema": {...}}
    structured_outputs    vLLM's: one of json, regex, choice, grammar, json_object
    guided_json, guided_regex, guided_choice, guided_grammar    vLLM's, as they were before that

A guide that no engine could follow is refused here, before a worker is asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import msgspec

from penstock import grammar
from penstock.errors import BadRequest
from penstock.request import Guide
from penstock.serve.fields import convert

FIELDS = (
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
)

_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class Asked:
    """A guide, and the field that asked for it."""

    guide: Guide
    field: str


class _Schema(msgspec.Struct, forbid_unknown_fields=True):
    schema: dict[str, object]
    name: str | None = None  # this and the next two change nothing: every schema is kept to the letter
    description: str | None = None
    strict: bool | None = None


class _Format(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _Schema | None = None


class _Structured(msgspec.Struct, forbid_unknown_fields=True):
    """Of which one is given. A schema may come as JSON in a string."""

    json: str | dict[str, object] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class _Guided(msgspec.Struct):
    """The same under older names."""

    guided_json: str | dict[str, object] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    def structured(self) -> _Structured:
        return _Structured(self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar)


def find_guide(fields: Mapping[str, object]) -> Asked | None:
    """What a body's `FIELDS`, as decoded from JSON, ask for; None: free text. Others are ignored, null is not given.

    Raises BadRequest, which names the field, for two guides and for one that cannot be followed.
    """
    asked = [found for field in FIELDS if fields.get(field) is not None and (found := _parse(field, fields[field]))]
    if len(asked) > 1:
        raise BadRequest(f"{asked[0].field} and {asked[1].field} both guide the output; leave one out", asked[1].field)
    for one in asked:
        check(one.guide, one.field)
    return asked[0] if asked else None


def schema_guide(schema: Mapping[str, object]) -> Guide:
    """Of JSON that a schema describes, such as the arguments of a tool. To be checked by the caller."""
    return Guide("json_schema", _encode(schema).decode())


def check(guide: Guide, field: str) -> None:
    """Raises BadRequest, which names `field`, if no engine could follow the guide."""
    grammar.check(guide, field)


def _parse(field: str, value: object) -> Asked | None:
    match field:
        case "response_format":
            guide = _of_format(convert(value, _Format, field))
        case "structured_outputs":
            guide = _of_structured(convert(value, _Structured, field), field)
        case _:
            guide = _of_structured(convert({field: value}, _Guided, "").structured(), field)
    return None if guide is None else Asked(guide, field)


def _of_format(asked: _Format) -> Guide | None:
    if asked.type == "text":
        return None
    if asked.type == "json_object":
        return Guide("json_object")
    if asked.json_schema is None:
        raise BadRequest("response_format.json_schema: this field is required", "response_format.json_schema")
    return schema_guide(asked.json_schema.schema)


def _of_structured(asked: _Structured, field: str) -> Guide | None:
    guides: list[Guide] = []
    if asked.json is not None:
        guides.append(Guide("json_schema", asked.json) if isinstance(asked.json, str) else schema_guide(asked.json))
    if asked.regex is not None:
        guides.append(Guide("regex", asked.regex))
    if asked.choice is not None:
        guides.append(Guide("choice", _encode(asked.choice).decode()))
    if asked.grammar is not None:
        guides.append(Guide("grammar", asked.grammar))
    if asked.json_object:
        guides.append(Guide("json_object"))
    if len(guides) > 1:
        raise BadRequest(f"{field} takes one of json, regex, choice, grammar and json_object", field)
    return guides[0] if guides else None
