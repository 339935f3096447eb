"""An answer's text as a chat shows it: content, reasoning and calls of tools, in OpenAI's fields. Used by `answer`."""

from __future__ import annotations

from collections.abc import Callable

from penstock.serve.parsers.api import Content, Delta, Deltas, Parser, Reasoning, ToolCallStart, total
from penstock.serve.tools import call_delta_fields, call_fields

Fields = dict[str, object]


class Parsed:
    """Reads one answer with a parser. `name_call` makes the id of each call, by its index."""

    def __init__(self, parser: Parser, name_call: Callable[[int], str], shows_reasoning: bool) -> None:
        self.has_calls = False
        self._parser = parser
        self._name_call = name_call
        self._shows_reasoning = shows_reasoning
        self._deltas: list[Delta] = []

    @property
    def is_complete(self) -> bool:
        """Generating more is a waste."""
        return self._parser.is_complete

    def push(self, text: str) -> list[Fields]:
        """What this text adds, as the `delta` of an event each."""
        return self._shown(self._parser.push(text))

    def finish(self, text: str) -> list[Fields]:
        """What the last text adds, and what was held back."""
        return self._shown([*self._parser.push(text), *self._parser.finish()])

    def keep(self, text: str) -> None:
        """Instead of `push`, until `message`."""
        self._note(self._parser.push(text))

    def message(self, text: str) -> Fields:
        """The whole answer, given the last text, as the fields of a message."""
        self._note([*self._parser.push(text), *self._parser.finish()])
        said = total(self._deltas)
        fields: Fields = {"content": said.content or (None if said.calls else "")}
        if said.reasoning and self._shows_reasoning:
            fields["reasoning_content"] = said.reasoning
        if said.calls:
            fields["tool_calls"] = [call_fields(call, self._name_call(i)) for i, call in enumerate(said.calls)]
        return fields

    def _note(self, deltas: Deltas) -> None:
        self.has_calls = self.has_calls or any(isinstance(delta, ToolCallStart) for delta in deltas)
        self._deltas += deltas

    def _shown(self, deltas: Deltas) -> list[Fields]:
        shown: list[Fields] = []
        for delta in deltas:
            match delta:
                case Content(text):
                    shown.append({"content": text})
                case Reasoning(text):
                    if self._shows_reasoning:
                        shown.append({"reasoning_content": text})
                case call:
                    self.has_calls = True
                    shown.append({"tool_calls": [call_delta_fields(call, self._name_call(call.index))]})
        return shown
