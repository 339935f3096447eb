"""Tools of a request, what guided decoding must follow, and calls as JSON."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import BadRequest, Unsupported
from penstock.serve.chat_template import Chat, ChatTemplate
from penstock.serve.parsers.api import Call, ToolCallArguments, ToolCallStart
from penstock.serve.tools import (
    CALL_ID_CHARS,
    Choice,
    Tools,
    call_delta_fields,
    call_fields,
    call_id,
    for_template,
    parse_tools,
)

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def tool(name: str = "f", **fields: object) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name} | fields}


def test_tools_are_parsed() -> None:
    parsed = parse_tools([tool("get_weather", description="Now", parameters=CITY, strict=True), tool("f")])
    assert [(each.name, each.description) for each in parsed.offered] == [("get_weather", "Now"), ("f", "")]
    assert parsed.offered[0].parameters == CITY
    assert parsed.offered[1].parameters == {"type": "object", "properties": {}}
    assert parsed.choice == Choice("auto") and parsed.is_parallel
    assert parsed.callable_names == ("get_weather", "f")


def test_templates_get_tools_as_openai_writes_them() -> None:
    parsed = parse_tools([tool("f", parameters=CITY, strict=None)])
    assert [each.for_template() for each in parsed.offered] == [tool("f", description="", parameters=CITY)]


@pytest.mark.parametrize(
    ("tools", "param"),
    [
        ([3], "tools[0]"),
        ([tool(), {"type": "function"}], "tools[1].function"),
        ([{"function": {"name": "f"}}], "tools[0].type"),
        ([tool("")], "tools[0].function.name"),
        ([tool("a b")], "tools[0].function.name"),
        ([tool("f\n")], "tools[0].function.name"),
        ([tool("x" * 65)], "tools[0].function.name"),
        ([tool("f"), tool("g"), tool("f")], "tools[2].function.name"),
        ([tool(parameters=[])], "tools[0].function.parameters"),
        ([tool(parameters={"type": "array"})], "tools[0].function.parameters.type"),
        ([tool(parameter={})], "tools[0].function.parameter"),
        ([tool(strict="yes")], "tools[0].function.strict"),
        ([tool(f"f{i}") for i in range(129)], "tools"),
    ],
)
def test_bad_tools_are_refused_by_name(tools: list[object], param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        parse_tools(tools)
    assert refused.value.param == param
    assert str(refused.value).startswith(param)


@pytest.mark.parametrize(
    ("raw", "choice"),
    [
        (None, Choice("auto")),
        ("none", Choice("none")),
        ("auto", Choice("auto")),
        ("required", Choice("required")),
        ({"type": "function", "function": {"name": "f"}}, Choice("named", "f")),
    ],
)
def test_choices(raw: object, choice: Choice) -> None:
    assert parse_tools([tool("f")], raw).choice == choice


@pytest.mark.parametrize("raw", [None, "none", "auto"])
def test_without_tools_nothing_is_called(raw: object) -> None:
    for tools in (None, []):
        assert parse_tools(tools, raw) == Tools()


@pytest.mark.parametrize(
    ("tools", "raw", "param"),
    [
        ([tool()], "any", "tool_choice"),
        ([tool()], 3, "tool_choice"),
        ([tool()], {"type": "function"}, "tool_choice.function"),
        ([tool()], {"type": "function", "function": {"name": "g"}}, "tool_choice.function.name"),
        ([], "required", "tool_choice"),
        (None, {"type": "function", "function": {"name": "f"}}, "tool_choice"),
    ],
)
def test_bad_choices_are_refused_by_name(tools: list[object] | None, raw: object, param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        parse_tools(tools, raw)
    assert refused.value.param == param


def test_tools_of_other_types_are_not_supported() -> None:
    with pytest.raises(Unsupported, match=r"tools\[0\].type = 'custom' is not supported"):
        parse_tools([{"type": "custom", "custom": {"name": "f"}}])
    with pytest.raises(Unsupported, match=r"tool_choice.type = 'allowed_tools'"):
        parse_tools([tool()], {"type": "allowed_tools", "allowed_tools": {}})


def test_no_call_is_recognised_where_none_may_be_made() -> None:
    assert parse_tools([tool()], "none").callable_names == ()


@pytest.mark.parametrize("choice", ["none", "auto"])
def test_a_free_model_follows_no_schema(choice: str) -> None:
    assert parse_tools([tool(parameters=CITY)], choice).schema() is None


def test_a_named_tool_is_its_arguments() -> None:
    named = {"type": "function", "function": {"name": "f"}}
    assert parse_tools([tool("g"), tool("f", parameters=CITY)], named).schema() == CITY


def test_required_calls_are_an_array() -> None:
    tree = {
        "type": "object",
        "properties": {"root": {"$ref": "#/$defs/node"}, "all": {"$ref": "#"}, "web": {"$ref": "https://x/y"}},
        "$defs": {"node": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}},
    }
    tools = parse_tools([tool("f", parameters=CITY), tool("tree", parameters=tree)], "required")
    assert tools.schema() == {
        "type": "array",
        "minItems": 1,
        "items": {
            "anyOf": [
                {
                    "type": "object",
                    "properties": {"name": {"enum": [name]}, "parameters": {"$ref": f"#/$defs/{name}"}},
                    "required": ["name", "parameters"],
                    "additionalProperties": False,
                }
                for name in ("f", "tree")
            ]
        },
        "$defs": {
            "f": CITY,
            "tree": {
                "type": "object",
                "properties": {
                    "root": {"$ref": "#/$defs/tree/$defs/node"},
                    "all": {"$ref": "#/$defs/tree"},
                    "web": {"$ref": "https://x/y"},
                },
                "$defs": {"node": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/tree/$defs/node"}]}},
            },
        },
    }


def test_at_most_one_call() -> None:
    tools = parse_tools([tool()], "required", parallel_tool_calls=False)
    schema = tools.schema()
    assert not tools.is_parallel
    assert schema is not None and schema["maxItems"] == 1


def assistant(*calls: object, **fields: object) -> dict[str, object]:
    return {"role": "assistant", "content": None, "tool_calls": list(calls)} | fields


def past(arguments: object, **fields: object) -> dict[str, object]:
    return {"id": "a1", "type": "function", "function": {"name": "f", "arguments": arguments}} | fields


@pytest.mark.parametrize(
    ("arguments", "taken"),
    [('{"a": 1}', '{"a": 1}'), ("{no JSON", "{no JSON"), ("", "{}"), (None, "{}"), ({}, "{}"), ({"a": 1}, {"a": 1})],
)
def test_templates_get_calls_that_are_complete(arguments: object, taken: object) -> None:
    message = assistant(past(arguments, index=0), reasoning_content="Hm.")
    expected = assistant(past(taken), reasoning_content="Hm.", content="")
    assert for_template(message, "messages[1]") == expected
    assert message["content"] is None  # what the client sent stays as it is


def test_calls_reach_a_template_as_objects() -> None:
    template = ChatTemplate(
        "{% for tool in tools %}{{ tool.function.name }}: {{ tool | tojson }}\n{% endfor %}"
        "{% for message in messages %}{% for call in message.tool_calls or [] %}"
        "{{ call.id }} {{ call.function.name }} {{ call.function.arguments.city }}\n{% endfor %}"
        "{% if message.role == 'tool' %}{{ message.tool_call_id }} {{ message.content }}{% endif %}{% endfor %}",
        {},
    )
    answer = {"role": "tool", "content": "12 C", "tool_call_id": "a1"}
    messages = [for_template(message, "m") for message in (assistant(past('{"city": "Oslo"}')), answer)]
    tools = [each.for_template() for each in parse_tools([tool("f")]).offered]
    shown = '{"type": "function", "function": {"name": "f", "description": "", '
    shown += '"parameters": {"type": "object", "properties": {}}}}'
    assert template.render(Chat(messages, tools)) == f"f: {shown}\na1 f Oslo\na1 12 C"


def test_other_messages_are_left_alone() -> None:
    for message in (
        {"role": "user", "content": "Hi"},
        {"role": "tool", "content": "12 C", "tool_call_id": "a1"},
    ):
        assert for_template(message, "messages[0]") == message
    assert for_template({"role": "assistant", "content": "Hi", "tool_calls": []}, "m") == {
        "role": "assistant",
        "content": "Hi",
    }


@pytest.mark.parametrize(
    ("message", "param"),
    [
        (assistant(past("{}"), past(3)), "m.tool_calls[1].function.arguments"),
        (assistant({"id": "a", "function": {}}), "m.tool_calls[0].function.name"),
        (assistant(past("{}", type="custom")), "m.tool_calls[0].type"),
        (assistant("f"), "m.tool_calls[0]"),
        (assistant(tool_calls="f"), "m.tool_calls"),
        (assistant(past("{}"), role="user"), "m.tool_calls"),
        ({"role": "tool", "content": "12 C"}, "m.tool_call_id"),
    ],
)
def test_bad_messages_are_refused_by_name(message: dict[str, object], param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        for_template(message, "m")
    assert refused.value.param == param


@given(st.text(max_size=40), st.integers(0, 7), st.integers(0, 127))
def test_ids_are_what_every_template_takes(answer: str, choice: int, index: int) -> None:
    id = call_id(answer.encode(errors="replace").decode(), choice, index)
    assert len(id) == CALL_ID_CHARS and id.isascii() and id.isalnum()


def test_every_call_has_an_id_of_its_own() -> None:
    ids = {call_id(answer, choice, index) for answer in ("a", "b") for choice in range(8) for index in range(64)}
    assert len(ids) == 2 * 8 * 64
    assert call_id("a", 0, 1) == call_id("a", 0, 1)


def test_calls_as_json() -> None:
    assert call_fields(Call("f", '{"a": 1}'), "x") == {
        "id": "x",
        "type": "function",
        "function": {"name": "f", "arguments": '{"a": 1}'},
    }
    assert call_delta_fields(ToolCallStart(2, "f"), "x") == {
        "index": 2,
        "id": "x",
        "type": "function",
        "function": {"name": "f", "arguments": ""},
    }
    assert call_delta_fields(ToolCallArguments(2, '{"a'), "x") == {"index": 2, "function": {"arguments": '{"a'}}
