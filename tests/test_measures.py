"""Spreads and histograms: percentiles are nearest ranks, exact or within a bucket."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.measures import BUCKET_RATIO, LEAST_GAP_S, Histogram, spread


def nearest(values: list[float], percent: int) -> float:
    return sorted(values)[max(1, -(-percent * len(values) // 100)) - 1]


@given(st.lists(st.floats(0, 1e6), min_size=1))
def test_percentiles_are_nearest_ranks(values: list[float]) -> None:
    found = spread(np.array([*values, math.nan]))
    assert found is not None
    assert (found.count, found.max) == (len(values), max(values))
    percentiles = (found.p50, found.p90, found.p95, found.p99)
    assert percentiles == tuple(nearest(values, percent) for percent in (50, 90, 95, 99))
    assert found.mean == pytest.approx(sum(values) / len(values))


@given(st.lists(st.tuples(st.floats(1e-7, 100), st.integers(1, 9)), min_size=1), st.sampled_from((0.01, 0.5, 0.99, 1)))
def test_percentiles_of_a_histogram_are_within_a_percent(values: list[tuple[float, int]], share: float) -> None:
    histogram = Histogram()
    for value, weight in values:
        histogram.add(value, weight)
    every = sorted(value for value, weight in values for _ in range(weight))
    exact = every[max(1, math.ceil(share * len(every))) - 1]
    assert histogram.at(share) == pytest.approx(max(exact, LEAST_GAP_S), rel=0.0101, abs=LEAST_GAP_S)
    assert histogram.count == len(every)
    assert histogram.most == every[-1]
    assert histogram.total == pytest.approx(sum(every))


def test_an_empty_histogram_has_no_percentiles() -> None:
    assert math.isnan(Histogram().at(0.5))
    assert Histogram().curve() == []


def test_a_curve_climbs_within_buckets_only() -> None:
    histogram = Histogram()
    histogram.add(0.010, 3)
    histogram.add(0.040)
    (low, none), (low_end, most), (high, same), (high_end, every) = histogram.curve()
    assert low <= 0.010 <= low_end < high <= 0.040 <= high_end
    assert (none, most, same, every) == (0, 0.75, 0.75, 1)
    assert low_end / low == pytest.approx(BUCKET_RATIO) == high_end / high


def test_a_gap_of_nothing_is_the_least() -> None:
    histogram = Histogram()
    histogram.add(0.0)
    assert (histogram.at(0.5), histogram.most) == (0.0, 0.0)


def test_gaps_of_every_size_fit_in_few_buckets() -> None:
    histogram, rng = Histogram(), Random(1)
    for _ in range(20_000):
        histogram.add(10 ** rng.uniform(-7, 4))
    assert histogram.count == 20_000
    assert len(histogram.curve()) < 1_400
