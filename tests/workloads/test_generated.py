"""Generated workloads: the statistics that were asked for, and one seed, one workload."""

from __future__ import annotations

import statistics
import subprocess
import sys
from itertools import islice, pairwise
from random import Random

import pytest

from penstock.workloads.generated import (
    AGENT,
    CHAT,
    Arrivals,
    Diurnal,
    Gamma,
    OnOff,
    Poisson,
    Shape,
    Spread,
    generated,
)
from penstock.workloads.mooncake_like import mooncake_like
from penstock.workloads.workload import BLOCK_TOKENS, Workload, blocks_for

PLAIN = Shape(first_tokens=Spread(700, 0.5), output_tokens=Spread(100))


def gaps(arrivals: Arrivals, number: int = 20_000) -> list[float]:
    times = list(islice(arrivals.times_s(Random(5)), number))
    assert times == sorted(times) and times[0] > 0
    return [later - earlier for earlier, later in pairwise(times)]


@pytest.mark.parametrize(
    ("arrivals", "mean_s", "cv"),
    [
        (Poisson(4), 1 / 4, 1),
        (Gamma(4, cv=2.5), 1 / 4, 2.5),
        (Gamma(4, cv=0.3), 1 / 4, 0.3),
    ],
)
def test_gaps_between_arrivals(arrivals: Arrivals, mean_s: float, cv: float) -> None:
    drawn = gaps(arrivals)
    assert statistics.mean(drawn) == pytest.approx(mean_s, rel=0.05)
    assert statistics.stdev(drawn) / statistics.mean(drawn) == pytest.approx(cv, rel=0.05)


def test_on_and_off() -> None:
    drawn = gaps(OnOff(per_s=20, on_s=5, off_s=15))
    assert statistics.mean(drawn) == pytest.approx(1 / 20 * (5 + 15) / 5, rel=0.15)
    assert statistics.median(drawn) < 0.05 and max(drawn) > 30


def test_a_day_has_a_peak_and_a_trough() -> None:
    day = Diurnal(per_s=1, swing=0.5, period_s=1_000, peak_s=250)
    times = list(islice(day.times_s(Random(5)), 20_000))
    hours = [int(at_s % 1_000 // 100) for at_s in times]
    assert hours.count(2) / hours.count(7) == pytest.approx(3, rel=0.1)
    assert len(times) / times[-1] == pytest.approx(1, rel=0.05)


def test_spreads() -> None:
    rng = Random(5)
    drawn = [Spread(300, 1.2).draw(rng) for _ in range(40_000)]
    assert statistics.mean(drawn) == pytest.approx(300, rel=0.05)
    assert statistics.stdev(drawn) == pytest.approx(360, rel=0.15)
    assert Spread(7).draw(rng) == 7
    assert Spread(0.1).draw_count(rng) == 1


@pytest.mark.parametrize("shape", [PLAIN, CHAT, AGENT])
def test_sessions_have_the_shape_that_was_asked_for(shape: Shape) -> None:
    sessions = list(generated(Poisson(1), shape, seed=2).limited(2_000))
    first = [session.turns[0] for session in sessions]
    later = [turn for session in sessions for turn in session.turns[1:]]
    system = shape.shared_tokens // BLOCK_TOKENS
    assert len({turn.blocks[:system] for turn in first}) == 1
    own = [block for turn in first for block in turn.blocks[system:]] + [
        block for turn in later for block in turn.blocks
    ]
    assert len(own) == len(set(own))
    assert all(len(turn.blocks) == blocks_for(turn.tokens) for turn in (*first, *later))
    assert statistics.mean(turn.tokens for turn in first) == pytest.approx(
        shape.shared_tokens + shape.first_tokens.mean, rel=0.1
    )
    assert statistics.mean(len(session.turns) for session in sessions) == pytest.approx(shape.turns.mean, rel=0.1)
    if later:
        assert statistics.mean(turn.after_s for turn in later) == pytest.approx(shape.pause_s.mean, rel=0.1)
        assert statistics.mean(turn.tokens for turn in later) == pytest.approx(shape.later_tokens.mean, rel=0.1)


def test_other_arrivals_bring_the_same_sessions() -> None:
    slow, fast = (list(generated(Poisson(rate), CHAT, seed=4).limited(20)) for rate in (1, 9))
    assert [session.turns for session in slow] == [session.turns for session in fast]
    assert [session.turns for session in slow] != [
        session.turns for session in generated(Poisson(1), CHAT, seed=5).limited(20)
    ]


# The stand-in for Mooncake's trace


def test_mooncake_like_has_the_statistics_of_the_trace() -> None:
    turns = [(session.start_s, session.turns[0]) for session in mooncake_like(seed=1)]
    assert len(turns) == 12_031
    assert turns[-1][0] == pytest.approx(3_537, rel=0.03)
    assert all(start_s % 3 == 0 for start_s, _ in turns)
    assert statistics.mean(turn.tokens for _, turn in turns) == pytest.approx(12_035, rel=0.05)
    assert statistics.mean(turn.output_tokens for _, turn in turns) == pytest.approx(343, rel=0.03)
    assert len({turn.blocks[0] for _, turn in turns}) == 1
    assert hit_rate(mooncake_like(seed=1)) == pytest.approx(0.366, abs=0.02)


def hit_rate(workload: Workload) -> float:
    """Share of blocks found in a cache that keeps everything."""
    known: set[int] = set()
    hits = total = 0
    for session in workload:
        blocks = session.turns[0].blocks
        hits += next((n for n, block in enumerate(blocks) if block not in known), len(blocks))
        total += len(blocks)
        known.update(blocks)
    return hits / total


def test_mooncake_like_blocks_name_prefixes() -> None:
    """A block always has the same block before it, as ids of chained hashes have."""
    before: dict[int, int] = {}
    for session in mooncake_like(seed=3, requests=3_000):
        (turn,) = session.turns
        assert len(turn.blocks) == blocks_for(turn.tokens)
        for earlier, block in pairwise(turn.blocks):
            assert before.setdefault(block, earlier) == earlier


def test_one_seed_is_one_workload_in_every_process() -> None:
    script = """
from penstock.workloads.generated import *
from penstock.workloads.mooncake_like import mooncake_like
from penstock.workloads.workload import merged
print(list(merged(mooncake_like(7), generated(OnOff(5, 1, 1), AGENT, 7)).repeated(2).limited(50)))
"""
    printed = [
        subprocess.run(
            [sys.executable, "-c", script], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert printed[0] == printed[1] != ""
