"""The page of measurements: whole by itself, with a plot against the load where there are several."""

from __future__ import annotations

import pytest

from penstock.load.page import page
from penstock.load.report import Report
from tests.load.made import Made, report
from tests.sim.test_page import read

SOME = [Made(0.1 * n, (0.1 * n + 0.5, 0.1 * n + 0.6), 0.1 * n + 0.7, due_s=0.1 * n) for n in range(30)]


def titles(reports: list[Report]) -> set[str]:
    return set(read(page(reports)).texts["text"])


ALWAYS = {"Time to first token", "Inter-token latency", "End to end", "Requests under way", "Sent late", "target"}


def test_one_measurement() -> None:
    shown = titles([report(SOME)])
    assert shown >= ALWAYS
    assert "SLO attainment" not in shown


@pytest.mark.parametrize("load", ["rate", "concurrency", "speed"])
def test_a_sweep_is_plotted_against_its_load(load: str) -> None:
    reports = [report(SOME, level, load=load) for level in (1, 4)]
    assert titles(reports) >= ALWAYS | {"SLO attainment", "Tokens out", f"{load} 4"}
    assert f"With the {load}" in read(page(reports)).texts["h2"]


def test_what_should_be_known_is_said() -> None:
    told = read(page([report([*SOME, Made(9.0, (), 9.1, error="HTTP 503: <b>")])])).texts["p"]
    assert "concurrency 8: 1 x HTTP 503: <b>" in told


def test_nothing_is_a_page_too() -> None:
    assert "nothing to show" in page([report([])])
