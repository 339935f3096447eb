"""Every format: its own examples, however they are cut; and anything at all, of which nothing is lost or invented."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.serve.parsers import forced, harmony, hermes, llama3_json, mistral, think
from penstock.serve.parsers.api import Call, Content, Delta, Format, Parser, Reasoning, Said, ToolCallStart, Turn, total
from tests.serve.parsers.support import TRICKY, answers, cuts, deltas, said

TOOLS = ("f", "g", "get_weather")
OSLO = Call("get_weather", '{"city": "Oslo"}')


def named(formats: tuple[Format, ...], name: str) -> Callable[[Turn], Parser]:
    return next(each.make for each in formats if name in each.names)


MAKERS: dict[str, Callable[[Turn], Parser]] = {
    "hermes": named(hermes.PARSERS, "hermes"),
    "llama3_json": named(llama3_json.PARSERS, "llama3_json"),
    "mistral": named(mistral.PARSERS, "mistral"),
    "harmony": named(harmony.PARSERS, "openai"),
    "think": named(think.PARSERS, "qwen3"),
    "deepseek_r1": named(think.PARSERS, "deepseek_r1"),
    "granite": named(think.PARSERS, "granite"),
    "magistral": named(think.PARSERS, "mistral"),
    "required": forced.required,
    "named": lambda turn: forced.named("f"),
}
MARKERS = (
    *("<tool_call>", "</tool_call>", "<think>", "</think>", "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "<|python_tag|>"),
    *("[THINK]", "[/THINK]", "Here is my thought process:", "Here is my response:"),
    *("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "to=functions.f", "analysis", "final"),
)

# format, answer, what it says
EXAMPLES: list[tuple[str, str, Said]] = [
    ("hermes", "Hello <b>there</b>.\n", Said("Hello <b>there</b>.\n", "", ())),
    (
        "hermes",
        '\n\nI\'ll look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>\n',
        Said("\n\nI'll look.", "", (OSLO,)),
    ),
    ("hermes", '<tool_call>{"name": "get_weather", "arguments": {"city": "Oslo"}}', Said("", "", (OSLO,))),
    ("hermes", '<tool_call>{"arguments": {"city": "Oslo"}, "name": "get_weather"}</tool_call>', Said("", "", (OSLO,))),
    (
        "hermes",
        '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n<tool_call>\n{"id": ["x", {}], "name": "g"}\n'
        "</tool_call>\n\nDone.",
        Said("Done.", "", (Call("f", "{}"), Call("g", "{}"))),
    ),
    # The closing brace, the closing tag, or both are missing.
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call>!', Said("!", "", (Call("f", '{"a": 1}'),))),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}} ok', Said("ok", "", (Call("f", '{"a": 1}'),))),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": [1</tool_call>', Said("", "", (Call("f", '{"a": [1'),))),
    (
        "hermes",
        '<tool_call>{"n": -12.5, "ok": true, "s": "{", "name": "f", "arguments": {}}',
        Said("", "", (Call("f", "{}"),)),
    ),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": [}}', Said("}}", "", (Call("f", '{"a": ['),))),
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {}, "arguments": {"a": 1}}',
        Said(', "arguments": {"a": 1}}', "", (Call("f", "{}"),)),
    ),
    # What is no call.
    ("hermes", '<tool_call>{"x": , "name": "f"}', Said('<tool_call>{"x": , "name": "f"}', "", ())),
    ("hermes", '<tool_call>{"name": "f", "name": "g"}', Said('<tool_call>{"name": "f", "name": "g"}', "", ())),
    ("hermes", "Use <tool_call> and </tool_call>.", Said("Use <tool_call> and </tool_call>.", "", ())),
    ("hermes", '<tool_call>{"name": 3}</tool_call>', Said('<tool_call>{"name": 3}</tool_call>', "", ())),
    ("hermes", 'a <tool_call>\n{"name": "f", "arg', Said('a <tool_call>\n{"name": "f", "arg', "", ())),
    ("hermes", '<tool_call>{"name": "\\uD800"}', Said('<tool_call>{"name": "\\uD800"}', "", ())),
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": [1]}',
        Said('<tool_call>{"name": "f", "arguments": [1]}', "", ()),
    ),
    ("hermes", '<tool_call> <tool_call>{"name": "f"}', Said("<tool_call> ", "", (Call("f", "{}"),))),
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {}, "x": ?}</tool_call>',
        Said(', "x": ?}</tool_call>', "", (Call("f", "{}"),)),
    ),
    ("llama3_json", ' {"name": "get_weather", "parameters": {"city": "Oslo"}}', Said("", "", (OSLO,))),
    (
        "llama3_json",
        '<|python_tag|>{"type": "function", "name": "get_weather", "parameters": {"city": "Oslo"}}',
        Said("", "", (OSLO,)),
    ),
    (
        "llama3_json",
        '{"name": "f", "parameters": {"a": "};"}}; {"name": "g", "arguments": {}}\n',
        Said("", "", (Call("f", '{"a": "};"}'), Call("g", "{}"))),
    ),
    ("llama3_json", 'Sure: <|python_tag|>{"name": "f"};', Said("Sure:", "", (Call("f", "{}"),))),
    ("llama3_json", '{"name": "Bob", "parameters": {}}', Said('{"name": "Bob", "parameters": {}}', "", ())),
    ("llama3_json", '{"answer": [1, true, "x"]}', Said('{"answer": [1, true, "x"]}', "", ())),
    ("llama3_json", 'See {"name": "f", "parameters": {}}', Said('See {"name": "f", "parameters": {}}', "", ())),
    ("llama3_json", '{<|python_tag|>{"name": "f"}', Said("{", "", (Call("f", "{}"),))),
    ("llama3_json", '<|python_tag|>search.call("x")', Said('<|python_tag|>search.call("x")', "", ())),
    ("mistral", '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Oslo"}}]', Said("", "", (OSLO,))),
    (
        "mistral",
        'Ok.[TOOL_CALLS][{"name": "f", "arguments": {"a": "]"}}, {"arguments": {}, "name": "g"}] x',
        Said("Ok.x", "", (Call("f", '{"a": "]"}'), Call("g", "{}"))),
    ),
    (
        "mistral",
        '[TOOL_CALLS]get_weather[ARGS]{"city": "Oslo"}[TOOL_CALLS]g[CALL_ID]abcdefghi[ARGS]{}',
        Said("", "", (OSLO, Call("g", "{}"))),
    ),
    ("mistral", '[TOOL_CALLS]get_weather{"city": "Oslo"}', Said("", "", (OSLO,))),
    ("mistral", "a [TOOL_CALLS] b [ARGS] c", Said("a [TOOL_CALLS] b [ARGS] c", "", ())),
    ("mistral", "[TOOL_CALLS][]", Said("[TOOL_CALLS][]", "", ())),
    (
        "mistral",
        '[TOOL_CALLS][{"name": "f", "arguments": {}}, {"nam',
        Said(', {"nam', "", (Call("f", "{}"),)),
    ),
    (
        "harmony",
        "<|channel|>analysis<|message|>They ask for\nthe weather.<|end|><|start|>assistant<|channel|>commentary "
        'to=functions.get_weather <|constrain|>json<|message|>{"city": "Oslo"}<|call|>',
        Said("", "They ask for\nthe weather.", (OSLO,)),
    ),
    (
        "harmony",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>It <rains>.\n\nMuch.",
        Said("It <rains>.\n\nMuch.", "Hm.", ()),
    ),
    (
        "harmony",
        "<|channel|>commentary<|message|>I'll look.<|end|><|start|>assistant to=functions.f<|channel|>commentary json"
        "<|message|>{}<|call|><|start|>assistant<|channel|>commentary to=functions.g<|message|> {} <|call|>",
        Said("I'll look.", "", (Call("f", "{}"), Call("g", "{}"))),
    ),
    ("harmony", ' to=functions.f<|channel|>commentary<|message|>{"a": 1}', Said("", "", (Call("f", '{"a": 1}'),))),
    ("harmony", "<|channel|>analysis<|message|>a<|channel|>final<|message|>b", Said("b", "a", ())),
    ("harmony", "<|channel|>final<|message|>b<|start|>assistant<|chan", Said("b", "", ())),
    ("harmony", "<|start|>" + 300 * "x", Said("<|start|>" + 300 * "x", "", ())),
    ("harmony", "Just text, to=me.", Said("Just text, to=me.", "", ())),
    ("harmony", "<|channel|>x<|end|><|channel|>final<|message|>b", Said("<|channel|>x<|end|>b", "", ())),
    ("harmony", "<|channel|>x<|end|>y", Said("<|channel|>x<|end|>y", "", ())),
    (
        "harmony",
        "<|channel|>commentary to=functions.f<|message|>no JSON<|call|>",
        Said("<|channel|>commentary to=functions.f<|message|>no JSON", "", ()),
    ),
    ("think", "<think>\nHm.\n</think>\n\nIt rains. </think>", Said("It rains. </think>", "Hm.", ())),
    ("think", "\n<think>Hm", Said("", "Hm", ())),
    ("think", " It rains <think>really</think>\n", Said(" It rains <think>really</think>\n", "", ())),
    ("deepseek_r1", "Hm.\n</think>\nIt rains.", Said("It rains.", "Hm.", ())),
    ("deepseek_r1", "<think>Hm.</think>It rains.", Said("It rains.", "Hm.", ())),
    ("magistral", "[THINK]Hm.[/THINK]It [rains].", Said("It [rains].", "Hm.", ())),
    ("granite", "Here's my thought process: Hm.\nHere is my response:\nYes.", Said("Yes.", "Hm.", ())),
    (
        "required",
        '[{"name": "f", "parameters": {"a": [{}]}}, {"name": "g", "parameters": {}}]\n',
        Said("", "", (Call("f", '{"a": [{}]}'), Call("g", "{}"))),
    ),
    ("required", "I cannot.", Said("I cannot.", "", ())),
    ("required", '[{"name": "f", "parameters": {"a"', Said("", "", (Call("f", '{"a"'),))),
    ("named", ' {"a": "}"} ', Said("", "", (Call("f", '{"a": "}"}'),))),
    ("named", "I cannot.", Said("I cannot.", "", ())),
]

any_format = st.sampled_from(sorted(MAKERS))
turns = st.builds(Turn, tools=st.just(TOOLS), prompt=st.sampled_from(["", "<think>\n"]), is_parallel=st.booleans())


@pytest.mark.parametrize(("name", "answer", "meaning"), EXAMPLES)
def test_examples(name: str, answer: str, meaning: Said) -> None:
    assert said(MAKERS[name](Turn(TOOLS)), [answer]) == meaning
    assert said(MAKERS[name](Turn(TOOLS)), answer) == meaning  # character by character


@given(st.data(), any_format, answers(*MARKERS), turns)
def test_cuts_change_nothing(data: st.DataObject, name: str, answer: str, turn: Turn) -> None:
    whole = said(MAKERS[name](turn), [answer])
    assert said(MAKERS[name](turn), data.draw(cuts(answer))) == whole
    assert said(MAKERS[name](turn), answer) == whole


def shown(delta: Delta) -> str:
    return delta.name if isinstance(delta, ToolCallStart) else delta.text


@given(any_format, answers(*MARKERS), turns)
def test_nothing_is_invented(name: str, answer: str, turn: Turn) -> None:
    """What is said is found in the answer, in its order; "{}" stands for arguments that were left out."""
    found = deltas(MAKERS[name](turn), answer)
    left = iter(answer)
    assert all(char in left for delta in found if isinstance(delta, Content | Reasoning) for char in delta.text)
    for call in total(found).calls:
        assert call.arguments == "{}" or call.arguments in answer


@given(st.sampled_from(["hermes", "llama3_json", "mistral", "required", "named", "think"]), answers(*MARKERS))
def test_what_is_nothing_else_is_content_unchanged(name: str, answer: str) -> None:
    found = deltas(MAKERS[name](Turn(TOOLS)), answer)
    if all(isinstance(delta, Content) for delta in found) and not answer.lstrip(" \t\r\n").startswith("<think>"):
        assert "".join(map(shown, found)) == answer


texts = st.text(st.characters(codec="utf-8"), max_size=20)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
objects = st.dictionaries(texts, values, max_size=3)
arguments = st.builds(
    lambda value, as_ascii, indent: json.dumps(value, ensure_ascii=as_ascii, indent=indent),
    objects,
    st.booleans(),
    st.sampled_from([None, 2]),
)
calls = st.builds(Call, st.sampled_from(TOOLS), arguments | st.just(TRICKY))
WRITERS: dict[str, Callable[[list[Call]], str]] = {
    "hermes": lambda calls: "\n".join(
        f'<tool_call>\n{{"name": "{call.name}", "arguments": {call.arguments}}}\n</tool_call>' for call in calls
    ),
    "llama3_json": lambda calls: "; ".join(
        f'{{"name": "{call.name}", "parameters": {call.arguments}}}' for call in calls
    ),
    "mistral": lambda calls: "".join(f"[TOOL_CALLS]{call.name}[ARGS]{call.arguments}" for call in calls),
    "harmony": lambda calls: "<|start|>assistant".join(
        f"<|channel|>commentary to=functions.{call.name} <|constrain|>json<|message|>{call.arguments}<|call|>"
        for call in calls
    ),
    "required": lambda calls: (
        "[" + ", ".join(f'{{"name": "{call.name}", "parameters": {call.arguments}}}' for call in calls) + "]"
    ),
}


@given(st.data(), st.sampled_from(sorted(WRITERS)), st.lists(calls, min_size=1, max_size=3), st.booleans())
def test_calls_are_read_as_they_were_written(
    data: st.DataObject, name: str, written: list[Call], is_parallel: bool
) -> None:
    parser = MAKERS[name](Turn(TOOLS, is_parallel=is_parallel))
    answer = WRITERS[name](written)
    expected = written if is_parallel else written[:1]
    assert said(parser, data.draw(cuts(answer))) == Said("", "", tuple(expected))
