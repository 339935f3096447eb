"""Workloads without a file: when sessions start, times what a session is like.

    generated(Poisson(per_s=4), CHAT, seed=1).until(600)

They have no end; cut them. With the same seed, other arrivals bring the same sessions at other times.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from random import Random
from typing import Protocol

from penstock.workloads.workload import BLOCK_TOKENS, BlockSupply, Session, Turn, Workload


@dataclass(frozen=True, slots=True)
class Spread:
    """A log-normal quantity with this mean and coefficient of variation; 0: always the mean."""

    mean: float
    cv: float = 0.0

    def draw(self, rng: Random) -> float:
        if not self.cv:
            return self.mean
        variance = math.log1p(self.cv**2)
        return rng.lognormvariate(math.log(self.mean) - variance / 2, math.sqrt(variance))

    def draw_count(self, rng: Random) -> int:
        """At least one."""
        return max(1, round(self.draw(rng)))


@dataclass(frozen=True, slots=True)
class Shape:
    """What a session is like. `pause_s` lies between an answer and the next turn: thinking, or a tool at work."""

    first_tokens: Spread
    output_tokens: Spread
    turns: Spread = Spread(1)
    later_tokens: Spread = Spread(1)  # what a turn adds to what was said and answered before
    pause_s: Spread = Spread(0)
    shared_tokens: int = 0  # of a system prompt before the first tokens of every session; in whole blocks


# Plausible, not measured.
CHAT = Shape(
    first_tokens=Spread(1_000, 1.5),
    output_tokens=Spread(350, 0.8),
    turns=Spread(4, 0.8),
    later_tokens=Spread(150, 1.5),
    pause_s=Spread(60, 1.0),
    shared_tokens=1_024,
)
AGENT = Shape(
    first_tokens=Spread(3_000, 1.0),
    output_tokens=Spread(150, 1.0),
    turns=Spread(15, 0.8),
    later_tokens=Spread(1_000, 2.0),
    pause_s=Spread(3, 2.0),
    shared_tokens=8_192,
)


class Arrivals(Protocol):
    """When sessions start."""

    def times_s(self, rng: Random) -> Iterator[float]:
        """Rising, without end."""
        ...


@dataclass(frozen=True, slots=True)
class Poisson:
    """Independent of each other."""

    per_s: float

    def times_s(self, rng: Random) -> Iterator[float]:
        now = 0.0
        while True:
            now += rng.expovariate(self.per_s)
            yield now


@dataclass(frozen=True, slots=True)
class Constant:
    """Equally far from each other."""

    per_s: float

    def times_s(self, rng: Random) -> Iterator[float]:
        return (number / self.per_s for number in count())


@dataclass(frozen=True, slots=True)
class Gamma:
    """Gamma distributed times between arrivals: with `cv` above 1 these cluster, below 1 they keep their distance."""

    per_s: float
    cv: float

    def times_s(self, rng: Random) -> Iterator[float]:
        shape = self.cv**-2
        now = 0.0
        while True:
            now += rng.gammavariate(shape, 1 / (self.per_s * shape))
            yield now


@dataclass(frozen=True, slots=True)
class OnOff:
    """Poisson at `per_s` for about `on_s`, then nobody for about `off_s` (both exponential), and again."""

    per_s: float
    on_s: float
    off_s: float

    def times_s(self, rng: Random) -> Iterator[float]:
        begin_s = 0.0
        while True:
            end_s = begin_s + rng.expovariate(1 / self.on_s)
            now = begin_s + rng.expovariate(self.per_s)
            while now < end_s:
                yield now
                now += rng.expovariate(self.per_s)
            begin_s = end_s + rng.expovariate(1 / self.off_s)


@dataclass(frozen=True, slots=True)
class Diurnal:
    """Poisson at a rate that is a sine: `per_s` on average, and at the peak `swing` (0 to 1) of that more."""

    per_s: float
    swing: float = 0.8
    period_s: float = 86_400.0
    peak_s: float = 50_400.0  # the first peak

    def rate_per_s(self, now: float) -> float:
        return self.per_s * (1 + self.swing * math.cos(2 * math.pi * (now - self.peak_s) / self.period_s))

    def times_s(self, rng: Random) -> Iterator[float]:
        """By thinning (Lewis and Shedler 1979): arrivals at the peak's rate, kept as often as the rate has it."""
        peak_per_s = self.per_s * (1 + self.swing)
        for now in Poisson(peak_per_s).times_s(rng):
            if rng.random() * peak_per_s < self.rate_per_s(now):
                yield now


def generated(arrivals: Arrivals, shape: Shape, seed: int) -> Workload:
    """Sessions of that shape at those times. Shared blocks are the same for workloads of one seed."""
    return Workload(lambda: _generate(arrivals, shape, seed))


def _generate(arrivals: Arrivals, shape: Shape, seed: int) -> Iterator[Session]:
    supply = BlockSupply(f"generated {seed}")
    shared = supply.take(shape.shared_tokens // BLOCK_TOKENS * BLOCK_TOKENS)
    rng = Random(f"sessions {seed}")
    for number, start_s in enumerate(arrivals.times_s(Random(f"arrivals {seed}"))):
        yield Session(f"{seed}:{number}", start_s, _turns(shape, shared, supply, rng))


def _turns(shape: Shape, shared: range, supply: BlockSupply, rng: Random) -> tuple[Turn, ...]:
    tokens = shape.first_tokens.draw_count(rng)
    text = (*shared, *supply.take(tokens))
    turns = [Turn(len(shared) * BLOCK_TOKENS + tokens, text, shape.output_tokens.draw_count(rng))]
    for _ in range(shape.turns.draw_count(rng) - 1):
        tokens = shape.later_tokens.draw_count(rng)
        outputs = shape.output_tokens.draw_count(rng)
        turns.append(Turn(tokens, supply.take(tokens), outputs, shape.pause_s.draw(rng)))
    return tuple(turns)
