"""What moving KV between workers costs now: the wiring as a tree, and what is decided to go over each of its links.

A worker climbs from domain to domain: out of its node, its rack, its pod. Two of them meet in the smallest domain that
both are in, so a transfer takes the climb of one and the descent of the other, and is as fast as the slowest step. All
workers in a domain share the step that leads out of it, and by how much transfers to come will fill it is known here:
each is counted with its bytes over the time until it should be done.
"""

from __future__ import annotations

import math
from collections.abc import Container, Hashable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from penstock.fabric import Fabric

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]

MOST_BUSY = 0.9  # a link counts as no busier: what is decided for it may not all come at once


class Rung(NamedTuple):
    """One step of a climb, into `domain`, and back: seconds per byte of its slowest link, and seconds on the way.

    Steps with equal gates share that link. A step may cost nothing, where another path than that to here is taken.
    """

    domain: str
    up_s: float = 0.0
    down_s: float = 0.0
    latency_s: float = 0.0
    up_gate: Hashable = None
    down_gate: Hashable = None


class Wiring(Protocol):
    """Where workers are wired to, where that is known."""

    def climb(self, device: str) -> Sequence[Rung]:
        """From the worker on that device (`Member.device`) to the domain that holds all. Raises BadTopology."""
        ...


class Climber:
    """Finds the rungs of workers on one or several devices of `fabric`, once."""

    def __init__(self, fabric: Fabric) -> None:
        self._fabric = fabric
        self._known: dict[Sequence[str], Sequence[Rung]] = {}

    def climb(self, devices: tuple[str, ...]) -> Sequence[Rung]:
        """Links that the devices cross side by side count as one with the sum of their rates."""
        if (rungs := self._known.get(devices)) is None:
            rungs = self._known[devices] = list(self._find(devices))
        return rungs

    def _find(self, devices: tuple[str, ...]) -> Iterator[Rung]:
        """Only domains in which somebody is met that was not met below; only links that were not crossed below."""
        fabric, met, crossed = self._fabric, set(devices), set[int]()
        kind = fabric.vertex(devices[0]).kind
        for domain in fabric.failure_domains(devices[0]):
            span = fabric.span(domain)
            others = [name for name in fabric.devices[span.start : span.stop] if name not in met]
            alike = [name for name in others if fabric.vertex(name).kind == kind]
            if not alike:
                continue
            met.update(others)
            ups = [fabric.path(device, alike[-1]).links for device in devices]
            downs = [fabric.path(alike[-1], device).links for device in devices]
            up_s, up_gate = self._slowest(ups, "down", crossed)
            down_s, down_gate = self._slowest(downs, "up", crossed)
            latency_s = max(
                sum(fabric.links[number].latency_s for number in self._half(links, "down")) for links in ups
            )
            crossed.update(number for links in (*ups, *downs) for number in links)
            yield Rung(domain, up_s, down_s, latency_s, up_gate, down_gate)

    def _slowest(self, paths: Sequence[Sequence[int]], without: str, crossed: Container[int]) -> tuple[float, Hashable]:
        """Seconds per byte of the slowest hop of one half, and the links that it consists of."""
        halves = [[n for n in self._half(links, without) if n not in crossed] for links in paths]
        hops = [
            tuple(dict.fromkeys(half[hop] for half in halves if hop < len(half)))
            for hop in range(max(map(len, halves)))
        ]
        return max(
            ((1 / sum(self._fabric.links[n].bytes_per_s for n in hop), hop) for hop in hops), default=(0.0, None)
        )

    def _half(self, links: Sequence[int], without: str) -> list[int]:
        return [number for number in links if self._fabric.links[number].way != without]


class Ways:
    """Between the workers of one roster; columns are theirs, rows are levels of domains, the smallest first.

    `domains` equal in a row: they meet there, if not below. `latency_s` is of the whole climb to there.
    """

    def __init__(self, networks: Indices, climbs: Sequence[Sequence[Rung]]) -> None:
        """Who is in no common network (-1, or another number) never meets.

        An empty climb is that of a worker of which it is not known where it is: all others are equally near to it.
        """
        workers = len(networks)
        if len({climb[-1].domain if climb else "" for climb in climbs}) > 1:
            climbs = [[*climb, Rung("", latency_s=climb[-1].latency_s if climb else 0.0)] for climb in climbs]
        levels = max(1, *(len(climb) for climb in climbs)) if workers else 1
        self.domains = np.zeros((levels, workers), np.intp)
        self.latency_s = np.zeros((levels, workers))
        self._idle_s = np.zeros((2, levels, workers))  # seconds per byte of each step: up, down
        self._gates = np.zeros((2, levels, workers), np.intp)  # by number: the shared link of each step
        self._under: dict[int, list[int]] = {}  # workers that climb through a gate, by its number
        numbers: dict[Hashable, int] = {}
        gates: dict[Hashable, int] = {}
        for worker, climb in enumerate(climbs):
            network = int(networks[worker]) if networks[worker] >= 0 else -1 - worker
            padded = [None] * (levels - len(climb)) + list(climb)
            for level, rung in enumerate(padded):
                place: Hashable = rung.domain if rung is not None else "" if not climb else (worker,)
                self.domains[level, worker] = numbers.setdefault((network, place), len(numbers))
                step = rung or Rung("")
                self._idle_s[:, level, worker] = step.up_s, step.down_s
                self.latency_s[level, worker] = step.latency_s
                for way, (gate, byte_s) in enumerate(((step.up_gate, step.up_s), (step.down_gate, step.down_s))):
                    number = self._gates[way, level, worker] = gates.setdefault((way, gate), len(gates))
                    if byte_s:
                        self._under.setdefault(number, []).append(worker)
        self._loads = np.zeros(len(gates))  # bytes per second that are decided, by gate
        self._now_s, self._others_s = np.zeros_like(self._idle_s), np.zeros_like(self._idle_s)
        self._changed: dict[int, None] = {}  # gates with other loads than in these prices
        self._price(slice(None))

    def meet(self, source: int, target: int) -> int | None:
        """The level at which two workers meet, or None."""
        levels = np.flatnonzero(self.domains[:, source] == self.domains[:, target])
        return int(levels[0]) if levels.size else None

    def carry(self, source: int, target: int, bytes_per_s: float) -> None:
        """So much more is decided to go from one to the other; less than nothing: so much less."""
        if (level := self.meet(source, target)) is not None:
            for gates in (self._gates[0, : level + 1, source], self._gates[1, : level + 1, target]):
                self._loads[gates] += bytes_per_s
                self._changed.update(dict.fromkeys(gates.tolist()))

    def prices(self) -> tuple[Floats, Floats]:
        """[2, levels, workers], up to and down from each level: seconds per byte now, and what a byte costs others.

        The first is that of the slowest step, each with what others leave of it. The second adds up all steps: on a
        link that others use for a share u of the time, a byte that takes s delays them by s * u / (1 - u), the mean
        number of transfers on a shared link times s (M/G/1 with processor sharing). Good until the next `carry`.
        """
        if self._changed:
            workers = [worker for gate in self._changed for worker in self._under.get(gate, ())]
            self._changed.clear()
            self._price(np.array(workers, np.intp) if len(workers) < self.domains.shape[1] else slice(None))
        return self._now_s, self._others_s

    def between(self, source: int, target: int) -> tuple[float, float]:
        """Over idle links: seconds to start, infinite where no way leads, and per byte."""
        if (level := self.meet(source, target)) is None:
            return math.inf, 0.0
        latency_s, (ups, downs) = self.latency_s[level], self._idle_s[:, : level + 1]
        return float(latency_s[source] + latency_s[target]), float(max(ups[:, source].max(), downs[:, target].max()))

    def row(self, source: int) -> tuple[Floats, Floats]:
        """From `source` to each over idle links: seconds to start, infinite where none leads, and per byte."""
        start_s, byte_s = np.full(self.domains.shape[1], np.inf), np.zeros(self.domains.shape[1])
        ups, downs = np.maximum.accumulate(self._idle_s, axis=1)
        for level in reversed(range(len(self.domains))):
            here = np.flatnonzero(self.domains[level] == self.domains[level, source])
            start_s[here] = self.latency_s[level, source] + self.latency_s[level, here]
            byte_s[here] = np.maximum(ups[level, source], downs[level, here])
        return start_s, byte_s

    def _price(self, workers: Indices | slice) -> None:
        """Brings these columns of the prices up to date."""
        idle_s, loads = self._idle_s[:, :, workers], self._loads[self._gates[:, :, workers]]
        busy = np.minimum(np.maximum(loads, 0.0) * idle_s, MOST_BUSY)
        self._now_s[:, :, workers] = np.maximum.accumulate(idle_s / (1 - busy), axis=1)
        self._others_s[:, :, workers] = np.cumsum(idle_s * busy / (1 - busy), axis=1)
