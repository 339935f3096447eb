"""Max-min fair rates, the plain way: the reference for tests and benchmarks of `sim.network`."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

L = TypeVar("L", bound=Hashable)
F = TypeVar("F", bound=Hashable)


def max_min(capacities: Mapping[L, float], paths: Mapping[F, Sequence[L]]) -> dict[F, float]:
    """The rate of each flow. All grow together; those on the link that fills first stop; the others grow on."""
    left = dict(capacities)
    growing = dict(paths)
    rates: dict[F, float] = {}
    while growing:
        counts: dict[L, int] = {}
        for path in growing.values():
            for link in path:
                counts[link] = counts.get(link, 0) + 1
        shares = {link: left[link] / count for link, count in counts.items()}
        least = min(shares.values())
        full = {link for link, share in shares.items() if share <= least * (1 + 1e-12)}
        for flow in [flow for flow, path in growing.items() if full.intersection(path)]:
            rates[flow] = least
            for link in growing.pop(flow):
                left[link] -= least
    return rates
