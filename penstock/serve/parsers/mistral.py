"""Calls as Mistral writes them: an array, or since 2025 a token for each call.

    [TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Oslo"}}]
    [TOOL_CALLS]get_weather[ARGS]{"city": "Oslo"}[TOOL_CALLS]get_time[ARGS]{}

Some versions put [CALL_ID] and an id after the name; ids are given by the frontend, see `tools.call_id`.
"""

from __future__ import annotations

from functools import partial

from penstock.serve.parsers.api import Content, Format, Turn
from penstock.serve.parsers.calls import read_arguments, read_calls
from penstock.serve.parsers.reader import Markers, Reader, Reading, Steps

OPEN, CALL_ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
_OPEN, _CALL_ID, _ARGS = Markers(OPEN), Markers(CALL_ID), Markers(ARGS)


def _read(turn: Turn, reader: Reader) -> Steps[None]:
    while (yield from reader.prose(Content, _OPEN)):
        is_array = (yield from reader.skip_space()) == "["
        has_started = yield from read_calls(reader, turn) if is_array else _read_named(reader)
        if not has_started:
            reader.spill(Content)
            continue
        if not turn.is_parallel:
            return
        yield from reader.skip_layout()


def _read_named(reader: Reader) -> Steps[bool]:
    name = yield from reader.word()
    if (yield from reader.ahead(_CALL_ID)):
        yield from reader.word()
    yield from reader.ahead(_ARGS)
    return (yield from read_arguments(reader, name))


PARSERS = (
    Format(
        names=("mistral",),
        reads=("calls",),
        keeps=(OPEN, CALL_ID, ARGS),
        make=lambda turn: Reading(partial(_read, turn)),
        fits=lambda model_type, template: OPEN in template,
    ),
)
