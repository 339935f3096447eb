"""What can go wrong in a virtual cluster, besides what the cluster does to itself."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from random import Random

from penstock.engine.api import Step
from penstock.engine.simulated import Options, SimulatedEngine
from penstock.errors import EngineFailed
from penstock.request import Token


@dataclass(frozen=True, slots=True)
class Weather:
    """How frames fare between processes: chances per frame, delays in seconds.

    Each frame takes between `delay_s` and `delay_s + jitter_s`, so jitter reorders. `only` limits losses and repeats
    to frames between endpoints whose names start with one of its pairs' names.
    """

    delay_s: float = 50e-6
    jitter_s: float = 0.0
    drop: float = 0.0
    repeat: float = 0.0
    only: tuple[tuple[str, str], ...] = ()

    def fate(self, rng: Random, source: str, destination: str) -> list[float]:
        """Delays of the copies that arrive."""
        if not (self.drop or self.repeat or self.jitter_s):
            return [self.delay_s]
        if self.only and not any({source.split("-")[0], destination.split("-")[0]} == set(pair) for pair in self.only):
            return [self.delay_s]
        copies = 0 if rng.random() < self.drop else 2 if rng.random() < self.repeat else 1
        return [self.delay_s + rng.random() * self.jitter_s for _ in range(copies)]


FAIR = Weather()


class Fate:
    """What becomes of one process's engine: it can be frozen in mid-step, to write on later, and killed."""

    def __init__(self) -> None:
        self._is_dead = False
        self._thawed = asyncio.Event()
        self._thawed.set()

    def freeze(self) -> None:
        self._thawed.clear()

    def thaw(self) -> None:
        self._thawed.set()

    def kill(self) -> None:
        self._is_dead = True
        self._thawed.set()

    async def live_on(self) -> None:
        """Returns when it is not frozen. Raises EngineFailed once it is dead."""
        await self._thawed.wait()
        if self._is_dead:
            raise EngineFailed("this process was killed")


class MortalEngine(SimulatedEngine):
    """A simulated engine that meets its fate between the pieces of a step."""

    def __init__(self, options: Options, fate: Fate) -> None:
        super().__init__(options)
        self._fate = fate
        self.steps_begun = 0

    async def step(self, step: Step) -> list[Token | None]:
        self.steps_begun += 1
        await self._fate.live_on()
        return await super().step(step)

    async def pass_time(self, seconds: float) -> None:
        await super().pass_time(seconds)
        await self._fate.live_on()
