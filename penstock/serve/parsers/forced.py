"""Calls that the request forces. The engine was guided by `tools.Tools.schema`, so the answer is JSON and nothing else,
whatever the model's own format."""

from __future__ import annotations

from functools import partial

from penstock.serve.parsers.api import Content, Parser, Turn
from penstock.serve.parsers.calls import read_arguments, read_calls
from penstock.serve.parsers.reader import Reader, Reading, Steps


def required(turn: Turn) -> Parser:
    """The answer is an array of calls: [{"name": ..., "parameters": {...}}]."""
    return Reading(partial(_read_required, turn))


def named(name: str) -> Parser:
    """The answer is the arguments of one call of this tool."""
    return Reading(partial(_read_named, name))


def _read_required(turn: Turn, reader: Reader) -> Steps[None]:
    if (yield from read_calls(reader, turn)):
        if not turn.is_parallel:
            return
        yield from reader.skip_layout()
    yield from reader.rest(Content)


def _read_named(name: str, reader: Reader) -> Steps[None]:
    if (yield from read_arguments(reader, name)):
        yield from reader.skip_layout()
    yield from reader.rest(Content)
