"""Who makes progress: an engine that computes is alive, however long its steps are; one that stands still is not.

A worker reports how many steps it has made, and how long the call in which its engine is now should take, as it
predicts from its own steps. An engine that has overstayed that by far is stalled. Work that waits is no sign: a prefill
waits for blocks that another worker grants, a sequence for blocks that others hold, and no engine computes meanwhile.

                 steps move, or a call begins              still for longer than `Patience.bound_s`
    (unknown) ------------------------------> (moving) ----------------------------------------> (stalled)
                                                 ^------------- steps move, or the call ends ---------'

Times are of one clock, good for intervals: the worker's own, where its reports say the time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from penstock.cluster import Standing


@dataclass(frozen=True, slots=True)
class Patience:
    """How long an engine may stand still: `times` what its call should take, and at least `floor_s`.

    In its first step an engine compiles, captures and pages in, which no prediction knows of: it has `first_s`. An
    engine that has nothing to compute may take `idle_s` until it has; routers leave it in peace.
    """

    floor_s: float = 10.0
    first_s: float = 60.0
    times: float = 10.0
    idle_s: float = math.inf

    def bound_s(self, steps: int, step_s: float) -> float:
        """After `steps` steps, in a call that should take `step_s`; 0: in none."""
        if step_s <= 0:
            return self.idle_s
        return max(self.floor_s if steps else self.first_s, self.times * step_s)


@dataclass(frozen=True, slots=True)
class Watch:
    """What reports on one engine have shown up to `at_s`: nothing of it has moved for `still_s`."""

    at_s: float
    steps: int
    is_computing: bool
    bound_s: float
    still_s: float = 0.0

    @property
    def is_stalled(self) -> bool:
        return self.still_s > self.bound_s


def watch(before: Watch | None, at_s: float, steps: int, step_s: float, patience: Patience) -> Watch:
    """What is known with one report more of the same engine. A report that comes again changes nothing."""
    now = Watch(at_s, steps, step_s > 0, patience.bound_s(steps, step_s))
    if before is None or (before.steps, before.is_computing) != (now.steps, now.is_computing):
        return now
    return replace(now, still_s=before.still_s + at_s - before.at_s)


class Liveness:
    """Watches the engines of one router's workers. `stalled` has those that stand still now, by worker."""

    def __init__(self, patience: Patience = Patience()) -> None:
        self.stalled: dict[str, Watch] = {}
        self._patience = patience
        self._known: dict[str, tuple[Standing, Watch]] = {}

    def update(self, fleet: Mapping[str, Standing]) -> tuple[dict[str, Watch], dict[str, Watch]]:
        """Takes in the last reports of all who are there.

        Returns those that have stalled since, and those that move again or are another incarnation, as they were last.
        """
        stalled: dict[str, Watch] = {}
        moving: dict[str, Watch] = {}
        for name in [name for name in self._known if name not in fleet]:
            del self._known[name]
            self.stalled.pop(name, None)
        for name, standing in fleet.items():
            known = self._known.get(name)
            if known is not None and known[0] is standing:  # of many, few have reported since
                continue
            now = self._look(known, standing)
            self._known[name] = standing, now
            last = self.stalled.pop(name, None)
            if now.is_stalled:
                self.stalled[name] = now
            if now.is_stalled and last is None:
                stalled[name] = now
            elif last is not None and not now.is_stalled:
                moving[name] = last
        return stalled, moving

    def _look(self, known: tuple[Standing, Watch] | None, standing: Standing) -> Watch:
        load = standing.load
        before = known[1] if known is not None and known[0].member.epoch == standing.member.epoch else None
        return watch(before, load.at_s, load.steps, load.step_s, self._patience)
