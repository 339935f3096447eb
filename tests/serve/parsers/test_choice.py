"""Which parsers read a model's answers: by its template, by name, and how they go together."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import SetupError
from penstock.serve.parsers.api import Call, Content, Deltas, Reasoning, Said, ToolCallArguments, ToolCallStart, Turn
from penstock.serve.parsers.choice import Formats, find, names, pick
from tests.serve.parsers.support import answers, cuts, deltas, said

# What matters of templates as published with the models.
QWEN25 = '<tools>... within <tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": ...}'
QWEN3 = QWEN25 + "{%- if '</think>' in message.content %}... '<|im_start|>assistant\\n<think>\\n'"
QWEN3_CODER = "<tool_call>\n<function=example_function_name>\n<parameter=example_parameter_1>"
GLM45 = "<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key> <think></think>"
LLAMA31 = '<|start_header_id|>... {"name": function name, "parameters": ...} \'<|python_tag|>\' + tool_call.name'
LLAMA32 = "<|start_header_id|>... '{\"name\": \"' + tool_call.name + '\", ' }}{{- '\"parameters\": '"
HERMES3 = '<|start_header_id|>... "parameters" ... <tool_call>\n{"name": \'" }}'
MISTRAL = "[AVAILABLE_TOOLS] [TOOL_CALLS] [/INST]"
MAGISTRAL = MISTRAL + "[THINK]...[/THINK]"
GPT_OSS = '<|start|>assistant<|channel|>analysis<|message|>" + message.thinking'
R1 = "{% if '</think>' in content %}... <|Assistant|><think>\\n"
GRANITE32 = "Write your thoughts after 'Here is my thought process:' and your response after 'Here is my response:'"


@pytest.mark.parametrize(
    ("model_type", "template", "calls", "reasoning"),
    [
        ("qwen2", QWEN25, "hermes", None),
        ("qwen3", QWEN3, "hermes", "think"),
        ("qwen3_moe", QWEN3_CODER, None, None),
        ("glm4_moe", GLM45, None, "think"),
        ("llama", LLAMA31, "llama3_json", None),
        ("llama", LLAMA32, "llama3_json", None),
        ("llama", HERMES3, "hermes", None),
        ("mistral", MISTRAL, "mistral", None),
        ("mistral", MAGISTRAL, "mistral", "mistral"),
        ("gpt_oss", "", "openai", "openai"),
        ("llama", GPT_OSS, "openai", "openai"),
        ("qwen2", R1, None, "think"),
        ("granite", GRANITE32, None, "granite"),
        ("gpt2", "", None, None),
    ],
)
def test_models_are_known_by_their_templates(
    model_type: str, template: str, calls: str | None, reasoning: str | None
) -> None:
    assert first_names(pick(model_type, template)) == (calls, reasoning)


@pytest.mark.parametrize("template", [QWEN3, LLAMA31, HERMES3, MAGISTRAL, GPT_OSS, R1, GRANITE32])
def test_no_two_formats_claim_a_template(template: str) -> None:
    for kind in ("calls", "reasoning"):
        claims = {each for name in names(kind) if (each := find(kind, name)) and each.fits("", template)}
        assert len(claims) <= 1


def first_names(formats: Formats) -> tuple[str | None, str | None]:
    calls, reasoning = (each and each.names[0] for each in (formats.calls, formats.reasoning))
    return calls, reasoning


@pytest.mark.parametrize(
    ("template", "calls", "reasoning", "expected"),
    [
        (QWEN3, "mistral", None, ("mistral", "think")),
        (QWEN3, None, "deepseek_r1", ("hermes", "deepseek_r1")),
        (QWEN3, "none", "none", (None, None)),
        (QWEN3, "openai", None, ("openai", "openai")),
        (QWEN3, None, "openai_gptoss", ("openai", "openai")),
        (GPT_OSS, "hermes", None, ("hermes", None)),
        (GPT_OSS, None, "qwen3", (None, "think")),
        (GPT_OSS, "openai", "openai_gptoss", ("openai", "openai")),
    ],
)
def test_names_go_before_templates(
    template: str, calls: str | None, reasoning: str | None, expected: tuple[str | None, str | None]
) -> None:
    assert first_names(pick("", template, calls, reasoning)) == expected


def test_a_format_that_reads_both_leaves_nothing_to_another() -> None:
    with pytest.raises(SetupError, match="--tool-parser openai reads calls and reasoning alike; leave --reasoning-p"):
        pick("gpt_oss", "", "openai", "qwen3")
    with pytest.raises(SetupError, match=r"--reasoning-parser openai_gptoss reads .* leave --tool-parser none out"):
        pick("gpt_oss", "", "none", "openai_gptoss")


def test_names_are_those_of_the_files() -> None:
    assert names("calls") == ["hermes", "llama3_json", "llama4_json", "mistral", "openai", "openai_gptoss"]
    assert {"deepseek_r1", "granite", "mistral", "qwen3", "openai_gptoss"} <= set(names("reasoning"))
    for kind in ("calls", "reasoning"):
        assert len(set(names(kind))) == len(names(kind))
        for name in names(kind):
            found = find(kind, name)
            assert found is not None and name in found.names and kind in found.reads


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(SetupError, match=r"--tool-parser 'hermes2' is unknown \(did you mean 'hermes'\?\): there is h"):
        pick("", "", "hermes2")


def test_special_tokens_to_keep() -> None:
    assert pick("qwen3", QWEN3).keeps() == ("<tool_call>", "</tool_call>", "<think>", "</think>")
    assert pick("gpt2", "").keeps() == ()
    assert len(pick("gpt_oss", "").keeps()) == 7


CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        ("...assistant\n", f"<think>\nHm. {CALL}\n</think>\n\nOk.\n{CALL}", ("Ok.", f"Hm. {CALL}", True)),
        ("...assistant\n<think>\n", f"Hm.\n</think>\n\n{CALL}", ("", "Hm.", True)),
        ("...assistant\n<think>\n\n</think>\n\n", f"Ok. </think>{CALL}", ("Ok. </think>", "", True)),
        ("<think>\n", "Hm", ("", "Hm", False)),
        ("...assistant\n", '<think>Hm</think>Ok <tool_call>{"na', ('Ok <tool_call>{"na', "Hm", False)),
    ],
)
def test_calls_are_found_after_reasoning(prompt: str, answer: str, expected: tuple[str, str, bool]) -> None:
    content, reasoning, has_call = expected
    parser = pick("qwen3", QWEN3).parser(Turn(("f",), prompt))
    calls = (Call("f", '{"a": 1}'),) if has_call else ()
    assert said(parser, answer) == Said(content, reasoning, calls)


def test_reasoning_is_not_closed_by_default_where_a_model_always_reasons() -> None:
    formats = pick("qwen2", R1, reasoning="deepseek_r1")
    assert said(formats.parser(Turn()), "Hm.</think>Ok.") == Said("Ok.", "Hm.", ())
    assert said(formats.parser(Turn(prompt="<think>\n</think>\n")), "Ok.") == Said("Ok.", "", ())


@pytest.mark.parametrize(
    ("template", "answer"), [(QWEN25, CALL), (LLAMA32, '{"name": "f", "parameters": {}}'), ("", " <tool_call>\n")]
)
def test_without_tools_nothing_is_a_call(template: str, answer: str) -> None:
    assert said(pick("", template).parser(Turn()), answer) == Said(answer, "", ())


def test_gpt_oss_without_tools_still_has_channels() -> None:
    answer = '<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=f<|message|>{"a": 1}'
    assert said(pick("gpt_oss", "").parser(Turn()), answer) == Said('{"a": 1}', "Hm.", ())


@given(st.data(), st.sampled_from([QWEN3, MAGISTRAL, GPT_OSS]), answers("<think>", "</think>", "<tool_call>"))
def test_cuts_change_nothing(data: st.DataObject, template: str, answer: str) -> None:
    formats, turn = pick("", template), Turn(("f",))
    assert said(formats.parser(turn), data.draw(cuts(answer))) == said(formats.parser(turn), [answer])


def pushes(pieces: list[str]) -> list[Deltas]:
    parser = pick("qwen3", QWEN3).parser(Turn(("f",)))
    return [[*parser.push(piece)] for piece in pieces]


def test_what_is_certain_is_not_held_back() -> None:
    reasoning = ["<think>", "Hm", ".\n", "</think>", "\n\n"]
    beginning = ["I look", "<b>", " <tool", '_call>{"name": "f"', ', "arguments":']
    assert pushes([*reasoning, *beginning, ' {"a": "x', "y\\", '""}', "}\n"]) == [
        [],
        [Reasoning("Hm")],
        [Reasoning(".")],
        [],
        [],
        [Content("I look")],
        [Content("<b>")],
        [],
        [],
        [],
        [ToolCallStart(0, "f"), ToolCallArguments(0, '{"a": "x')],
        [ToolCallArguments(0, "y\\")],
        [ToolCallArguments(0, '""}')],
        [],
    ]


def test_an_answer_is_complete_after_its_one_call() -> None:
    parser = pick("qwen3", QWEN3).parser(Turn(("f",), is_parallel=False))
    assert deltas(parser, [CALL, CALL]) == [ToolCallStart(0, "f"), ToolCallArguments(0, '{"a": 1}')]
    assert parser.is_complete


def test_an_answer_may_go_on_after_a_call() -> None:
    parser = pick("qwen3", QWEN3).parser(Turn(("f",)))
    parser.push(CALL)
    assert not parser.is_complete
