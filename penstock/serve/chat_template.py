"""Conversations into text, by the model's own Jinja template, as transformers' `apply_chat_template` does it.

Used by `text`. A template sees messages, tools and documents as plain JSON, and what else a client names in
`template_kwargs` (`enable_thinking`, say). It runs in a sandbox and may call `raise_exception`, `strftime_now`,
`namespace`, `dict`, the filter `tojson`, and loops' `break` and `continue`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from penstock.clock import wall_s
from penstock.errors import BadRequest, SetupError, UnreadableModel

if TYPE_CHECKING:
    from jinja2 import Environment, Template, nodes
    from jinja2.parser import Parser

Message: TypeAlias = Mapping[str, object]  # as OpenAI's API has it: "role", "content", "tool_calls", ...

REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one thing; templates know one or another
END_TAG = "CONTINUE_FINAL_MESSAGE_TAG "  # with a space, to see whether the template trims what a message ends with
TAKEN = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")  # not for template_kwargs


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation, and how it is to be written. JSON values throughout.

    With `add_generation_prompt` the text ends where the assistant is to speak; with `continue_final_message`, which
    takes precedence, within the last message, whose words the model goes on with.
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, object]] = ()
    documents: Sequence[Mapping[str, object]] = ()
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template_kwargs: Mapping[str, object] = field(default_factory=dict)


class ChatTemplate:
    """The templates of one model: most have one, some another for conversations with tools."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], tool_source: str | None = None) -> None:
        """`special_tokens` are what templates know as `bos_token` and the like. Raises SetupError for bad syntax."""
        self.source = source + (tool_source or "")
        environment = _environment()
        self._special_tokens = special_tokens
        self._template = _compile(environment, source)
        self._tool_template = self._template if tool_source is None else _compile(environment, tool_source)

    def render(self, chat: Chat) -> str:
        """The text that the model is to go on from. Raises BadRequest where the template refuses the conversation.

        Templates disagree whether the arguments of a tool call are an object or its JSON, as a client sends it: they
        get the object, and if that fails the other.
        """
        _refuse_contradictions(chat)
        messages = [_clean(message) for message in chat.messages]
        with_objects = [_parse_arguments(message) for message in messages]
        try:
            return self._write(chat, with_objects)
        except BadRequest:
            if with_objects == messages:
                raise
            return self._write(chat, messages)

    def _write(self, chat: Chat, messages: list[dict[str, object]]) -> str:
        last = ""
        if chat.continue_final_message:
            tagged, last = _tagged(messages[-1])
            messages = [*messages[:-1], tagged]
        template = self._tool_template if chat.tools else self._template
        given = {**self._special_tokens, **chat.template_kwargs}
        try:
            text = template.render(
                messages=messages,
                tools=list(chat.tools) or None,
                documents=list(chat.documents) or None,
                add_generation_prompt=chat.add_generation_prompt and not chat.continue_final_message,
                **given,
            )
        except Exception as error:  # templates are programs: what they raise on odd messages is anything
            raise BadRequest(f"the chat template refuses these messages: {error}", "messages") from error
        return _cut_at_tag(text, last) if chat.continue_final_message else text


def _refuse_contradictions(chat: Chat) -> None:
    for name in chat.template_kwargs:
        if name in TAKEN:
            raise BadRequest(
                f"chat_template_kwargs: {name} is not for the template's arguments", "chat_template_kwargs"
            )
    if chat.continue_final_message and not chat.messages:
        raise BadRequest("continue_final_message needs a message to continue", "continue_final_message")


# Messages, as templates expect them.


def _clean(message: Message) -> dict[str, object]:
    """Without nulls, which templates would write out as None; with the assistant's reasoning under all its names."""
    cleaned = {name: value for name, value in message.items() if value is not None}
    reasoning = next((cleaned[name] for name in REASONING if name in cleaned), None)
    if reasoning is not None:
        cleaned = {"thinking": reasoning} | cleaned | {"reasoning_content": reasoning}
    return cleaned


def _parse_arguments(message: dict[str, object]) -> dict[str, object]:
    """With the arguments of its tool calls as objects."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return message | {"tool_calls": [_parse_call(call) for call in calls]}


def _parse_call(call: object) -> object:
    """What is not JSON stays as it is: a model may have written anything."""
    match call:
        case {"function": {"arguments": str(text), **function}, **rest}:
            try:
                arguments = json.loads(text) if text else {}
            except (ValueError, RecursionError):
                return call
            return {**rest, "function": {**function, "arguments": arguments}}
    return call


def _tagged(message: dict[str, object]) -> tuple[dict[str, object], str]:
    """The final message with a tag where it ends, and its last text. Raises BadRequest if it has no text."""
    content = message.get("content")
    if isinstance(content, str):
        return message | {"content": content + END_TAG}, content
    if isinstance(content, list):
        for at in reversed(range(len(content))):
            match content[at]:
                case {"text": str(text), **rest}:
                    parts = [*content[:at], {**rest, "text": text + END_TAG}, *content[at + 1 :]]
                    return message | {"content": parts}, text
    raise BadRequest("continue_final_message: the final message has no text to continue", "messages")


def _cut_at_tag(text: str, last: str) -> str:
    """The text up to where the final message ends. Raises BadRequest if the template does not write it out."""
    at = text.rfind(END_TAG.strip())
    if at < 0 or last.strip() not in text:
        raise BadRequest(
            "continue_final_message: the chat template does not write the final message as it is", "messages"
        )
    if text.startswith(END_TAG, at):
        return text[:at]
    return text[:at].rstrip()  # the template trims messages


# The sandbox.


def _compile(environment: Environment, source: str) -> Template:
    from jinja2 import TemplateError

    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise SetupError(f"the chat template does not parse: {error}; fix chat_template.jinja") from error


def _environment() -> Environment:
    from jinja2 import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the assistant's words for training; here it changes nothing."""

        tags = {"generation"}

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """Without HTML's escapes, unlike Jinja's own."""
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(format: str) -> str:
        return datetime.fromtimestamp(wall_s()).strftime(format)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment


# A model's folder.


def load_template(folder: Path) -> ChatTemplate | None:
    """The templates of a Hugging Face model folder; None if it has none. Raises UnreadableModel or SetupError.

    A chat_template.jinja of its own wins over tokenizer_config.json. Of several, `default` is for conversations
    without tools and `tool_use` for those with.
    """
    config = load_json(folder / "special_tokens_map.json") | load_json(folder / "tokenizer_config.json")
    named = _named_sources(config.get("chat_template")) | _files(folder)
    if "default" not in named:
        return None
    return ChatTemplate(named["default"], _special_tokens(config), named.get("tool_use"))


def load_json(path: Path) -> dict[str, object]:
    """Of a model folder; empty where there is no such file. Raises UnreadableModel."""
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnreadableModel(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise UnreadableModel(f"{path} is not a JSON object")
    return config


def _named_sources(configured: object) -> dict[str, str]:
    """One template, or a list of named ones."""
    if isinstance(configured, list):
        return {entry["name"]: entry["template"] for entry in configured}
    return {"default": configured} if isinstance(configured, str) else {}


def _files(folder: Path) -> dict[str, str]:
    more = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    paths = {path.stem: path for path in more} | {"default": folder / "chat_template.jinja"}
    return {name: path.read_text(encoding="utf-8") for name, path in paths.items() if path.is_file()}


def _special_tokens(config: Mapping[str, object]) -> dict[str, str]:
    """`bos_token` and the like; each is written as a string, or as an object with its `content`."""
    found = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found
