"""Sampling's randomness."""

from __future__ import annotations

from statistics import fmean, pvariance

from penstock.engine.chance import uniform


def test_it_never_changes() -> None:
    """A sequence continues exactly on any worker, of any version."""
    assert uniform(0, 0, 0) == 0.4895671345311463
    assert uniform(2**64 - 1, 1, 1000) == 0.39982536300439264


def test_each_argument_counts() -> None:
    values = [uniform(*key) for key in ((1, 0, 7), (2, 0, 7), (1, 1, 7), (1, 0, 8))]
    assert len(set(values)) == 4
    assert uniform(-1, 0, 7) == uniform(2**64 - 1, 0, 7)


def test_it_is_uniform() -> None:
    values = [uniform(3, 0, position) for position in range(20_000)]
    assert 0 <= min(values) < 0.001 < 0.999 < max(values) < 1
    assert abs(fmean(values) - 1 / 2) < 0.01
    assert abs(pvariance(values) - 1 / 12) < 0.005
