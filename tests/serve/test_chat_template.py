"""Conversations become the text that transformers makes of them, for the features of published templates."""

from __future__ import annotations

import pytest

from penstock.errors import BadRequest, SetupError
from penstock.serve.chat_template import Chat, ChatTemplate
from tests.serve.tokenizers_made import CHAT


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


def test_the_template_agrees_with_transformers() -> None:
    chat_template_utils = pytest.importorskip("transformers.utils.chat_template_utils")
    messages = [{"role": "system", "content": " a "}, {"role": "user", "content": "<b>\n"}]
    expected, _ = chat_template_utils.render_jinja_template([messages], chat_template=CHAT, add_generation_prompt=True)
    assert ChatTemplate(CHAT, {}).render(Chat(messages)) == expected[0]
