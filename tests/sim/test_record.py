"""The recorder: what clients saw, in columns; gaps in buckets; samples that never become too many."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.request import Timeline
from penstock.sim.record import (
    FIRST_INTERVAL_S,
    MOST_SAMPLES,
    LinkSample,
    Recorder,
    Series,
    WorkerSample,
)


def test_what_a_client_sees_of_one_request() -> None:
    recorder = Recorder()
    row = recorder.begin(10.0, 300, "a")
    recorder.tokens(row, 11.0, 1, 0.0)
    recorder.tokens(row, 11.5, 1, 0.0)
    recorder.tokens(row, 11.6, 1, 0.0)
    recorder.tokens(row, 12.0, 3, 0.2)  # at 11.8, 11.9 and 12.0
    timeline = Timeline(
        decode_worker="d",
        prefill_worker="p",
        cached_tokens=128,
        computed_tokens=172,
        moved_tokens=300,
        copied_bytes=5_000_000_000,
        prefill_attempts=2,
        preemptions=1,
        prefill_started_s=0.25,
    )
    recorder.end(row, 12.1, timeline, "")
    requests = recorder.requests()
    times = (
        requests.begun_s,
        requests.first_s,
        requests.second_s,
        requests.last_s,
        requests.ended_s,
        requests.queued_s,
    )
    assert [column.tolist() for column in times] == [[10.0], [11.0], [11.5], [12.0], [12.1], [0.25]]
    assert requests.output_tokens.tolist() == [6]
    assert requests.prompt_tokens.tolist() == [300]
    assert requests.cached_tokens.tolist() == [128]
    assert requests.computed_tokens.tolist() == [172]
    assert requests.moved_tokens.tolist() == [300]
    assert requests.copied_bytes.tolist() == [5_000_000_000]
    assert (requests.attempts.tolist(), requests.preemptions.tolist()) == ([2], [1])
    assert recorder.worker_names[requests.decode_worker[0]] == "d"
    assert recorder.worker_names[requests.prefill_worker[0]] == "p"
    assert recorder.tenant_names[requests.tenant[0]] == "a"
    assert recorder.error_kinds[requests.error[0]] == ""
    gaps = recorder.gaps  # 0.1, 0.2, 0.1, 0.1; not the 0.5 between the first two
    assert (gaps.count, gaps.most) == (4, pytest.approx(0.2))
    assert gaps.total == pytest.approx(0.5)


def test_the_first_tokens_may_come_together() -> None:
    recorder = Recorder()
    row = recorder.begin(0.0, 1)
    recorder.tokens(row, 2.0, 5, 0.4)
    requests = recorder.requests()
    assert requests.first_s[0] == pytest.approx(1.6)
    assert requests.second_s[0] == pytest.approx(1.7)
    assert requests.last_s[0] == 2.0
    assert recorder.gaps.count == 3
    recorder.tokens(row, 3.0, 2, 0.5)
    assert recorder.requests().second_s[0] == pytest.approx(1.7)
    assert recorder.gaps.count == 5


def test_an_end_without_tokens_is_no_token() -> None:
    recorder = Recorder()
    row = recorder.begin(0.0, 1)
    recorder.tokens(row, 1.0, 1, 0.0)
    recorder.tokens(row, 9.0, 0, 0.0)
    requests = recorder.requests()
    assert requests.output_tokens[0] == 1
    assert requests.last_s[0] == 1.0


@given(st.lists(st.tuples(st.integers(1, 5), st.floats(0, 1), st.floats(0, 1)), min_size=1))
def test_every_gap_is_recorded_once(frames: list[tuple[int, float, float]]) -> None:
    """However tokens are split into frames: gaps add up to the time from second to last token, one for each token."""
    recorder = Recorder()
    row = recorder.begin(0.0, 1)
    at_s, total = 1.0, 0
    for count, pause_s, over_s in frames:
        over_s = over_s if count > 1 else 0.0
        at_s += pause_s + over_s
        recorder.tokens(row, at_s, count, over_s)
        total += count
    requests = recorder.requests()
    assert requests.output_tokens[0] == total
    assert recorder.gaps.count == max(0, total - 2)
    if total >= 2:
        assert requests.first_s[0] - 1e-9 <= requests.second_s[0] <= requests.last_s[0] + 1e-9
        assert recorder.gaps.total == pytest.approx(requests.last_s[0] - requests.second_s[0], abs=1e-9)


def test_what_did_not_happen_is_nan_or_zero() -> None:
    recorder = Recorder()
    open_row, failed = recorder.begin(0.0, 7), recorder.begin(1.0, 8)
    recorder.end(failed, 2.0, None, "Overloaded")
    requests = recorder.requests()
    assert np.isnan(requests.first_s).all() and np.isnan(requests.queued_s).all()
    assert math.isnan(requests.ended_s[open_row]) and requests.ended_s[failed] == 2.0
    assert requests.decode_worker.tolist() == [0, 0] and recorder.worker_names == [""]
    assert [recorder.error_kinds[error] for error in requests.error] == ["", "Overloaded"]


def worker(busy: float) -> WorkerSample:
    return WorkerSample(running=3, waiting=2, queued_tokens=100, busy=busy, used=0.5)


def test_samples_are_asked_for_less_and_less_often_and_stay_few() -> None:
    recorder, rng = Recorder(), Random(1)
    busy, asked = [], 0
    while recorder.next_sample_s < 3600:
        asked += 1
        busy.append((recorder.interval_s, value := rng.random()))
        recorder.sample(recorder.next_sample_s, [("a", worker(value))], [("x", LinkSample(value))])
        assert len(recorder.workers) == len(recorder.links) < MOST_SAMPLES
    assert asked < 4 * MOST_SAMPLES
    covered_s = len(recorder.workers) * recorder.interval_s
    assert covered_s == pytest.approx(sum(interval for interval, _ in busy), abs=recorder.interval_s)
    mean = sum(interval * value for interval, value in busy) / sum(interval for interval, _ in busy)
    assert recorder.workers.of("busy").mean() == pytest.approx(mean, rel=0.02)
    assert recorder.links.of("utilisation").mean() == pytest.approx(mean, rel=0.02)
    assert set(recorder.workers.of("running").flat) == {3.0}


def test_a_late_sample_moves_the_next_one() -> None:
    recorder = Recorder()
    recorder.sample(FIRST_INTERVAL_S + 0.1, [], [])
    assert recorder.next_sample_s == pytest.approx(2 * FIRST_INTERVAL_S + 0.1)


def test_workers_may_come_and_go() -> None:
    series = Series(("busy",))
    series.add([("a", (0.5,))])
    series.add([("b", (1.0,)), ("a", (0.25,))])
    series.add([("b", (0.75,))])
    assert series.names == ["a", "b"]
    assert series.of("busy").tolist() == [[0.5, 0.0], [0.25, 1.0], [0.0, 0.75]]
    series.add([])
    series.halve()
    assert series.of("busy").tolist() == [[0.375, 0.5], [0.0, 0.375]]
