"""Calls as Llama 3 writes them: the whole answer is JSON, or what follows a special token.

    {"name": "get_weather", "parameters": {"city": "Oslo"}}; {"name": "get_time", "parameters": {}}

JSON alone marks nothing: it may be the answer that was asked for. So a call's name must be one that the request offers,
and calls stand at the beginning of an answer or after <|python_tag|>.
"""

from __future__ import annotations

from functools import partial

from penstock.serve.parsers.api import Content, Format, Turn
from penstock.serve.parsers.calls import read_call
from penstock.serve.parsers.reader import Markers, Reader, Reading, Steps

TAG = "<|python_tag|>"
_TAG, _SEPARATOR = Markers(TAG), Markers(";")


def _read(turn: Turn, reader: Reader) -> Steps[None]:
    marker = TAG
    while marker:
        while (yield from read_call(reader, turn.tools)):
            if not turn.is_parallel:
                return
            yield from reader.skip_layout()
            yield from reader.ahead(_SEPARATOR)
            yield from reader.skip_layout()
        reader.spill(Content)
        marker = yield from reader.prose(Content, _TAG)


def _fits(model_type: str, template: str) -> bool:
    is_llama = "<|start_header_id|>" in template or "<|header_start|>" in template
    return is_llama and "<tool_call>" not in template and (TAG in template or '"parameters"' in template)


PARSERS = (
    Format(
        names=("llama3_json", "llama4_json"),
        reads=("calls",),
        keeps=(TAG,),
        make=lambda turn: Reading(partial(_read, turn)),
        fits=_fits,
    ),
)
