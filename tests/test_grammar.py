"""What passes for a guide, and what is refused before it costs anybody anything."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLTokenizer

from penstock.errors import BadRequest
from penstock.grammar import MOST_CHARS, MOST_PROPERTIES, check, compile_guide
from penstock.request import Guide

BYTES = LLTokenizer("byte")

Kind = Literal["json_schema", "json_object", "regex", "choice", "grammar"]


def schema(value: object) -> Guide:
    return Guide("json_schema", json.dumps(value))


def properties(count: int, prefix: str = "p") -> dict[str, object]:
    return {"type": "object", "properties": {f"{prefix}{i}": True for i in range(count)}}


def accepts(guide: Guide, text: str) -> bool:
    """Whether the guide allows `text`, and its end there."""
    matcher = compile_guide(guide, BYTES)
    return all(matcher.consume_token(byte) for byte in text.encode()) and matcher.is_accepting()


GOOD = {
    "a schema as pydantic writes it": schema(
        {
            "$defs": {"Unit": {"enum": ["C", "F"], "title": "Unit", "type": "string"}},
            "title": "Weather",
            "type": "object",
            "properties": {
                "place": {"title": "Place", "type": "string", "minLength": 1},
                "unit": {"anyOf": [{"$ref": "#/$defs/Unit"}, {"type": "null"}], "default": None},
                "days": {"type": "array", "items": {"type": "string", "format": "date"}, "maxItems": 7},
                "rain": {"type": "number", "exclusiveMinimum": 0},
            },
            "required": ["place"],
        }
    ),
    "recursive": schema({"$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}}}, "$ref": "#/$defs/n"}),
    "wide": schema(properties(MOST_PROPERTIES)),
    "with hints": schema({"type": "object", "x-guidance": {"whitespace_flexible": False}}),
    "any object": Guide("json_object"),
    "expression": Guide("regex", r"^(\+\d{1,3} )?[0-9-]{4,12}$"),
    "nothing": Guide("regex", ""),
    "slow to backtrack": Guide("regex", "(x+x+)+y"),
    "choices": Guide("choice", '["a", "b/c", "\\"é\\n"]'),
    "GBNF": Guide("grammar", 'root ::= "a" root "b" | [0-9]+'),
    "Lark": Guide("grammar", '?start: "a" start | NUMBER\nNUMBER: /[0-9]+/'),
    "special words in quotes": Guide("grammar", 'start: "<|end|>"'),
}
BAD = {
    "no JSON": Guide("json_schema", "{"),
    "no object": schema([]),
    "a misspelt type": schema({"type": "strin"}),
    "what cannot be followed": schema({"type": "array", "uniqueItems": True}),
    "an unknown format": schema({"type": "string", "format": "colour"}),
    "a contradiction": schema({"allOf": [{"type": "string"}, {"type": "integer"}]}),
    "a reference to nowhere": schema({"$ref": "#/$defs/none"}),
    "a reference to elsewhere": schema({"$ref": "https://example.org/schema"}),
    "a reference to itself": schema({"$ref": "#"}),
    "an open bracket": Guide("regex", "(a|"),
    "look-ahead": Guide("regex", "a(?=b)b"),
    "a back reference": Guide("regex", r"(a)\1"),
    "an expression without matches": Guide("regex", r"[^\s\S]"),
    "no choices": Guide("choice", "[]"),
    "an empty choice": Guide("choice", '["a", ""]'),
    "choices that are no strings": Guide("choice", "[1]"),
    "GBNF without root": Guide("grammar", 'x ::= "a"'),
    "Lark without start": Guide("grammar", 'x: "a"'),
    "special tokens": Guide("grammar", 'start: <|end|> "x"'),
    "endless": Guide("grammar", "start: start"),
}
HOSTILE = {
    "a large schema": schema({"enum": ["x" * 100] * 1000}),
    "a deep schema": Guide("json_schema", '{"items":' * 3000 + "{}" + "}" * 3000),
    "a deep array": Guide("json_schema", "[" * 60_000),
    "many properties": schema(properties(MOST_PROPERTIES + 1)),
    "many properties merged": schema({"allOf": [properties(100, str(i)) for i in range(6)]}),
    "a product of alternatives": schema(
        {
            "$defs": {f"d{i}": properties(50, f"q{i}") for i in range(10)},
            "allOf": [{"anyOf": [{"$ref": f"#/$defs/d{i}"} for i in range(10)]}] * 3,
        }
    ),
    "a long expression": Guide("regex", "a" * 10_000),
    "10 MB of choices": Guide("choice", json.dumps(["x" * 1000] * 10_000)),
    "a deep grammar": Guide("grammar", "root ::= " + "(" * 4000 + '"a"' + ")" * 4000),
    "a long grammar": Guide("grammar", "start: " + '"a" ' * 3000),
}
# Fine as far as it can be seen without a model's tokens: the worker refuses them when they cost too much.
COSTLY = {
    "nested repetition": Guide("regex", "((a{100}){100}){100}"),
    "a million items": schema({"type": "array", "items": {"type": "string"}, "minItems": 1_000_000}),
    "ambiguous": Guide("grammar", 'start: s\ns: s s s | s s | "a" | '),
    "a grammar of nothing much": Guide(
        "grammar", "start: r0\n" + "".join(f"r{i}: r{i + 1} r{i + 1} | \n" for i in range(400)) + 'r400: "z"'
    ),
    "a rule of options": Guide("grammar", "start: " + " ".join(["/[a-z]?/"] * 800)),
}


@pytest.mark.parametrize("name", GOOD)
def test_guides_pass(name: str) -> None:
    check(GOOD[name], "field")


@pytest.mark.parametrize("name", BAD)
def test_what_no_engine_can_follow_is_refused_and_the_field_named(name: str) -> None:
    with pytest.raises(BadRequest, match=r"^guided_x: ") as caught:
        check(BAD[name], "guided_x")
    assert caught.value.param == "guided_x"
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("name", HOSTILE)
def test_what_would_cost_too_much_is_refused(name: str) -> None:
    with pytest.raises(BadRequest):
        check(HOSTILE[name], "field")


@pytest.mark.parametrize("name", COSTLY)
def test_guides_that_cost_too_much_later_are_bounded_until_then(name: str) -> None:
    """Followed for a while they either go on or fail; the limits count work, so this test would not end otherwise."""
    check(COSTLY[name], "field")
    matcher = compile_guide(COSTLY[name], BYTES)
    for _ in range(300):
        mask = matcher.compute_bitmask()
        if matcher.is_error():
            break
        matcher.consume_token(next(byte for byte in range(256) if mask[byte // 8] >> byte % 8 & 1))


def test_every_kind_has_a_limit() -> None:
    kinds: tuple[Kind, ...] = ("json_schema", "regex", "choice", "grammar")
    for kind in kinds:
        with pytest.raises(BadRequest, match=f"{MOST_CHARS[kind]} characters at most"):
            check(Guide(kind, "x" * (MOST_CHARS[kind] + 1)), "field")


@settings(deadline=None)
@given(
    kind=st.sampled_from(["json_schema", "regex", "choice", "grammar"]),
    text=st.text(max_size=20) | st.text('ab()[]{}|*+?\\^$.,-:="/<>#%\n', max_size=20).map("start: {}".format),
)
def test_whatever_a_client_sends_passes_or_is_refused(kind: Kind, text: str) -> None:
    guide = Guide(kind, text)
    try:
        check(guide, "field")
    except BadRequest as error:
        assert error.param == "field"
    else:
        assert not compile_guide(guide, BYTES).is_error()


@settings(deadline=None)
@given(st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=5), st.text(max_size=6))
def test_choices_are_taken_literally(choices: list[str], other: str) -> None:
    guide = Guide("choice", json.dumps(choices))
    assert all(accepts(guide, choice) for choice in choices)
    assert accepts(guide, other) == (other in choices)


@pytest.mark.parametrize(
    ("expression", "text", "is_match"),
    [
        (r"\d", "5", True),
        (r"\d", "५", False),
        (r"\w+", "a_9", True),
        (r"\w+", "é", False),
        ("a/b", "a/b", True),
        ("a\nb", "a\nb", True),
        (".", "\n", False),
        ("^a|b$", "a", True),
        ("a", "ba", False),
        ("(?i)ab", "aB", True),
        ("é+", "éé", True),
    ],
)
def test_expressions_match_the_whole_output_and_mean_ascii(expression: str, text: str, is_match: bool) -> None:
    assert accepts(Guide("regex", expression), text) == is_match


def test_whitespace_in_json_is_free_but_not_endless() -> None:
    assert accepts(Guide("json_object"), '{\n    "a": [1,\n\t2]\n}')
    assert not accepts(Guide("json_object"), '{"a":\n\n\n1}')
    assert not accepts(Guide("json_object"), '{"a":     1}')
    spaced = schema({"type": "object", "x-guidance": {"whitespace_pattern": " +"}})
    assert accepts(spaced, '{"a":     1}')


def test_a_frontend_checks_guides_without_torch() -> None:
    code = (
        "import sys; from penstock.grammar import check; from penstock.request import Guide;"
        "assert 'llguidance' not in sys.modules; check(Guide('json_object'), 'f');"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
