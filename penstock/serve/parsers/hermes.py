"""Calls as Hermes and Qwen write them, each between tags of its own.

I'll look. <tool_call>
{"name": "get_weather", "arguments": {"city": "Oslo"}}
</tool_call>
"""

from __future__ import annotations

from functools import partial

from penstock.serve.parsers.api import Content, Format, Turn
from penstock.serve.parsers.calls import read_call
from penstock.serve.parsers.reader import Markers, Reader, Reading, Steps

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_OPEN, _CLOSE = Markers(OPEN), Markers(CLOSE)


def _read(turn: Turn, reader: Reader) -> Steps[None]:
    while (yield from reader.prose(Content, _OPEN)):
        if not (yield from read_call(reader)):
            reader.spill(Content)
            continue
        if not turn.is_parallel:
            return
        yield from reader.skip_layout()
        yield from reader.ahead(_CLOSE)
        yield from reader.skip_layout()


def _fits(model_type: str, template: str) -> bool:
    """Others put XML between the same tags."""
    return OPEN in template and "<function=" not in template and "<arg_key>" not in template


PARSERS = (
    Format(
        names=("hermes",),
        reads=("calls",),
        keeps=(OPEN, CLOSE),
        make=lambda turn: Reading(partial(_read, turn)),
        fits=_fits,
    ),
)
