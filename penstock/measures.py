"""What latencies come to: how values are spread and distributed, the same for simulations and for real servers.

Percentiles are nearest ranks: the least value that at least p % of the values do not exceed.
"""

from __future__ import annotations

import math

import msgspec
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Curve = list[tuple[float, float]]  # rising (value, share of the values up to it)

LEAST_GAP_S = 1e-6
BUCKET_RATIO = 1.02
CURVE_SHARES = (*(share / 100 for share in range(100)), 0.995, 0.999, 1.0)


class Spread(msgspec.Struct, frozen=True):
    """How values are spread. Seconds, if nothing else is said."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


class Histogram:
    """Values in buckets that are 2 % wide: percentiles are within 1 %, count, mean and maximum exact."""

    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0
        self.most = 0.0
        self._weights: list[int] = []

    def add(self, value: float, weight: int = 1) -> None:
        """Values up to a microsecond share a bucket."""
        bucket = int(math.log(value / LEAST_GAP_S) / _LOG_RATIO) + 1 if value > LEAST_GAP_S else 0
        weights = self._weights
        if bucket >= len(weights):
            weights.extend([0] * (bucket + 1 - len(weights)))
        weights[bucket] += weight
        self.count += weight
        self.total += value * weight
        if value > self.most:
            self.most = value

    def at(self, share: float) -> float:
        """The least value that at least `share` of all do not exceed: the middle of its bucket. NaN if empty."""
        rank = max(1, math.ceil(share * self.count))
        below = 0
        for bucket, weight in enumerate(self._weights):
            below += weight
            if below >= rank:
                middle = LEAST_GAP_S * BUCKET_RATIO ** (bucket - 0.5) if bucket else LEAST_GAP_S
                return min(middle, self.most)
        return math.nan

    def curve(self) -> list[tuple[float, float]]:
        """The cumulative distribution, at the upper ends of buckets: (value, share up to it), from 0 to 1."""
        points: list[tuple[float, float]] = []
        below = 0
        for bucket, weight in enumerate(self._weights):
            end = LEAST_GAP_S * BUCKET_RATIO**bucket
            if weight and (not points or points[-1][0] < end / BUCKET_RATIO):
                points.append((end / BUCKET_RATIO, below / self.count))
            if weight:
                below += weight
                points.append((end, below / self.count))
        return points


_LOG_RATIO = math.log(BUCKET_RATIO)


# Numbers. Sums are exact (fsum), so that no processor's way of adding shows.


def spread(values: Floats) -> Spread | None:
    """Of the values that are not NaN; None if there are none."""
    known = np.sort(values[~np.isnan(values)])
    if not len(known):
        return None
    p50, p90, p95, p99 = (nearest(known, share) for share in (0.5, 0.9, 0.95, 0.99))
    return Spread(len(known), math.fsum(known) / len(known), p50, p90, p95, p99, float(known[-1]))


def spread_of(histogram: Histogram) -> Spread | None:
    if not histogram.count:
        return None
    p50, p90, p95, p99 = (histogram.at(share) for share in (0.5, 0.9, 0.95, 0.99))
    return Spread(histogram.count, histogram.total / histogram.count, p50, p90, p95, p99, histogram.most)


def nearest(ordered: Floats, share: float) -> float:
    """Nearest rank in values that rise."""
    return float(ordered[max(1, math.ceil(share * len(ordered))) - 1])


def curve(values: Floats) -> Curve:
    """Where values are equal it climbs: of such points the first and the last are there."""
    known = np.sort(values[~np.isnan(values)])
    if not len(known):
        return []
    points = [(nearest(known, share), share) for share in CURVE_SHARES]
    inner = [
        point
        for before, point, after in zip(points, points[1:], points[2:], strict=False)
        if not before[0] == point[0] == after[0]
    ]
    return [points[0], *inner, points[-1]]


def per(amount: float, by: float) -> float:
    """0 where nothing can be divided."""
    return amount / by if by else 0.0
