"""Calls that are written as JSON objects: {"name": ..., "arguments": {...}}, which most formats wrap in some way."""

from __future__ import annotations

from collections.abc import Container

from penstock.serve.parsers.api import Content, Turn
from penstock.serve.parsers.reader import Reader, Steps

ARGUMENTS = ("arguments", "parameters")  # models mix them up


def read_call(reader: Reader, names: Container[str] | None = None) -> Steps[bool]:
    """Reads one such object; whether it started a call. Its fields come in any order; those of no call are left out.

    A call starts once its name is known, one of `names` where these are given, and its arguments begin: from there on
    they stream, and nothing is held in the end. Else all that was read is held.
    """
    if (yield from reader.skip_space()) != "{":
        return False
    reader.take(1)
    call = _Call(reader, names)
    while (yield from call.read_field()):
        separator = yield from reader.skip_space()
        if separator not in (",", "}"):
            break
        reader.take(1)
        if separator == "}":
            call.close()
            break
    if call.is_started:
        reader.spill(Content)  # it broke off in what follows the arguments
    return call.is_started


def read_calls(reader: Reader, turn: Turn) -> Steps[bool]:
    """Reads an array of calls, or its first if that is all the request takes; whether any started, as `read_call`."""
    if (yield from reader.skip_space()) != "[":
        return False
    reader.take(1)
    has_started = False
    while (yield from read_call(reader)):
        has_started = True
        if not turn.is_parallel:
            return True
        separator = yield from reader.skip_space()
        if separator not in (",", "]"):
            break
        reader.take(1)
        if separator == "]":
            reader.settle()
            break
    if has_started:
        reader.spill(Content)  # an array that breaks off
    return has_started


def read_arguments(reader: Reader, name: str) -> Steps[bool]:
    """Reads an object: the arguments of a call whose name was written elsewhere; whether it started, as `read_call`."""
    if not name or (yield from reader.skip_space()) != "{":
        return False
    reader.start(name)
    yield from reader.value(reader.arguments)
    return True


class _Call:
    """One object that may be a call, while it is read."""

    __slots__ = ("_early", "_name", "_names", "_reader", "is_started")

    def __init__(self, reader: Reader, names: Container[str] | None) -> None:
        self.is_started = False
        self._reader = reader
        self._names = names
        self._name = ""
        self._early: list[str] = []  # arguments that came before the name

    def read_field(self) -> Steps[bool]:
        """Whether a field that may stand here was read to its end."""
        key = yield from self._reader.string()
        if key is None or (yield from self._reader.skip_space()) != ":":
            return False
        self._reader.take(1)
        first = yield from self._reader.skip_space()
        if key == "name":
            return (yield from self._read_name())
        if key in ARGUMENTS:
            return first == "{" and (yield from self._read_arguments())
        return (yield from self._reader.value(_leave_out))

    def close(self) -> None:
        """The object is whole. A call without arguments has none."""
        if self._name and not self.is_started:
            self._start()
            self._reader.arguments("{}")
        if self.is_started:
            self._reader.settle()  # the closing brace

    def _read_name(self) -> Steps[bool]:
        name = yield from self._reader.string()
        if self._name or not name or (self._names is not None and name not in self._names):
            return False
        self._name = name
        if self._early:
            self._start()
            self._reader.arguments("".join(self._early))
        return True

    def _read_arguments(self) -> Steps[bool]:
        if self.is_started or self._early:
            return False
        if not self._name:
            return (yield from self._reader.value(self._early.append))
        self._start()
        return (yield from self._reader.value(self._reader.arguments))

    def _start(self) -> None:
        self._reader.start(self._name)
        self.is_started = True


def _leave_out(text: str) -> None:
    """A field that is not the call's."""
