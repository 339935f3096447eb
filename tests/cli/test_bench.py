"""`penstock bench`: what it sends, what it shows, and the one line in which it refuses."""

from __future__ import annotations

import io
import json
from collections import Counter
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import pytest
from rich.console import Console

from penstock.cli import main
from penstock.cli.bench import show
from penstock.cli.load_plan import Level, Plan, plan_of
from penstock.config import LoadSettings, LoadTargetSettings, PromptSettings
from penstock.load.prompts import Prefix
from penstock.load.record import Usage
from penstock.load.report import Slo
from tests.load.made import Made, report

GOOD = [Made(0.1 * n, (0.1 * n + 0.5, 0.1 * n + 0.55), 0.1 * n + 0.7, usage=Usage(100, 2, 50)) for n in range(30)]


def plan(
    load: LoadSettings = LoadSettings(),
    prompts: PromptSettings = PromptSettings(),
    targets: LoadTargetSettings = LoadTargetSettings(),
) -> Plan:
    return plan_of(load, prompts, targets)


# Plans


def test_without_flags_there_is_something_short_to_do() -> None:
    made = plan()
    assert made.levels == (Level("concurrency", 8),)
    assert (made.requests, made.most, made.duration_s, made.warmup) == (None, None, 20.0, 4)
    assert (made.prefix, made.slo) == (Prefix(0, 1), Slo(2.0, 0.05, None))
    (turn,) = next(iter(made.sessions(made.levels[0], ""))).turns
    assert (turn.tokens, turn.output_tokens) == (512, 128)


def test_another_run_has_another_seed_unless_it_is_given() -> None:
    assert plan().seed != plan().seed
    assert plan(LoadSettings(seed=3)).seed == 3


def test_a_sweep_has_text_of_its_own_at_each_level() -> None:
    made = plan(LoadSettings(rate=("1,2", "1"), seed=3, requests=5))
    assert made.levels == (Level("rate", 1.0), Level("rate", 2.0))
    one, other = ([s.turns[0].blocks for s in made.sessions(made.levels[0], salt)] for salt in ("a", "b"))
    assert len(one) == 5 and not {tuple(blocks) for blocks in one} & {tuple(blocks) for blocks in other}


def starts(**load: object) -> list[float]:
    made = plan(LoadSettings(rate=("10",), seed=1, **load))  # type: ignore[arg-type]
    return [session.start_s for session in islice(made.sessions(made.levels[0], ""), 4_000)]


def variation(times_s: list[float]) -> float:
    """The coefficient of variation of times between arrivals."""
    gaps = [after - before for before, after in pairwise(times_s)]
    mean = sum(gaps) / len(gaps)
    return float((sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5 / mean)


def test_arrivals() -> None:
    assert starts(arrivals="constant")[:3] == [0.0, 0.1, 0.2]
    assert starts()[-1] == pytest.approx(400, rel=0.1)
    assert variation(starts()) == pytest.approx(1, rel=0.1)
    assert variation(starts(burstiness=0.25)) == pytest.approx(2, rel=0.2)
    assert variation(starts(burstiness=4.0)) == pytest.approx(0.5, rel=0.1)


def test_sessions_of_several_turns() -> None:
    made = plan(prompts=PromptSettings(turns=3, turn_tokens=50, pause_s=2, prefix_tokens=300, prefixes=2))
    sessions = list(islice(made.sessions(made.levels[0], ""), 500))
    turns = [len(session.turns) for session in sessions]
    assert 2.5 < sum(turns) / len(turns) < 3.5
    later = [turn for session in sessions for turn in session.turns[1:]]
    assert {turn.tokens for turn in later} == {50}
    assert sum(turn.after_s for turn in later) / len(later) == pytest.approx(2, rel=0.2)
    assert (made.prefix, made.name) == (Prefix(300, 2), "ISL 512, OSL 128, 3 turns of 50 after 300 shared of 2")


def trace(folder: Path) -> Path:
    """Seven requests, 10 ms apart; all begin with the same block."""
    rows = [{"timestamp": 10 * n, "input_length": 600, "output_length": 9, "hash_ids": [1, 10 + n]} for n in range(7)]
    file = folder / "trace.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_trace_may_be_faster_and_cut(tmp_path: Path) -> None:
    prompts = PromptSettings(trace=trace(tmp_path), max_isl=520, max_osl=5)
    made = plan(LoadSettings(speed=("1,2",)), prompts)
    assert (made.levels, made.most, made.duration_s) == ((Level("speed", 1.0), Level("speed", 2.0)), 7, None)
    sessions = list(made.sessions(made.levels[1], ""))
    assert [session.start_s for session in sessions] == pytest.approx([0.005 * n for n in range(7)])
    assert {(session.turns[0].tokens, session.turns[0].output_tokens) for session in sessions} == {(520, 5)}
    shared = Counter(block for session in sessions for block in session.turns[0].blocks)
    assert sorted(shared.values()) == [1] * 7 + [7]


REFUSED = {
    "--rate 1 --concurrency 1": "--rate and --concurrency are two kinds of load",
    "--rate fast": "--rate fast is no number",
    "--rate 0": "--rate 0 must be above 0",
    "--rate 1,": "--rate 1, has a gap",
    "--concurrency 1.5": "must be whole numbers",
    "--speed 2": "--speed is for a --trace or --workload",
    "--workload chat --rate 1": "--rate is for prompts of --isl",
    "--workload chatt": "did you mean 'chat'?",
    "--workload chat --trace here.jsonl": "name one",
    "--trace here.jsonl": "here.jsonl",
    "--workload chat --max-isl 0": "--max-isl 0 must be 1 or more",
    "--max-osl 3": "--max-osl is for a --trace or --workload",
    "--isl 0": "--isl 0 must be 1 or more",
    "--turns nan": "--turns nan must be 1 or more",
    "--osl-cv -1": "--osl-cv -1 must be 0 or more",
    "--requests 0": "--requests 0 must be 1 or more",
    "--prefixes 0": "--prefixes 0 must be 1 or more",
    "--warmup -1": "--warmup -1 must be 0 or more",
    "--prefix-tokens -1": "--prefix-tokens -1 must be 0 or more",
    "--duration-s 0": "--duration-s 0 must be above 0",
    "--timeout-s 0": "--timeout-s 0 must be above 0",
    "--rate 1 --arrivals constant --burstiness 2": "--burstiness is for --arrivals poisson",
    "--concurrency 1 --burstiness 2": "--burstiness is for --rate",
    "--burstiness 0": "--burstiness 0 must be above 0",
    "--workload chat --isl 9": "--isl is for prompts that are made up",
    "--turn-tokens 9": "--turn-tokens is for --turns above 1",
    "--prefixes 2": "--prefixes is for --prefix-tokens",
    "--slo-e2e 0": "--slo-e2e 0 must be above 0",
    "--body [1]": "--body [1] is no JSON object",
    "--json /no/such/folder/all.json": "cannot write /no/such/folder/all.json",
    "http://127.0.0.1:1": "no server answers at http://127.0.0.1:1 (no connection: Connection refused)",
    "127.0.0.1:8000": "write http://HOST:PORT",
}


@pytest.mark.parametrize("line", REFUSED)
def test_refusals(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["bench", *line.split()])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert REFUSED[line] in error


# What people read


def shown(*levels: float) -> str:
    file = io.StringIO()
    show([report(GOOD, level) for level in levels], Console(file=file, width=140))
    return file.getvalue()


def test_one_measurement_is_told_in_full() -> None:
    text = shown(8)
    assert "tiny at http://127.0.0.1:1: ISL 9, OSL 3; to chat in words, seed 1" in text
    assert "targets: TTFT within 1 s, TPOT within 100 ms" in text
    for part in (
        "TTFT, ms",
        "p99",
        "500.00",
        "50.00",
        "30 of 30 requests ended well in 3.6 s",
        "50.0% of them cached",
    ):
        assert part in text


def test_a_sweep_is_a_table() -> None:
    text = shown(1, 2, 4)
    for part in ("concurrency", "SLO met", "goodput", "cached", "100.0%"):
        assert part in text
    assert "…" not in text


def test_complaints_come_last() -> None:
    file = io.StringIO()
    failed = replace(GOOD[0], error="HTTP 503: overloaded", usage=Usage())
    show([report([*GOOD, failed])], Console(file=file, width=140))
    assert file.getvalue().splitlines()[-1] == "concurrency 8: 1 x HTTP 503: overloaded"
