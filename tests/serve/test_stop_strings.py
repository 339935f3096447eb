"""Text ends before the first stop string, and is held back only where one may begin."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from penstock.serve.stop_strings import StopFinder

pieces = st.lists(st.text("ab", max_size=4), max_size=12)
stop_strings = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3)


@given(pieces, stop_strings)
def test_text_ends_before_the_first_stop_string(parts: list[str], stops: list[str]) -> None:
    finder = StopFinder(stops)
    shown = ""
    read = ""
    for part in parts:
        shown += finder.push(part)
        read += part
        starts = [read.find(stop) for stop in stops if stop in read]
        assert bool(finder.found) == bool(starts)
        if finder.found:
            assert shown == read[: min(starts)]
            return
        held = read.removeprefix(shown)
        assert held == "" or any(stop.startswith(held) for stop in stops), "held back for nothing"
    assert shown + finder.finish() == read
