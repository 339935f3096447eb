"""Quantities, both ways."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.topology import units

READ = {
    ("36 GB/s", "rate"): 36e9,
    ("36GB/s", "rate"): 36e9,
    ("400 Gb/s", "rate"): 50e9,
    ("10Gbit/s", "rate"): 1.25e9,
    ("1 GiB/s", "rate"): 2.0**30,
    ("0 B/s", "rate"): 0.0,
    ("3 us", "time"): 3e-6,
    ("0.5 ms", "time"): 5e-4,
    ("2e-6 s", "time"): 2e-6,
    ("80 GB", "memory"): 80e9,
    ("80 GiB", "memory"): 80 * 2.0**30,
    ("989 TF", "compute"): 989e12,
    ("2.25 PFLOPS", "compute"): 2.25e15,
}


@pytest.mark.parametrize(("text", "kind"), READ)
def test_what_people_write_is_read(text: str, kind: units.Kind) -> None:
    assert units.parse(text, kind) == pytest.approx(READ[text, kind])


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("36", "rate"),
        ("36 GB", "rate"),
        ("3 m", "time"),
        ("-1 GB", "memory"),
        ("fast", "rate"),
        ("", "time"),
        ("1e9", "rate"),
    ],
)
def test_what_has_no_unit_is_refused_with_an_example(text: str, kind: units.Kind) -> None:
    with pytest.raises(ValueError, match="such as"):
        units.parse(text, kind)


@given(st.floats(1e-8, 1e-1))
def test_times_survive_the_round_trip(seconds: float) -> None:
    assert units.parse(units.time(seconds), "time") == pytest.approx(seconds, rel=0.01)


@given(st.floats(1.0, 1e16))
def test_amounts_survive_the_round_trip(amount: float) -> None:
    assert units.parse(units.rate(amount), "rate") == pytest.approx(amount, rel=0.01)
    assert units.parse(units.memory(amount), "memory") == pytest.approx(amount, rel=0.01)
    assert units.parse(units.compute(amount), "compute") == pytest.approx(amount, rel=0.01)


def test_nothing_is_nothing() -> None:
    assert (units.rate(0.0), units.memory(0.0), units.time(0.0)) == ("0 B/s", "0 B", "0 ns")
