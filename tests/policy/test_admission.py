"""When a request may go to the workers."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.policy.admission import AIM, MOST_SLOWED, Calibration, ServiceLevel, expected_s
from penstock.policy.forecast import Forecast

seconds = st.floats(0, 100)


def seen(wait_s: float, own_s: float) -> Forecast:
    return Forecast(wait_s + own_s, own_s, 100, 1_000.0)


def test_half_of_what_can_be_waited_is_waited_at_the_workers() -> None:
    level = ServiceLevel(ttft_s=2.0, patience=1.5)
    assert level.may_go(seen(wait_s=0.7, own_s=0.6))
    assert not level.may_go(seen(wait_s=0.71, own_s=0.6))
    assert level.limit_s(seen(0, 0.6)) == pytest.approx(3.0 * AIM)


def test_a_prompt_that_is_too_long_for_the_objective_has_its_own() -> None:
    assert ServiceLevel(ttft_s=2.0).limit_s(seen(0, 5.0)) == 10.0 * AIM


def test_without_an_objective_everything_may_go() -> None:
    assert not ServiceLevel().is_limited
    assert ServiceLevel().may_go(seen(1e9, 1e9))
    assert ServiceLevel().limit_s(seen(1e9, 1.0)) == math.inf


def test_what_is_expected_has_those_ahead_in_it() -> None:
    assert expected_s(seen(1.0, 0.5), tokens_ahead=2_000) == pytest.approx(3.5)


@given(st.floats(0.01, 100), st.floats(1, 10), seconds)
def test_idle_workers_take_whatever_comes(ttft_s: float, patience: float, own_s: float) -> None:
    level = ServiceLevel(ttft_s=ttft_s, patience=patience)
    assert level.may_go(seen(0.0, own_s))
    assert own_s <= level.limit_s(seen(0.0, own_s))


@given(st.floats(0.01, 100), seconds, seconds)
def test_whoever_may_go_keeps_the_objective(ttft_s: float, wait_s: float, own_s: float) -> None:
    level, found = ServiceLevel(ttft_s=ttft_s), seen(wait_s, own_s)
    assert not level.may_go(found) or found.first_s <= level.limit_s(found)


def test_forecasts_are_corrected_by_what_came_of_them() -> None:
    calibration = Calibration()
    assert calibration.corrected(seen(1.0, 0.5)) == seen(1.0, 0.5)
    for _ in range(500):
        calibration.note(foreseen_s=1.0, took_s=1.2)
    slowed = calibration.corrected(seen(1.0, 0.5))
    assert (slowed.first_s, slowed.own_s, slowed.tokens_per_s) == pytest.approx((1.8, 0.6, 1_000 / 1.2), rel=1e-3)
    for _ in range(500):
        calibration.note(foreseen_s=1.0, took_s=0.5)
    assert calibration.corrected(seen(1.0, 0.5)) == seen(1.0, 0.5), "never shorter than foreseen"


@given(st.lists(st.tuples(seconds, seconds), max_size=50), seconds)
def test_idle_workers_take_whatever_comes_however_wrong_forecasts_were(
    came: list[tuple[float, float]], own_s: float
) -> None:
    calibration = Calibration()
    for foreseen_s, took_s in came:
        calibration.note(foreseen_s, took_s)
    corrected = calibration.corrected(seen(0.0, own_s))
    assert ServiceLevel(ttft_s=1.0).may_go(corrected)
    assert corrected.first_s <= MOST_SLOWED * own_s
