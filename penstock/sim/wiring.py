"""Workers' places in a fabric, and the links that KV between two of them crosses.

A worker on several devices (tensor parallelism) sends each device's share from there to its counterpart, side by side,
so links that are crossed side by side count as one with the sum of their rates. That is exact where a device's own
links serve one worker; a worker that shares some of another's gets their bundle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from penstock.fabric import Fabric
from penstock.policy.routing.ways import Climber, Rung
from penstock.sim.network import Link, Network

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
        self._climber = Climber(fabric)
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

    def climb(self, device: str) -> Sequence[Rung]:
        """What routers ask of the worker on that device."""
        return self._climber.climb(self._places[self._worker_at[device]])

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
