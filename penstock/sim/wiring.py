"""Workers' places in a fabric, and the links that KV between two of them crosses.

A worker on several devices (tensor parallelism) sends each device's share from there to its counterpart, side by side,
so links that are crossed side by side count as one with the sum of their rates. That is exact where a device's own
links serve one worker; a worker that shares some of another's gets their bundle.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

from penstock.fabric import Fabric
from penstock.sim.network import Link, Network

Floats = NDArray[np.float64]

LOCAL_S = 5e-6  # to move nothing between workers on one device


@dataclass(frozen=True, slots=True)
class Route:
    """What a transfer crosses, and how long its last byte is under way when nobody is."""

    links: tuple[Link, ...]
    latency_s: float
    bytes_per_s: float  # of the slowest link, with nobody else on it


class Wiring:
    """Owns the links of `network`, made as they are first needed."""

    def __init__(self, fabric: Fabric, network: Network) -> None:
        self._fabric = fabric
        self._network = network
        self._places: dict[str, tuple[str, ...]] = {}
        self._worker_at: dict[str, str] = {}  # by its first device
        self._bundles: dict[int, Link] = {}  # by the number of each link in the fabric
        self._is_tree = all(link.way != "across" for link in fabric.links)
        self._climbs: dict[tuple[str, str], tuple[int, ...]] = {}
        self._prices: dict[Hashable, tuple[float, float]] = {}
        self._routes: dict[tuple[tuple[str, ...], tuple[str, ...]], Route] = {}

    def place(self, worker: str, devices: tuple[str, ...]) -> None:
        """`worker` is on these devices. Raises BadTopology for one that the fabric does not have."""
        for device in devices:
            self._fabric.vertex(device)
        self._places[worker] = devices
        self._worker_at[devices[0]] = worker

    def route(self, source: str, target: str) -> Route:
        """From one worker to another."""
        key = (self._places[source], self._places[target])
        if (known := self._routes.get(key)) is None:
            known = self._routes[key] = self._find(*key)
        return known

    def prices(self, source: str, targets: Sequence[str]) -> tuple[Floats, Floats]:
        """What routers ask: seconds to start and seconds per byte between idle workers, named by their devices."""
        prices = [self._price(self._worker_at[source], self._worker_at[target]) for target in targets]
        return np.array([start_s for start_s, _ in prices]), np.array([byte_s for _, byte_s in prices])

    def _price(self, source: str, target: str) -> tuple[float, float]:
        """That of a pair which is like this one, if one was asked for: in a large cluster there are few kinds."""
        places = self._places[source], self._places[target]
        kind = self._kind(*places) if self._is_tree else places
        if (known := self._prices.get(kind)) is None:
            route = self.route(source, target)
            known = self._prices[kind] = route.latency_s, 1 / route.bytes_per_s if route.links else 0.0
        return known

    def _kind(self, sources: tuple[str, ...], targets: tuple[str, ...]) -> Hashable:
        """Equal for pairs whose ways up to what they have in common are alike."""
        common = self._fabric.lowest_common_domain(sources[0], targets[0])
        return self._climb(sources, common), self._climb(targets, common), self._fabric.shape(common)

    def _climb(self, devices: tuple[str, ...], common: str) -> tuple[int, ...]:
        key = devices[0], common
        if (known := self._climbs.get(key)) is None:
            chain = takewhile(lambda name: name != common, (devices[0], *self._fabric.failure_domains(devices[0])))
            known = self._climbs[key] = (len(devices), *(self._fabric.shape(name) for name in chain))
        return known

    def _find(self, sources: Sequence[str], targets: Sequence[str]) -> Route:
        ranks = max(len(sources), len(targets))
        paths = [
            self._fabric.path(sources[rank * len(sources) // ranks], targets[rank * len(targets) // ranks])
            for rank in range(ranks)
        ]
        hops = max(len(path.links) for path in paths)
        sides = [dict.fromkeys(path.links[hop] for path in paths if hop < len(path.links)) for hop in range(hops)]
        links = dict.fromkeys(link for side in sides for link in self._bundle(list(side)))
        latency_s = max(path.latency_s for path in paths) or LOCAL_S
        return Route(tuple(links), latency_s, min((link.bytes_per_s for link in links), default=0.0))

    def _bundle(self, numbers: Sequence[int]) -> list[Link]:
        fresh = [number for number in numbers if number not in self._bundles]
        if fresh:
            first = self._fabric.links[fresh[0]]
            more = f" and {len(fresh) - 1} beside it" if len(fresh) > 1 else ""
            rate = sum(self._fabric.links[number].bytes_per_s for number in fresh)
            link = self._network.add_link(f"{first.source} to {first.target}{more}", rate)
            self._bundles.update(dict.fromkeys(fresh, link))
        return [self._bundles[number] for number in numbers]
