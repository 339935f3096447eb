"""Guides from the fields of requests: OpenAI's and both of vLLM's ways."""

from __future__ import annotations

import json
from typing import Any

import pytest

from penstock.errors import BadRequest
from penstock.request import Guide
from penstock.serve.guides import Asked, check, find_guide, schema_guide

SCHEMA: dict[str, Any] = {"type": "object", "properties": {"é": {"type": "integer"}}, "required": ["é"]}


def schema_format(**fields: object) -> dict[str, object]:
    return {"response_format": {"type": "json_schema", "json_schema": fields}}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 1, "guided_json": None},
        {"response_format": None},
        {"response_format": {"type": "text"}},
        {"structured_outputs": {}},
        {"structured_outputs": {"json": None, "json_object": False}},
    ],
)
def test_no_guide(fields: dict[str, object]) -> None:
    assert find_guide(fields) is None


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        (schema_format(name="x", schema=SCHEMA), "json_schema"),
        (schema_format(schema=SCHEMA, strict=True, description="d"), "json_schema"),
        ({"structured_outputs": {"json": SCHEMA}}, "json_schema"),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, "json_schema"),
        ({"guided_json": SCHEMA, "response_format": {"type": "text"}}, "json_schema"),
        ({"guided_json": json.dumps(SCHEMA)}, "json_schema"),
        ({"response_format": {"type": "json_object"}}, "json_object"),
        ({"structured_outputs": {"json_object": True}}, "json_object"),
        ({"structured_outputs": {"regex": "a+"}}, "regex"),
        ({"guided_regex": "a+"}, "regex"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "choice"),
        ({"guided_choice": ["a", "b"]}, "choice"),
        ({"structured_outputs": {"grammar": 'root ::= "a"'}}, "grammar"),
        ({"guided_grammar": 'root ::= "a"'}, "grammar"),
    ],
)
def test_every_way_to_ask(fields: dict[str, object], kind: str) -> None:
    asked = find_guide(fields)
    texts = {"json_schema": SCHEMA, "choice": ["a", "b"], "regex": "a+", "grammar": 'root ::= "a"', "json_object": ""}
    assert asked is not None and asked.guide.kind == kind and asked.field in fields
    text = asked.guide.text
    assert (json.loads(text) if kind in ("json_schema", "choice") else text) == texts[kind]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (schema_format(name="x"), "response_format.json_schema.schema"),
        (schema_format(schema="{}"), "response_format.json_schema.schema"),
        (schema_format(schema=SCHEMA, surprise=1), "response_format.json_schema.surprise"),
        (schema_format(schema={"type": "strin"}), "response_format"),
        ({"structured_outputs": {"json": SCHEMA, "regex": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
        ({"guided_regex": 5}, "guided_regex"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_grammar": "no"}, "guided_grammar"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
    ],
)
def test_what_is_refused_names_its_field(fields: dict[str, object], param: str) -> None:
    with pytest.raises(BadRequest, match=param.split(".")[0]) as caught:
        find_guide(fields)
    assert caught.value.param == param


def test_schemas_of_tools() -> None:
    guide = schema_guide(SCHEMA)
    check(guide, "tools[0].function.parameters")
    assert find_guide({"guided_json": SCHEMA}) == Asked(guide, "guided_json")
    with pytest.raises(BadRequest, match=r"tools\[1\]"):
        check(Guide("json_schema", "[]"), "tools[1].function.parameters")
