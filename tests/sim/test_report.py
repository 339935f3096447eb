"""Reports: the numbers are what a plain loop over the requests finds, and the same bytes come from the same run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from penstock.request import Timeline
from penstock.sim.record import LinkSample, Recorder, WorkerSample
from penstock.sim.report import BUSIEST_LINKS, STRIP_SAMPLES, Report, Slo, summarize
from tests.sim.recorded import SLO, cell, recorded, report


def small() -> Recorder:
    """Four requests: one well within the targets, one slow to begin, one slow to go on, and one that failed."""
    recorder = Recorder()
    for at_s, ttft_s, tpot_s in ((0.0, 0.5, 0.01), (1.0, 2.0, 0.01), (2.0, 0.5, 0.1)):
        row = recorder.begin(at_s, 1000)
        recorder.tokens(row, at_s + ttft_s, 1, 0.0)
        recorder.tokens(row, at_s + ttft_s + 10 * tpot_s, 10, 9 * tpot_s)
        timeline = Timeline(
            decode_worker="decode-0",
            prefill_worker="prefill-0",
            cached_tokens=250,
            computed_tokens=750,
            moved_tokens=1000,
            copied_bytes=2_000,
            prefill_attempts=1,
            preemptions=1,
        )
        recorder.end(row, at_s + ttft_s + 10 * tpot_s, timeline, "")
    recorder.end(recorder.begin(3.0, 1000), 10.0, None, "Overloaded")
    return recorder


def test_targets_are_met_by_both_parts_or_not() -> None:
    told = summarize(small(), cell(), Slo(ttft_s=1.0, itl_s=0.05))
    assert (told.requests, told.ended, told.unfinished, told.errors) == (4, 3, 0, {"Overloaded": 1})
    assert told.duration_s == 10.0
    assert (told.attainment.ttft, told.attainment.tpot, told.attainment.both) == (0.5, 0.5, 0.25)
    assert told.attainment.goodput_per_s == 0.1
    assert told.attainment.goodput_per_gpu_s == 0.1 / 8


def test_latencies_are_of_what_ended_well() -> None:
    latencies = summarize(small(), cell(), SLO).latencies
    assert latencies.ttft is not None and latencies.tpot is not None and latencies.itl is not None
    assert latencies.second_token_gap is not None and latencies.end_to_end is not None
    assert latencies.ttft.count == latencies.tpot.count == 3
    assert (latencies.ttft.p50, latencies.ttft.max, latencies.ttft.mean) == (0.5, 2.0, 1.0)
    assert latencies.tpot.max == pytest.approx(0.1)
    assert latencies.itl.count == 27
    assert latencies.itl.mean == pytest.approx(0.04)
    assert latencies.second_token_gap.p50 == pytest.approx(0.01)
    assert latencies.end_to_end.max == pytest.approx(2.1)
    assert latencies.queue is None


def test_kv_and_throughput() -> None:
    told = summarize(small(), cell(), SLO)
    assert told.kv.hit_share == 0.25
    assert (told.kv.copied_bytes, told.kv.moved_tokens, told.kv.preemptions) == (6_000, 3_000, 3)
    assert told.throughput.output_tokens_per_s == 3.3
    assert told.throughput.prompt_tokens_per_gpu_s == 50


def test_a_single_token_has_no_pace_to_miss() -> None:
    recorder = Recorder()
    row = recorder.begin(0.0, 10)
    recorder.tokens(row, 0.1, 1, 0.0)
    recorder.end(row, 0.1, Timeline(), "")
    told = summarize(recorder, cell(), SLO)
    assert told.attainment.both == 1.0
    assert told.latencies.tpot is None and told.latencies.itl is None


def test_what_is_not_over_is_neither_well_nor_failed() -> None:
    recorder = Recorder()
    recorder.tokens(recorder.begin(0.0, 10), 0.1, 1, 0.0)
    told = summarize(recorder, cell(), SLO)
    assert (told.requests, told.ended, told.unfinished, told.errors) == (1, 0, 1, {})
    assert told.attainment.both == 0.0
    assert told.duration_s == pytest.approx(0.1)


def test_nothing_at_all_can_be_told_too() -> None:
    told = summarize(Recorder(), cell(), SLO)
    assert (told.requests, told.duration_s, told.attainment.both, told.kv.hit_share) == (0, 0.0, 0.0, 0.0)
    assert told.latencies.ttft is None
    assert told.curves.ttft == [] and told.workers == []


def test_tenants_are_told_apart_if_there_are_any() -> None:
    recorder = Recorder()
    for tenant, ttft_s in (("b", 0.5), ("a", 5.0), ("b", 0.5)):
        row = recorder.begin(0.0, 10, tenant)
        recorder.tokens(row, ttft_s, 1, 0.0)
        recorder.end(row, ttft_s, None, "")
    tenants = summarize(recorder, cell(), SLO).tenants
    assert [(tenant.name, tenant.requests, tenant.both) for tenant in tenants] == [("a", 1, 0.0), ("b", 2, 1.0)]
    assert summarize(small(), cell(), SLO).tenants == []


def test_curves_rise_to_one() -> None:
    curves = report().curves
    for curve in (curves.ttft, curves.itl, curves.tpot, curves.second_token_gap, curves.end_to_end, curves.queue):
        values, shares = zip(*curve, strict=True)
        assert list(values) == sorted(values) and list(shares) == sorted(shares)
        assert (shares[0], shares[-1]) == (0.0, 1.0)
        assert 2 <= len(curve) <= 200


def test_workers_in_the_order_of_their_numbers() -> None:
    recorder = Recorder()
    names = [f"prefill-{number}" for number in (0, 10, 2)] + ["spare"]
    for _ in range(300):
        samples = [(name, WorkerSample(1, 2, 3, 0.25 * place, 0.5)) for place, name in enumerate(names)]
        recorder.sample(recorder.next_sample_s, samples, [])
    row = recorder.begin(0.0, 10)
    recorder.end(row, 1.0, Timeline(decode_worker="spare", prefill_worker="prefill-2"), "")
    told = summarize(recorder, cell(), SLO)
    assert [worker.name for worker in told.workers] == ["prefill-0", "prefill-2", "prefill-10", "spare"]
    assert [worker.busy for worker in told.workers] == [0.0, 0.5, 0.25, 0.75]
    assert [(worker.prefilled, worker.decoded) for worker in told.workers] == [(0, 0), (1, 0), (0, 0), (0, 1)]
    assert all(len(worker.strip) <= STRIP_SAMPLES for worker in told.workers)
    assert told.strip_interval_s == 3 * told.queues.interval_s
    assert set(told.queues.running) == {4.0} and set(told.queues.queued_tokens) == {12.0}
    assert set(told.queues.busy) == {0.375}


def test_a_long_step_was_under_way_before_it_ended() -> None:
    recorder = Recorder()
    for busy in (0.5, 0.0, 0.25, 2.5, 0.0):
        recorder.sample(recorder.next_sample_s, [("a", WorkerSample(1, 0, 0, busy, 0.5))], [])
    told = summarize(recorder, cell(), SLO)
    assert told.workers[0].strip == told.queues.busy == [0.5, 0.75, 1.0, 1.0, 0.0]
    assert told.workers[0].busy == pytest.approx(0.65)


def test_busy_links_by_name_the_others_together() -> None:
    recorder = Recorder()
    use = {f"link{number:02}": number / 100 for number in range(20)}
    for factor in (0.5, 1.5):
        recorder.sample(recorder.next_sample_s, [], [(name, LinkSample(share * factor)) for name, share in use.items()])
    told = summarize(recorder, cell(), SLO)
    assert [link.name for link in told.busiest_links] == [f"link{19 - place}" for place in range(BUSIEST_LINKS)]
    assert told.busiest_links[0].mean == pytest.approx(0.19)
    assert told.busiest_links[0].peak == pytest.approx(0.285)
    assert told.busiest_links[0].utilisation == [0.095, 0.285]
    assert (told.other_links.count, told.other_links.peak) == (12, pytest.approx(0.165))
    assert told.other_links.mean == pytest.approx(sum(range(12)) / 12 / 100)


def test_a_report_reads_back() -> None:
    told = report()
    assert msgspec.json.decode(msgspec.json.encode(told), type=Report) == told


def test_the_same_run_makes_the_same_bytes_in_every_process() -> None:
    script = (
        "import sys, msgspec; from tests.sim.recorded import report; from penstock.sim.page import page;"
        "sys.stdout.buffer.write(msgspec.json.encode(report()) + page([report()]).encode())"
    )
    root = Path(__file__).parents[2]
    told = {
        subprocess.run(
            [sys.executable, "-c", script], cwd=root, env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(told) == 1


def test_another_run_makes_other_numbers() -> None:
    assert summarize(recorded(1), cell(), SLO) != summarize(recorded(2), cell(), SLO)
