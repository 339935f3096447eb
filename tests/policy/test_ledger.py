"""Bookings balance, whatever the order of events."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from penstock.policy.ledger import Booked, Ledger

events = st.lists(
    st.tuples(
        st.sampled_from(["book", "prefilled", "release"]), st.integers(0, 3), st.integers(0, 2), st.integers(1, 9)
    ),
    max_size=40,
)


@given(events)
def test_a_ledger_without_requests_has_no_bookings(history: list[tuple[str, int, int, int]]) -> None:
    ledger = Ledger()
    for what, request, worker, tokens in history:
        if what == "book":
            ledger.book(str(request), f"d{worker}", f"p{worker}", tokens)
        elif what == "prefilled":
            ledger.prefilled(str(request))
        else:
            ledger.release(str(request))
    for request in range(4):
        ledger.release(str(request))
    assert len(ledger) == 0
    assert all(ledger.booked(f"{kind}{i}") == Booked() for kind in "dp" for i in range(3))


def test_a_prefill_is_booked_until_its_first_token() -> None:
    ledger = Ledger()
    ledger.book("r", "d", "p", 100)
    assert (ledger.booked("p"), ledger.booked("d")) == (Booked(100, 0), Booked(0, 1))
    ledger.prefilled("r")
    assert (ledger.booked("p"), ledger.booked("d")) == (Booked(), Booked(0, 1))
