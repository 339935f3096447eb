"""`penstock simulate`: what it plays, in which processes, what it shows, and the one line in which it refuses."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from penstock.cli import main
from penstock.cli.output import OnProgress, as_json
from penstock.cli.simulate import Plan, plans, play, play_all, show, split_name
from penstock.config import SimulationSettings, TargetSettings
from penstock.errors import SetupError
from penstock.sim import cluster_file
from penstock.sim.cluster import ClusterSpec
from penstock.sim.record import Recorder
from penstock.sim.report import Report, Slo, summarize
from penstock.sim.simulation import Fault
from penstock.workloads.workload import Workload
from tests.sim.recorded import cell, recorded, report

command = import_module("penstock.cli.simulate")  # `penstock.cli.simulate` is its function
PLAN = Plan(None, "mooncake-like", 10, "pairs", 1.0, None, 0, Slo())


def told(plan: Plan, on_progress: OnProgress) -> Report:
    """Stands for a simulation, in another process too."""
    for done in range(101):
        on_progress(done / 100)
    return summarize(recorded(plan.seed, requests=20), cell(plan.policy, plan.rate), plan.slo)


def refuses(plan: Plan, on_progress: OnProgress) -> Report:
    raise SetupError(f"no {plan.policy}, sorry")


def dies(plan: Plan, on_progress: OnProgress) -> Report:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def quick(
    cluster: ClusterSpec,
    workload: Workload,
    policy: str,
    seed: int,
    recorder: Recorder,
    ended: Callable[[int], None],
    faults: tuple[Fault, ...],
) -> None:
    """Stands for `simulation.simulate`: every request takes a second."""
    for number, session in enumerate(workload, 1):
        row = recorder.begin(session.start_s, session.turns[0].tokens)
        recorder.tokens(row, session.start_s + 1, 1, 0.0)
        recorder.end(row, session.start_s + 1, None, "")
        ended(number)


def sweep(**settings: object) -> list[Plan]:
    return plans(replace(SimulationSettings(requests=10), **settings), TargetSettings())  # type: ignore[arg-type]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit:
        main(["simulate", *arguments])
    assert not exit.value.code
    return capsys.readouterr().out


# Plans


def test_without_flags_there_is_something_small_to_play() -> None:
    (plan,) = plans(SimulationSettings(), TargetSettings())
    assert plan == Plan(None, "mooncake-like", 500, "pairs", 1.0, None, 0, Slo(2.0, 0.05))


def test_a_sweep_is_every_policy_at_every_rate_with_every_split() -> None:
    made = sweep(policy=("pairs,random", "pairs"), rate=("2", "1,1.0"), split=("4:4,6:2",))
    assert [(plan.rate, plan.split, plan.policy) for plan in made] == [
        (rate, split, policy) for rate in (2.0, 1.0) for split in ((4, 4), (6, 2)) for policy in ("pairs", "random")
    ]


def test_a_workload_is_counted_and_may_be_cut(tmp_path: Path) -> None:
    rows = [{"timestamp": 10 * n, "input_length": 5, "output_length": 2, "hash_ids": [n]} for n in range(7)]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [plan.requests for plan in sweep(trace=trace, requests=None)] == [7]
    assert [plan.requests for plan in sweep(trace=trace, requests=3)] == [3]
    assert [plan.requests for plan in sweep(trace=trace, requests=30)] == [7]


REFUSED = {
    "--policy rond_robin": "did you mean 'round_robin'?",
    "--policy pairs,": "--policy pairs, has a gap",
    "--rate 0": "--rate 0 must be above 0",
    "--rate fast": "--rate fast is no number",
    "--rate nan": "--rate nan must be above 0",
    "--split 8": "--split 8 is no split: write PREFILL:DECODE",
    "--split 5:4": "5:4",
    "--trace here.jsonl --workload chat": "name one",
    "--trace here.jsonl": "here.jsonl",
    "--cluster here.yaml": "here.yaml",
    "--requests 0": "--requests 0",
    "--jobs 0": "--jobs 0",
    "--slo-ttft 0": "--slo-ttft 0 must be above 0",
    "--slo-itl inf": "--slo-itl inf must be",
    "--html /no/such/folder/page.html": "cannot write /no/such/folder/page.html",
    "--json /no/such/folder/all.json": "cannot write /no/such/folder/all.json",
}


@pytest.mark.parametrize("line", REFUSED)
def test_refusals(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["simulate", *line.split()])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert REFUSED[line] in error


def test_a_mistake_in_a_trace_is_found_before_anything_is_played(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"timestamp": 0, "input_length": 5, "output_length": 2, "hash_ids": []}\n')
    with pytest.raises(SetupError, match=r"trace.jsonl, line 1: hash_ids"):
        sweep(trace=trace)
    trace.write_text("")
    with pytest.raises(SetupError, match=r"trace.jsonl has no requests"):
        sweep(trace=trace)


# Playing


def test_several_are_played_in_processes_of_their_own() -> None:
    sweep = [replace(PLAN, policy=policy, seed=seed) for seed, policy in enumerate(("a", "b", "c"))]
    shares: list[float] = []
    reports = play_all(sweep, 2, told, shares.append)
    assert reports == [told(plan, lambda share: None) for plan in sweep]
    assert shares == sorted(shares)
    assert shares[0] < 0.5 and shares[-1] == pytest.approx(1)


def test_a_refusal_in_a_process_is_a_refusal() -> None:
    with pytest.raises(SetupError, match="no pairs, sorry"):
        play_all([PLAN, replace(PLAN, seed=1)], 1, refuses, lambda share: None)


def test_a_process_that_dies_is_told() -> None:
    with pytest.raises(SetupError, match=r"pairs at rate 1, split 2:6 died with exit status -9"):
        play_all([replace(PLAN, split=(2, 6)), replace(PLAN, seed=1)], 1, dies, lambda share: None)


def test_a_plan_is_played_at_its_rate_with_its_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "simulate_one", quick)
    shares: list[float] = []
    slow, fast = (command.play(replace(PLAN, rate=rate, split=(5, 3)), shares.append) for rate in (1.0, 10.0))
    assert (slow.requests, slow.cell.split, slow.cell.gpus) == (10, "5:3", 8)
    assert fast.duration_s - 1 == pytest.approx((slow.duration_s - 1) / 10)
    assert shares == pytest.approx([share / 10 for share in range(1, 11)] * 2)


def test_splits_have_short_names() -> None:
    cluster = cluster_file.default()
    assert split_name(cluster) == "4:4"
    either = tuple(replace(worker, role="any") for worker in cluster.workers)
    assert split_name(replace(cluster, workers=either)) == "8 any"
    assert split_name(replace(cluster, workers=cluster.workers[:2] + either[2:])) == "1:1 + 6 any"


# What is shown


def test_people_read_a_table() -> None:
    shown = io.StringIO()
    reports = [report(policy, rate) for rate in (1.0, 2.0) for policy in ("pairs", "[b]random")]
    show(reports, Console(file=shown, width=140))
    text = shown.getvalue()
    assert "mooncake-like on one-node, 8 GPUs; targets: TTFT within 1 s, TPOT within 20 ms" in text
    for part in ("[b]random", "SLO met", "goodput", "moved GB", "200", "2:2", "2 x Overloaded"):
        assert part in text
    assert "…" not in text


def test_a_narrow_terminal_loses_no_digits() -> None:
    wide, narrow = io.StringIO(), io.StringIO()
    show([report()], Console(file=wide, width=200))
    show([report()], Console(file=narrow, width=80))
    assert "…" not in narrow.getvalue()
    assert sum(map(str.isdigit, wide.getvalue())) == sum(map(str.isdigit, narrow.getvalue()))


def test_json_is_one_object_with_a_line_for_each_report() -> None:
    reports = [report("a"), report("b")]
    text = as_json(reports)
    assert text.count("\n") == 4
    assert msgspec.convert(json.loads(text)["reports"], list[Report]) == reports


def test_files_are_written_and_the_table_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "simulate_one", quick)
    out, page = tmp_path / "all.json", tmp_path / "page.html"
    shown = run(capsys, "--requests", "10", "--json", str(out), "--html", str(page))
    assert "pairs" in shown and "TTFT" in shown
    assert json.loads(out.read_text())["reports"][0]["requests"] == 10
    assert page.read_text().startswith("<!doctype html>")
    assert json.loads(run(capsys, "--requests", "10", "--json", "-"))["reports"][0]["requests"] == 10


def test_the_real_thing(capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads(run(capsys, "--requests", "20", "--policy", "pairs,round_robin", "--jobs", "2", "--json", "-"))
    for one in told["reports"]:
        assert (one["requests"], one["ended"], one["errors"]) == (20, 20, {})
        assert one["latencies"]["ttft"]["count"] == 20
        assert one["workers"] and one["queues"]["running"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("soon:crash:decode-0", "has no time"),
        ("-1:crash:decode-0", "is none"),
        ("5:smash:decode-0", "for VERB crash, start"),
        ("5:crash:", "is none"),
        ("5:crash:decode-9", "no worker is called decode-9"),
    ],
)
def test_a_fault_that_cannot_be_is_named(text: str, why: str) -> None:
    with pytest.raises(SetupError, match=why):
        plans(SimulationSettings(fault=(text,)), TargetSettings())


def test_a_crash_costs_those_who_were_there_time_alone() -> None:
    def played(*fault: str) -> Report:
        (plan,) = plans(SimulationSettings(requests=60, rate=("8",), fault=fault), TargetSettings())
        return play(plan, lambda share: None)

    calm, crashed = played(), played("5:crash:decode-0")
    assert (crashed.errors, crashed.ended) == ({}, 60)
    assert crashed.latencies.itl.max > calm.latencies.itl.max
