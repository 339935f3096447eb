"""What tests of several parsers share."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import strategies as st

from penstock.serve.parsers.api import Delta, Parser, Said, total

TRICKY = '{"city": "Os\\u006co \\"} {", "deep": {"a": [1, {"b": null}], "c": "</tool_call>"}, "x": -1.5e3}'
FRAGMENTS = [
    '{"name": "f", "arguments": ',
    '{"arguments": {"a": 1}, "name": "f"}',
    '{"name": "g", "parameters": {}}',
    '{"name"',
    '{"a": {"b": "}"}}',
    '"f"',
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    ";",
    '"',
    "\\",
    "\n",
    " ",
    "f",
    "é",
    "text",
]


def answers(*markers: str) -> st.SearchStrategy[str]:
    """Texts of every sort: `markers`, halves of them, JSON and pieces of it, and prose."""
    halves = [half for marker in markers for half in (marker[: len(marker) // 2], marker[len(marker) // 2 :])]
    words = st.sampled_from([*markers, *markers, *halves, *FRAGMENTS])
    return st.lists(words | st.text(max_size=3), max_size=14).map("".join)


def cuts(text: str) -> st.SearchStrategy[list[str]]:
    """`text` in pieces."""
    places = st.lists(st.integers(0, len(text)), max_size=12).map(sorted)
    return places.map(lambda ends: [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)])


def deltas(parser: Parser, pieces: Iterable[str]) -> list[Delta]:
    found = [delta for piece in pieces for delta in parser.push(piece)]
    return [*found, *parser.finish()]


def said(parser: Parser, pieces: Iterable[str]) -> Said:
    return total(deltas(parser, pieces))
