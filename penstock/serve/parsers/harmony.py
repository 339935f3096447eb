"""What gpt-oss writes: messages on channels, some of them to a tool. This one format has calls and reasoning.

    <|channel|>analysis<|message|>They ask for the weather.<|end|>
    <|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Oslo"}<|call|>
    <|start|>assistant<|channel|>final<|message|>It rains.<|return|>

The prompt ends with <|start|>assistant. A message on the channel "analysis" is reasoning. One on "final", and one on
"commentary" to nobody, with which the model says what it is about to do, are content.
"""

from __future__ import annotations

import re
from functools import partial

from penstock.serve.parsers.api import Content, Format, Reasoning, Turn
from penstock.serve.parsers.calls import read_arguments
from penstock.serve.parsers.reader import Markers, Reader, Reading, Steps

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
RECIPIENT = "to=functions."
HEADER_CHARS = 256  # more than any has

_HEADER = Markers(START, CHANNEL)
_FIRST_HEADER = Markers(START, CHANNEL, RECIPIENT)  # its beginning is in the prompt
_AFTER_HEADER = Markers(MESSAGE, END, CALL, RETURN)
_AFTER_MESSAGE = Markers(START, CHANNEL, END, CALL, RETURN)

_ANALYSIS = re.compile(r"<\|channel\|>\s*analysis\b")
_TO = re.compile(r"to=(?:functions\.)?([^\s<]+)")


def _read(turn: Turn, reader: Reader) -> Steps[None]:
    yield from reader.skip_space()
    opening = yield from reader.ahead(_FIRST_HEADER)
    while opening := opening or (yield from reader.prose(Content, _HEADER)):
        header, ending = yield from reader.up_to(_AFTER_HEADER)
        if not ending and len(header) < HEADER_CHARS:  # one that was cut off says nothing
            reader.settle()
        if ending != MESSAGE:
            reader.spill(Content)
            opening = ""
            continue
        has_call = yield from _read_call(turn, opening + header, reader)
        if has_call and not turn.is_parallel:
            return
        opening = yield from _read_text(opening + header, reader)


def _read_call(turn: Turn, header: str, reader: Reader) -> Steps[bool]:
    """Whether this message is to a tool. If so, its arguments were read, else its header."""
    to = _TO.search(header) if turn.tools else None
    if to is None:
        yield from reader.skip_layout()
        return False
    has_started = yield from read_arguments(reader, to[1])
    if has_started:
        yield from reader.skip_layout()
    else:
        reader.spill(Content)
    return has_started


def _read_text(header: str, reader: Reader) -> Steps[str]:
    """Reads the rest of a message; returns the beginning of the next header, should that be what ends it."""
    marker = yield from reader.prose(Reasoning if _ANALYSIS.search(header) else Content, _AFTER_MESSAGE)
    if marker in (START, CHANNEL):
        return marker
    yield from reader.skip_layout()
    return ""


PARSERS = (
    Format(
        names=("openai", "openai_gptoss"),
        reads=("calls", "reasoning"),
        keeps=(START, CHANNEL, CONSTRAIN, MESSAGE, END, CALL, RETURN),
        make=lambda turn: Reading(partial(_read, turn)),
        fits=lambda model_type, template: model_type == "gpt_oss" or (CHANNEL in template and MESSAGE in template),
    ),
)
