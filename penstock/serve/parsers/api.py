"""What a parser is: it reads the text of one answer as it comes, and says what of it is what.

    text -> parser -> Content | Reasoning | ToolCallStart | ToolCallArguments

A parser never raises over what a model writes, and loses and invents nothing: what is no call comes out as content,
its markers included. Only markers, what stands between a marker and a call's arguments, and whitespace next to a
marker are left out. How the text is cut into pieces changes nothing: the deltas of all pieces add up to the same.

A new format is a new file that sets PARSERS, a tuple of `Format`; see `hermes` for a short one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import msgspec

Kind = Literal["calls", "reasoning"]


class Content(msgspec.Struct, frozen=True):
    """More of the answer's text."""

    text: str


class Reasoning(msgspec.Struct, frozen=True):
    """More of what the model thinks before it answers."""

    text: str


class ToolCallStart(msgspec.Struct, frozen=True):
    """A call of a tool begins; `index` counts the calls of this answer, from 0."""

    index: int
    name: str


class ToolCallArguments(msgspec.Struct, frozen=True):
    """More of a call's arguments: all pieces together are the JSON object as the model wrote it."""

    index: int
    text: str


Delta: TypeAlias = Content | Reasoning | ToolCallStart | ToolCallArguments
Deltas: TypeAlias = Sequence[Delta]


class Parser(Protocol):
    """Reads one answer. Once `is_complete`, nothing more is read: generating more is a waste."""

    @property
    def is_complete(self) -> bool: ...

    def push(self, text: str) -> Deltas:
        """What is certain now that this text was added."""
        ...

    def finish(self) -> Deltas:
        """The rest; called once, after the last text."""
        ...


@dataclass(frozen=True, slots=True)
class Turn:
    """What a parser needs to know of the request that is being answered."""

    tools: tuple[str, ...] = ()  # the names that can be called; none: nothing is a call
    prompt: str = ""  # its end, as rendered, is enough: templates may open what the answer closes
    is_parallel: bool = True  # else the answer is complete after its first call


@dataclass(frozen=True, slots=True)
class Format:
    """How a family of models writes, under the names that `--tool-parser` and `--reasoning-parser` take.

    `keeps` are special tokens whose text the parser must see, where the tokenizer has them. `fits` says whether a
    model writes so, given config.json's `model_type` and the source of the chat template.
    """

    names: tuple[str, ...]
    reads: tuple[Kind, ...]
    keeps: tuple[str, ...]
    make: Callable[[Turn], Parser]
    fits: Callable[[str, str], bool]


class Call(msgspec.Struct, frozen=True):
    """A call of a tool, whole."""

    name: str
    arguments: str  # JSON


class Said(msgspec.Struct, frozen=True):
    """A whole answer."""

    content: str
    reasoning: str
    calls: tuple[Call, ...]


def total(deltas: Iterable[Delta]) -> Said:
    """What an answer's deltas come to."""
    content, reasoning = [], []
    names: list[str] = []
    arguments: list[list[str]] = []
    for delta in deltas:
        match delta:
            case Content(text):
                content.append(text)
            case Reasoning(text):
                reasoning.append(text)
            case ToolCallStart(_, name):
                names.append(name)
                arguments.append([])
            case ToolCallArguments(index, text):
                arguments[index].append(text)
    calls = tuple(Call(name, "".join(texts)) for name, texts in zip(names, arguments, strict=True))
    return Said("".join(content), "".join(reasoning), calls)
