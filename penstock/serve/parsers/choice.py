"""Which parsers read a model's answers: found by name, or by how its chat template looks.

One of them finds tool calls and one reasoning; a format that has both, such as gpt-oss's, is read by one alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from penstock import plugin
from penstock.config import suggestion
from penstock.errors import SetupError
from penstock.serve.parsers.api import Content, Delta, Deltas, Format, Kind, Parser, Turn
from penstock.serve.parsers.reader import Reader, Reading, Steps

PORT = "serve.parsers"
NONE = "none"  # the name that turns one off
_FLAGS: dict[Kind, str] = {"calls": "--tool-parser", "reasoning": "--reasoning-parser"}


@dataclass(frozen=True, slots=True)
class Formats:
    """How one model's answers are read. Immutable; shared by its requests."""

    calls: Format | None
    reasoning: Format | None

    def keeps(self) -> tuple[str, ...]:
        """Special tokens whose text parsers must see, where the tokenizer has them."""
        return tuple(dict.fromkeys(marker for each in (self.calls, self.reasoning) if each for marker in each.keeps))

    def may_parse(self, turn: Turn) -> bool:
        """Whether an answer may be more than text."""
        return self.reasoning is not None or (self.calls is not None and bool(turn.tools))

    def parser(self, turn: Turn) -> Parser:
        """For an answer in which the model is free to call tools, if there are any."""
        if self.calls is self.reasoning:
            return self.calls.make(turn) if self.calls else Reading(_read_plain)
        calls = self.calls.make(turn) if self.calls and turn.tools else None
        reasoning = self.reasoning.make(turn) if self.reasoning else None
        if calls and reasoning:
            return _Both(reasoning, calls)
        return calls or reasoning or Reading(_read_plain)


PLAIN = Formats(None, None)


def names(kind: Kind) -> list[str]:
    """What the flag of this kind takes, without "none"."""
    return sorted(name for each in _formats(kind) for name in each.names)


def find(kind: Kind, name: str) -> Format | None:
    """The format of that name, None for "none". Raises SetupError where there is none of that name."""
    for each in _formats(kind):
        if name in each.names:
            return each
    if name == NONE:
        return None
    known = [*names(kind), NONE]
    raise SetupError(f"{_FLAGS[kind]} {name!r} is unknown{suggestion(name, known)}: there is {', '.join(known)}")


def pick(model_type: str, template: str, calls: str | None = None, reasoning: str | None = None) -> Formats:
    """How a model's answers are read, given its config's `model_type` and its chat template's source.

    `calls` and `reasoning` name parsers that are to be used instead. Raises SetupError for names that are unknown or
    exclude each other.
    """
    named: dict[Kind, str | None] = {"calls": calls, "reasoning": reasoning}
    chosen = {kind: _choose(kind, name, model_type, template) for kind, name in named.items()}
    _let_whole_formats_read_both(named, chosen)
    return Formats(chosen["calls"], chosen["reasoning"])


class _Both:
    """Finds calls in what is left when reasoning was taken out."""

    __slots__ = ("_calls", "_reasoning")

    def __init__(self, reasoning: Parser, calls: Parser) -> None:
        self._reasoning = reasoning
        self._calls = calls

    @property
    def is_complete(self) -> bool:
        return self._calls.is_complete

    def push(self, text: str) -> Deltas:
        return self._sorted(self._reasoning.push(text))

    def finish(self) -> Deltas:
        return [*self._sorted(self._reasoning.finish()), *self._calls.finish()]

    def _sorted(self, deltas: Deltas) -> list[Delta]:
        found: list[Delta] = []
        for delta in deltas:
            found += self._calls.push(delta.text) if isinstance(delta, Content) else (delta,)
        return found


def _read_plain(reader: Reader) -> Steps[None]:
    return reader.rest(Content)


def _let_whole_formats_read_both(named: Mapping[Kind, str | None], chosen: dict[Kind, Format | None]) -> None:
    """What was named goes before what was picked. Raises SetupError where both were named and do not go together."""
    others: tuple[tuple[Kind, Kind], ...] = (("calls", "reasoning"), ("reasoning", "calls"))
    for kind, other in others:
        whole = chosen[kind]
        if whole is None or len(whole.reads) == 1 or chosen[other] is whole:
            continue
        if named[other] is None:
            chosen[other] = whole
        elif named[kind] is None:
            chosen[kind] = None
        else:
            one, two = f"{_FLAGS[kind]} {named[kind]}", f"{_FLAGS[other]} {named[other]}"
            raise SetupError(f"{one} reads calls and reasoning alike; leave {two} out")


def _choose(kind: Kind, name: str | None, model_type: str, template: str) -> Format | None:
    if name is not None:
        return find(kind, name)
    return next((each for each in _formats(kind) if each.fits(model_type, template)), None)


def _formats(kind: Kind) -> Iterator[Format]:
    for file in plugin.names(PORT):
        yield from (each for each in plugin.find(PORT, file).PARSERS if kind in each.reads)
