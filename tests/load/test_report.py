"""Reports: every figure is what a plain loop over made-up requests finds."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.load.record import Recorder, Usage
from penstock.load.report import Slo, complaints, summarize
from tests.load.made import SLO, Made, cell, recorded, report

GOOD = Made(10.0, (10.5, 10.6, 10.8), 10.9, due_s=9.9, asked=3, usage=Usage(100, 3, 64))
SLOW = Made(11.0, (13.0, 13.1), 13.2, due_s=11.0, asked=2, usage=Usage(50, 2, 0))
FAILED = Made(12.0, (12.5,), 12.6, due_s=12.0, error="HTTP 503")
OPEN = Made(13.0, (13.5,), due_s=13.0)


def test_one_good_request_by_hand() -> None:
    told = report([GOOD])
    latencies, tokens = told.latencies, told.tokens
    assert latencies.ttft is not None and latencies.itl is not None and latencies.tpot is not None
    assert latencies.second_token_gap is not None and latencies.end_to_end is not None
    assert latencies.ttft.p50 == latencies.ttft.p99 == pytest.approx(0.5)
    assert (latencies.itl.count, latencies.itl.mean) == (2, pytest.approx(0.15))
    assert latencies.tpot.p50 == pytest.approx(0.15)
    assert latencies.second_token_gap.p50 == pytest.approx(0.1)
    assert latencies.end_to_end.p50 == pytest.approx(0.9)
    assert (told.requests, told.ended, told.unfinished, told.errors) == (1, 1, 0, {})
    assert told.duration_s == pytest.approx(0.9)
    assert told.throughput.total_tokens_per_s == pytest.approx(103 / 0.9)
    assert (tokens.prompt, tokens.output, tokens.cached, tokens.hit_share) == (100, 3, 64, 0.64)
    assert told.generated.lateness is not None and told.generated.lateness.max == pytest.approx(0.1)


def test_a_stop_leaves_what_was_under_way_open() -> None:
    told = report([GOOD, SLOW, FAILED, OPEN])
    assert (told.requests, told.ended, told.unfinished, told.errors) == (4, 2, 1, {"HTTP 503": 1})
    assert told.latencies.ttft is not None and told.latencies.ttft.count == 2
    assert told.throughput.requests_per_s == pytest.approx(2 / 3.5)
    assert told.throughput.output_tokens_per_s == pytest.approx(7 / 3.5)  # of all that came
    assert told.course.running == [1, 2, 2, 1]
    assert told.course.events_per_s == [3, 0, 1, 3]


@pytest.mark.parametrize(
    ("slo", "met"),
    [
        (Slo(1.0, 0.2), 0.5),  # the slow one is too late
        (Slo(3.0, 0.12), 0.5),  # the good one's tokens are too far apart
        (Slo(3.0, 0.2), 1.0),
        (Slo(3.0, 0.2, 1.0), 0.5),  # the slow one takes too long
        (Slo(0.1, 0.01, 0.1), 0.0),
    ],
)
def test_goodput_is_of_requests_that_meet_every_target(slo: Slo, met: float) -> None:
    told = report([GOOD, SLOW], slo=slo).attainment
    assert told.all == met
    assert told.goodput_per_s == pytest.approx(met * 2 / 3.2)


def test_what_the_server_does_not_count_is_counted_by_events() -> None:
    told = report([Made(0.0, (1.0, 2.0), 2.0, asked=2)])
    assert (told.tokens.output, told.tokens.unknown, told.tokens.cached, told.tokens.hit_share) == (2, 1, None, None)
    assert told.latencies.tpot is not None and told.latencies.tpot.mean == 1.0
    assert any("without usage" in line for line in complaints(told))


def test_several_tokens_in_an_event_are_noted() -> None:
    told = report([Made(0.0, (1.0, 2.0), 2.0, asked=5, usage=Usage(1, 5))])
    assert told.tokens.per_event == 2.5
    assert told.latencies.tpot is not None and told.latencies.tpot.mean == 0.25
    assert told.latencies.itl is not None and told.latencies.itl.mean == 1.0
    assert any("2.50 tokens per event" in line for line in complaints(told))


def test_a_generator_that_is_too_slow_says_so() -> None:
    late = report([Made(1.0, (1.5,), 1.6, due_s=0.5, usage=Usage(1, 1))])
    assert any("sent late (p99 500 ms)" in line for line in complaints(late))
    recorder = recorded([GOOD])
    recorder.cpu_s = 0.85
    busy = summarize(recorder, cell(), SLO)
    assert busy.generated.busy == pytest.approx(0.85 / 0.9)
    assert any("94% of a core" in line for line in complaints(busy))
    assert complaints(report([SLOW])) == []


def test_nothing_is_a_report_too() -> None:
    told = summarize(Recorder(), cell(), SLO)
    assert (told.requests, told.duration_s, told.latencies.ttft, told.attainment.all) == (0, 0.0, None, 0.0)


TICKS = st.integers(0, 2_000)


@st.composite
def requests(draw: st.DrawFn) -> Made:
    """In milliseconds that doubles hold exactly (1/1024 s)."""
    sent = draw(TICKS)
    events = sorted(sent + tick for tick in draw(st.lists(TICKS, max_size=6)))
    is_open = draw(st.booleans())
    usage = draw(st.sampled_from((Usage(), Usage(7, len(events) + draw(st.integers(0, 3))), Usage(9, 4, 5))))
    return Made(
        sent_s=sent / 1024,
        events_s=tuple(event / 1024 for event in events),
        ended_s=None if is_open else max([sent, *events]) / 1024 + draw(TICKS) / 1024,
        due_s=draw(st.sampled_from((None, sent / 1024 - 0.25))),
        usage=Usage() if is_open else usage,
        error="" if is_open else draw(st.sampled_from(("", "", "timeout"))),
    )


def mean(values: list[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


@given(st.lists(requests(), max_size=8))
def test_any_requests_come_to_what_a_loop_finds(made: list[Made]) -> None:
    told = report(sorted(made, key=lambda one: one.sent_s))
    good = [one for one in made if one.is_good]
    begun = [one for one in good if one.events_s]
    means = {
        name: None if spread is None else spread.mean
        for name, spread in ((name, getattr(told.latencies, name)) for name in told.latencies.__struct_fields__)
    }
    assert means == {
        "ttft": mean([one.events_s[0] - one.sent_s for one in begun]),
        "itl": pytest.approx(mean([gap for one in made for gap in one.gaps_s])),
        "tpot": mean([one.tpot_s for one in good if one.tpot_s is not None]),
        "second_token_gap": mean([one.gaps_s[0] for one in good if one.gaps_s]),
        "end_to_end": mean([one.ended_s - one.sent_s for one in good if one.ended_s is not None]),
    }
    ends = [at_s for one in made for at_s in (one.sent_s, *one.events_s, one.ended_s) if at_s is not None]
    assert told.duration_s == (max(ends) - min(ends) if ends else 0.0)
    met = [
        one
        for one in begun
        if one.ended_s is not None
        and one.events_s[0] - one.sent_s <= SLO.ttft_s
        and (one.tpot_s is None or one.tpot_s <= SLO.itl_s)
    ]
    assert told.attainment.all == (len(met) / len(made) if made else 0.0)
    assert told.ended == len(good)
    assert told.unfinished == len([one for one in made if one.ended_s is None])
    assert told.tokens.output == sum(one.tokens for one in good)
    assert sum(told.course.events_per_s) * told.course.interval_s == sum(len(one.events_s) for one in made)
