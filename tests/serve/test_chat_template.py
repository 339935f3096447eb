"""Conversations become the text that transformers makes of them, with the features of published templates."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from penstock.errors import BadRequest, SetupError
from penstock.serve.chat_template import Chat, ChatTemplate, Message, load_template
from tests.serve.tokenizers_made import byte_level

TEMPLATES = sorted((Path(__file__).parents[1] / "data" / "templates").glob("*.jinja"))
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

SYSTEM = {"role": "system", "content": "Be brief.\n"}
USER = {"role": "user", "content": " What is <b>é</b> & 'q'? "}
ANSWER = {"role": "assistant", "content": "Well: ", "name": None, "tool_calls": None}
THOUGHT = {"role": "assistant", "content": "So.", "reasoning_content": "First, "}
TAGGED = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nSo. "}
ARGUMENTS = [{"city": "Zürich", "days": 2, "deep": {"a": [None, True]}}, {}]
CALLS = [
    {"id": f"abcdefgh{at}", "type": "function", "function": {"name": f"look_{at}", "arguments": arguments}}
    for at, arguments in enumerate(ARGUMENTS)
]
CALL = {"role": "assistant", "content": None, "tool_calls": CALLS[:1]}
TWO_CALLS = {"role": "assistant", "content": "Let me see.", "reasoning": "two, then", "tool_calls": CALLS}
RESULT = {"role": "tool", "tool_call_id": "abcdefgh0", "content": '{"warm": true}'}
PARTS = {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": " two"}]}
PROPERTIES = {
    "city": {"type": "string", "description": "where <it> is", "enum": ["Zürich", "Rome"]},
    "days": {"type": ["integer", "null"], "default": 3},
    "which": {"type": "array", "items": {"type": "number"}},
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": f"look_{at}",
            "description": "Looks it up.",
            "parameters": {"type": "object", "properties": properties, "required": ["city"]},
        },
    }
    for at, properties in enumerate([PROPERTIES, {}])
]

CONVERSATIONS: dict[str, Sequence[Message]] = {
    "one": [USER],
    "system": [SYSTEM, USER],
    "turns": [SYSTEM, USER, ANSWER, USER],
    "ends with the assistant": [USER, ANSWER],
    "thought": [USER, THOUGHT, USER, TAGGED, USER],
    "thinks last": [USER, THOUGHT],
    "call": [SYSTEM, USER, CALL, RESULT],
    "call and answer": [USER, CALL, RESULT, ANSWER, USER],
    "two calls": [USER, TWO_CALLS, RESULT, RESULT],
    "parts": [PARTS],
    "wrong order": [USER, USER, RESULT],
}
WAYS: dict[str, Chat] = {
    "plain": Chat([]),
    "tools": Chat([], tools=TOOLS),
    "closed": Chat([], add_generation_prompt=False),
    "continued": Chat([], continue_final_message=True),
    "kwargs": Chat([], template_kwargs={"enable_thinking": False, "reasoning_effort": "high", "bos_token": "<S>"}),
    "more": Chat(
        [],
        tools=TOOLS[:1],
        template_kwargs={
            "tools_in_user_message": False,
            "date_string": "today",
            "builtin_tools": ["code_interpreter", "b"],
        },
        documents=[{"title": "a", "text": "b\nc"}],
    ),
}


def as_sent(message: Message) -> Message:
    """As clients send it: arguments as JSON."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    written = [{**call, "function": with_json(call["function"])} for call in calls]
    return {**message, "tool_calls": written}


def with_json(function: Mapping[str, object]) -> Mapping[str, object]:
    return {**function, "arguments": json.dumps(function["arguments"])}


def reference(source: str, chat: Chat) -> str:
    """By transformers, with arguments as objects or, where the template takes no objects, as JSON."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level(), **SPECIAL_TOKENS)

    def render(messages: Sequence[Message]) -> str:
        text: str = tokenizer.apply_chat_template(
            messages,
            chat_template=source,
            tokenize=False,
            tools=chat.tools or None,
            documents=chat.documents or None,
            add_generation_prompt=chat.add_generation_prompt and not chat.continue_final_message,
            continue_final_message=chat.continue_final_message,
            **chat.template_kwargs,
        )
        return text

    try:
        return render(chat.messages)
    except TypeError:
        return render([as_sent(message) for message in chat.messages])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("path", TEMPLATES, ids=[path.stem for path in TEMPLATES])
def test_published_features_render_as_in_transformers(path: Path, way: str) -> None:
    source = path.read_text(encoding="utf-8")
    template = ChatTemplate(source, SPECIAL_TOKENS)
    rendered = 0
    for name, messages in CONVERSATIONS.items():
        chat = replace(WAYS[way], messages=messages)
        sent = replace(chat, messages=[as_sent(message) for message in messages])
        try:
            expected = reference(source, chat)
        except Exception:  # templates are programs, and raise anything
            with pytest.raises(BadRequest):
                template.render(sent)
            continue
        assert template.render(sent) == expected, name
        rendered += 1
    assert rendered >= 3


def test_templates_have_what_transformers_gives_them() -> None:
    source = """
    {%- for message in messages %}
        {% if loop.index > 2 %}{% break %}{% endif %}
        {% generation %}[{{ message | tojson }}]{% endgeneration %}
    {% endfor %}
{{ strftime_now("%Y") | length }}{{ bos_token }}"""
    messages = [{"role": "user", "content": "<é>"}] * 3
    shown = '[{"role": "user", "content": "<é>"}]'
    assert ChatTemplate(source, {"bos_token": "<s>"}).render(Chat(messages)) == f"{shown}{shown}4<s>"


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content.missing.more }}", "has no attribute"),
        ("{{ messages[0]['content'] + 1 }}", "can only concatenate"),
        ("{{ messages.__class__.__mro__ }}", "is unsafe"),
        ("{{ messages.append(1) }}", "is not safely callable|unsafe"),
    ],
)
def test_what_a_template_raises_is_the_clients_to_know(source: str, problem: str) -> None:
    with pytest.raises(BadRequest, match=problem) as caught:
        ChatTemplate(source, {}).render(Chat([{"role": "user", "content": "hi"}]))
    assert caught.value.param == "messages"


def test_a_template_that_does_not_parse_stops_the_start() -> None:
    with pytest.raises(SetupError, match="does not parse"):
        ChatTemplate("{% for %}", {})


# Arguments of tool calls


def test_arguments_that_are_no_json_are_passed_on() -> None:
    template = ChatTemplate("{{ messages[0].tool_calls[0].function.arguments }}", {})
    for arguments, shown in (("{broken", "{broken"), ("", "{}"), ('{"a": 1}', "{'a': 1}")):
        calls = [{"function": {"name": "f", "arguments": arguments}}]
        assert template.render(Chat([{"role": "assistant", "tool_calls": calls}])) == shown


def test_a_template_that_wants_text_gets_the_clients() -> None:
    template = ChatTemplate("{{ 'args: ' + messages[0].tool_calls[0].function.arguments }}", {})
    calls = [{"function": {"name": "f", "arguments": '{"a":  1}'}}]
    message = {"role": "assistant", "content": "x", "tool_calls": calls}
    assert template.render(Chat([message])) == 'args: {"a":  1}'


# Going on with the final message


def continued(source: str, content: object) -> str:
    chat = Chat([{"role": "assistant", "content": content}], continue_final_message=True)
    return ChatTemplate(source, {}).render(chat)


def test_the_text_ends_within_the_final_message() -> None:
    assert continued("<a>{{ messages[0].content }}</a>", "so it ") == "<a>so it "
    assert continued("<a>{{ messages[0].content | trim }}</a>", "so it ") == "<a>so it"
    parts = [{"type": "text", "text": "so "}, {"type": "image"}]
    assert continued("<a>{{ messages[0].content[0].text }}</a>{{ add_generation_prompt }}", parts) == "<a>so "


@pytest.mark.parametrize("content", [None, [], [{"type": "image"}], 3])
def test_without_a_text_there_is_nothing_to_go_on_with(content: object) -> None:
    with pytest.raises(BadRequest, match="no text to continue"):
        continued("{{ messages[0].content }}", content)


def test_what_cannot_be_gone_on_with_is_refused() -> None:
    with pytest.raises(BadRequest, match="does not write the final message"):
        continued("nothing of it", "so")
    with pytest.raises(BadRequest, match="does not write the final message"):
        continued("{{ messages[0].content | upper }}", "so")
    with pytest.raises(BadRequest, match="needs a message"):
        ChatTemplate("", {}).render(Chat([], continue_final_message=True))


@pytest.mark.parametrize("name", ["messages", "tools", "documents", "add_generation_prompt", "continue_final_message"])
def test_arguments_of_the_request_are_not_for_the_template(name: str) -> None:
    with pytest.raises(BadRequest, match=name) as caught:
        ChatTemplate("", {}).render(Chat([], template_kwargs={name: []}))
    assert caught.value.param == "chat_template_kwargs"


# A model's folder


def test_conversations_with_tools_may_have_a_template_of_their_own(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "{{ bos_token }}plain"}, {"name": "tool_use", "template": "with tools"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "chat_template": named}))
    template = load_template(tmp_path)
    assert template is not None
    assert (template.render(Chat([])), template.render(Chat([], tools=TOOLS))) == ("<s>plain", "with tools")


def test_templates_may_lie_in_files(tmp_path: Path) -> None:
    assert load_template(tmp_path) is None
    (tmp_path / "chat_template.jinja").write_text("plain")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("with tools")
    template = load_template(tmp_path)
    assert template is not None
    assert (template.render(Chat([])), template.render(Chat([], tools=TOOLS))) == ("plain", "with tools")
