"""Reasoning between two markers, at the beginning of an answer; all that follows is content.

    <think>
    They ask for the weather.
    </think>

    It rains.

Many templates put the opening marker into the prompt, so that the answer has only the closing one; some close it there
too, which turns reasoning off. The end of the prompt says which.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from penstock.serve.parsers.api import Content, Format, Parser, Reasoning, Turn
from penstock.serve.parsers.reader import Markers, Reader, Reading, Steps


@dataclass(frozen=True, slots=True)
class _Style:
    """The markers of a family; `is_open`: an answer begins with reasoning even if nothing says so."""

    opening: Markers
    closing: Markers
    is_open: bool = False

    def make(self, turn: Turn) -> Parser:
        return Reading(partial(_read, self, self._starts_open(turn.prompt.rstrip())))

    def is_in(self, model_type: str, template: str) -> bool:
        return any(marker in template for marker in (*self.opening.words, *self.closing.words))

    def _starts_open(self, prompt: str) -> bool:
        if prompt.endswith(self.opening.words):
            return True
        return self.is_open and not prompt.endswith(self.closing.words)


def _read(style: _Style, is_open: bool, reader: Reader) -> Steps[None]:
    yield from reader.skip_space()
    if (yield from reader.ahead(style.opening)) or is_open:
        yield from reader.skip_layout()
        yield from reader.prose(Reasoning, style.closing)
        yield from reader.skip_layout()
    yield from reader.rest(Content)


def _never(model_type: str, template: str) -> bool:
    """Only by name."""
    return False


_THINK = _Style(Markers("<think>"), Markers("</think>"))
_DEEPSEEK_R1 = replace(_THINK, is_open=True)
_MISTRAL = _Style(Markers("[THINK]"), Markers("[/THINK]"))
_GRANITE = _Style(
    Markers("Here is my thought process:", "Here's my thought process:"),
    Markers("Here is my response:", "Here's my response:"),
)


def _format(names: tuple[str, ...], style: _Style) -> Format:
    fits = _never if style.is_open else style.is_in
    return Format(names, ("reasoning",), (*style.opening.words, *style.closing.words), style.make, fits)


PARSERS = (
    _format(("think", "qwen3", "glm45", "deepseek_v3"), _THINK),
    _format(("deepseek_r1",), _DEEPSEEK_R1),
    _format(("mistral",), _MISTRAL),
    _format(("granite",), _GRANITE),
)
