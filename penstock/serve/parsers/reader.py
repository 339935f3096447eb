"""How a format is written down: as a generator that reads the answer from its first character to its last.

    def _read(reader: Reader) -> Steps[None]:
        while (yield from reader.prose(Content, _OPEN)):
            ...

It asks the `Reader` for what should come next, and stands still while that has not been generated yet. What was read
and is not yet known to be markup is held: `settle` leaves it out of the answer, `spill` gives it to the client.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from typing import TypeAlias, TypeVar

import msgspec

from penstock.serve.parsers.api import Content, Delta, Deltas, Reasoning, ToolCallArguments, ToolCallStart
from penstock.serve.parsers.json_text import JsonText

T = TypeVar("T")

Steps: TypeAlias = Generator[None, None, T]  # stands still at each `yield` until there is more text
Text: TypeAlias = type[Content] | type[Reasoning]

SPACE = " \t\r\n"
_WORD = re.compile(r"[\w.-]*")


class Markers:
    """Words to look for. None of them may begin with another."""

    __slots__ = ("_any", "_beginning", "words")

    def __init__(self, *words: str) -> None:
        beginnings = [word[:chars] for word in words for chars in range(1, len(word))]
        self.words = words
        self._any = re.compile("|".join(map(re.escape, words)))
        self._beginning = re.compile(rf"(?:{'|'.join(map(re.escape, beginnings))})\Z")

    def find(self, text: str) -> tuple[int, str]:
        """Where the first of them starts, and which it is; the end and "" where there is none."""
        found = self._any.search(text)
        return (len(text), "") if found is None else (found.start(), found[0])

    def certain(self, text: str) -> int:
        """How much of a text without them cannot be the beginning of one, whatever comes next."""
        found = self._beginning.search(text)
        return len(text) if found is None else found.start()

    def may_begin(self, text: str) -> bool:
        """Whether `text` is the beginning of one of them."""
        return any(word.startswith(text) for word in self.words)


class Reader:
    """The answer so far, and what became of it: text to be read, then text that is held, then deltas."""

    __slots__ = ("_calls", "_deltas", "_held", "is_over", "window")

    def __init__(self) -> None:
        self.window = ""  # not read yet
        self.is_over = False  # nothing will be added
        self._held: list[str] = []
        self._deltas: list[Delta] = []
        self._calls = 0

    def drain(self) -> Deltas:
        """The deltas since the last time."""
        deltas, self._deltas = self._deltas, []
        return deltas

    # What was read.

    def take(self, chars: int) -> str:
        """Reads that much of the window; it is held."""
        text, self.window = self.window[:chars], self.window[chars:]
        if text:
            self._held.append(text)
        return text

    def settle(self) -> None:
        """What is held was markup."""
        self._held.clear()

    def spill(self, kind: Text) -> None:
        """What is held is text."""
        if self._held:
            self._deltas.append(kind("".join(self._held)))
            self._held.clear()

    def start(self, name: str) -> None:
        """What is held was the beginning of a call."""
        self.settle()
        self._deltas.append(ToolCallStart(self._calls, name))
        self._calls += 1

    def arguments(self, text: str) -> None:
        """What is held is this text, and part of the arguments of the call that started last."""
        self.settle()
        self._deltas.append(ToolCallArguments(self._calls - 1, text))

    # What comes next. All of these leave what they read held.

    def more(self) -> Steps[bool]:
        """Waits until text was added to the window; False if the answer is over instead."""
        if not self.is_over:
            yield
        return not self.is_over

    def rest(self, kind: Text) -> Steps[None]:
        """Everything there is still to come, as `kind`."""
        while True:
            self.take(len(self.window))
            self.spill(kind)
            if not (yield from self.more()):
                return

    def prose(self, kind: Text, markers: Markers) -> Steps[str]:
        """Passes text on as `kind` up to one of `markers`, and returns that, or "" at the end of the answer.

        The marker is held together with the whitespace before it.
        """
        while True:
            at, marker = markers.find(self.window)
            certain = at if marker else markers.certain(self.window)
            words = len(self.window[:certain].rstrip(SPACE))
            if words:
                self.take(words)
                self.spill(kind)
            self.take(certain - words)
            if marker:
                return self.take(len(marker))
            if not (yield from self.more()):
                self.take(len(self.window))
                self.spill(kind)
                return ""

    def up_to(self, markers: Markers) -> Steps[tuple[str, str]]:
        """Reads up to one of `markers`: what stands before it, and which it is, or "" at the end of the answer."""
        texts = []
        while True:
            at, marker = markers.find(self.window)
            texts.append(self.take(at if marker else markers.certain(self.window)))
            if marker:
                return "".join(texts), self.take(len(marker))
            if not (yield from self.more()):
                texts.append(self.take(len(self.window)))
                return "".join(texts), ""

    def skip_space(self) -> Steps[str]:
        """The first character after whitespace, unread; "" at the end of the answer."""
        while True:
            self.take(len(self.window) - len(self.window.lstrip(SPACE)))
            if self.window:
                return self.window[0]
            if not (yield from self.more()):
                return ""

    def skip_layout(self) -> Steps[None]:
        """Leaves whitespace out, and what is held before it."""
        yield from self.skip_space()
        self.settle()

    def word(self) -> Steps[str]:
        """Reads letters, digits and what else names are made of; perhaps none."""
        texts = []
        while True:
            found = _WORD.match(self.window)
            assert found is not None  # it matches nothing, too
            texts.append(self.take(found.end()))
            if self.window or not (yield from self.more()):
                return "".join(texts)

    def ahead(self, markers: Markers) -> Steps[str]:
        """Reads one of `markers` if it comes next, else nothing and returns ""."""
        while True:
            at, marker = markers.find(self.window)
            if marker and at == 0:
                return self.take(len(marker))
            if not markers.may_begin(self.window) or not (yield from self.more()):
                return ""

    def value(self, show: Callable[[str], None]) -> Steps[bool]:
        """Hands on a JSON value as it comes; whether it came to its end. What is no JSON is left unread."""
        value = JsonText()
        while True:
            used = value.feed(self.window)
            if used:
                show(self.take(used))
            if value.is_over:
                return value.is_whole
            if not (yield from self.more()):
                return False

    def string(self) -> Steps[str | None]:
        """Reads a JSON string: its value, or None where there is none."""
        if (yield from self.skip_space()) != '"':
            return None
        texts: list[str] = []
        if not (yield from self.value(texts.append)):
            return None
        try:
            return msgspec.json.decode("".join(texts), type=str)
        except (msgspec.DecodeError, UnicodeError):  # a bad escape, a raw newline, half a surrogate pair
            return None


class Reading:
    """A parser that reads by a generator."""

    __slots__ = ("_reader", "_steps", "is_complete")

    def __init__(self, read: Callable[[Reader], Steps[None]]) -> None:
        self.is_complete = False
        self._reader = Reader()
        self._steps = read(self._reader)
        self._go_on()

    def push(self, text: str) -> Deltas:
        if self.is_complete or not text:
            return ()
        self._reader.window += text
        self._go_on()
        return self._reader.drain()

    def finish(self) -> Deltas:
        self._reader.is_over = True
        self._go_on()
        return self._reader.drain()

    def _go_on(self) -> None:
        """Until it stands still for want of text."""
        for _ in self._steps:
            return
        self.is_complete = True
