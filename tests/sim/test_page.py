"""The page: whole by itself, escaped, and with every plot that the reports give reason for."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from penstock.sim.page import page
from penstock.sim.record import Recorder
from penstock.sim.report import Report, summarize
from tests.sim.recorded import SLO, cell, recorded, report

VOID = ("meta",)


class Reader(HTMLParser):
    """Checks that what opens closes, and collects texts by the element that they are in."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.texts.setdefault(self.open[-1], []).append(data)


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


def sweep(**settings: object) -> list[Report]:
    rates, splits = (settings.get(name, default) for name, default in (("rates", (1.0,)), ("splits", ("2:2",))))
    assert isinstance(rates, tuple) and isinstance(splits, tuple)
    policies = ("pairs", "round_robin")
    return [report(policy, rate, split, 0.3 * rate) for rate in rates for split in splits for policy in policies]


def test_a_page_needs_nothing_else() -> None:
    text = page(sweep())
    reader = read(text)
    assert "script" not in reader.texts
    assert not [name for name, _ in reader.attributes if name in ("src", "href") or name.startswith("on")]
    assert not re.search(r"https?:|@import|url\(", text)
    assert "prefers-color-scheme:dark" in text


def rows(reports: list[Report]) -> list[str]:
    return re.findall(r"<tr.*?</tr>", page(reports).partition("<tbody>")[2])


def test_every_cell_has_a_row_and_settings_are_apart() -> None:
    assert ['class="first"' in row for row in rows(sweep(rates=(1.0, 2.0)))] == [True, False, True, False]


def test_the_best_of_what_can_be_compared_is_bold() -> None:
    slow, quick = rows([report("slow", load=1.0), report("quick", load=0.3)])
    assert 'class="best">' + quick.split("<td")[6].partition(">")[2] in quick  # mean TTFT
    assert quick.count("best") > 5 > slow.count("best")
    assert "best" not in "".join(rows([report("slow", load=1.0), report("quick", rate=2.0, load=0.3)]))
    assert "best" not in "".join(rows([report("one"), report("same")]))


def titles(reports: list[Report]) -> set[str]:
    return set(read(page(reports)).texts["text"])


ALWAYS = {"Time to first token", "Inter-token latency", "Gap before the second token", "End to end"} | {
    "Time per output token",
    "Wait before prefill",
    "target",
    "Sequences of all workers",
    "Prompt tokens in queues",
    "Mean over workers",
    "Busiest links",
    "How busy each worker was",
}
SWEPT = {"SLO attainment", "Goodput per GPU", "Cache hits", "TTFT p99"}


def test_plots_of_one_setting() -> None:
    shown = titles(sweep())
    assert shown >= ALWAYS
    assert not SWEPT & shown
    assert {"decode-0", "prefill-1", "pairs", "round_robin", "running", "waiting"} <= shown


def test_plots_against_the_rate() -> None:
    shown = titles(sweep(rates=(1.0, 4.0), splits=("2:2", "1:3")))
    assert shown >= ALWAYS | SWEPT
    assert {"pairs 2:2", "pairs 1:3", "1", "4"} <= shown


def test_plots_against_the_split() -> None:
    shown = titles(sweep(splits=("2:2", "1:3")))
    assert shown >= ALWAYS | SWEPT
    assert {"2:2", "1:3", "prefill:decode workers"} <= shown


def test_what_others_wrote_is_escaped() -> None:
    text = page([report('<b>"p"</b>', split="<2>&2"), report("other", split="<2>&2")])
    reader = read(text)
    assert "<b>" not in text and "<2>" not in text
    assert '<b>"p"</b>' in reader.texts["td"] and "<2>&2" in reader.texts["td"]


def test_hovering_tells_values() -> None:
    told = read(page([report()])).texts["title"]
    assert any(re.fullmatch(r"pairs: [\d.]+ at [\d.e-]+", title) for title in told)
    assert any(title.startswith("decode-0: busy ") for title in told)


def test_failures_are_told() -> None:
    recorder = recorded(1, load=1.0)
    recorder.begin(30.0, 5)
    told = read(page([summarize(recorder, cell(), SLO)])).texts["p"]
    assert any("x Overloaded" in line and "1 were not over at the end" in line for line in told)


@pytest.mark.parametrize("recorder", [Recorder(), recorded(1, requests=1)])
def test_next_to_nothing_is_a_page_too(recorder: Recorder) -> None:
    assert "nothing to show" in page([summarize(recorder, cell(), SLO)])
