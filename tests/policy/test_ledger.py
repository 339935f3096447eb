"""Bookings balance, whatever the order of events."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from penstock.policy.ledger import (
    BLOCKS,
    INCOMING_BYTES,
    OUTGOING_BYTES,
    PREFILLS,
    QUEUED_TOKENS,
    STREAMS,
    Booking,
    Ledger,
)

WORKERS = ["a", "b", "c"]
BOOKING = Booking("a", "b", tokens=100, blocks=7, move_bytes=1_000)

requests = st.integers(0, 3).map(str)
bookings = st.builds(
    Booking,
    decode=st.sampled_from(WORKERS),
    prefill=st.sampled_from(WORKERS),
    tokens=st.integers(1, 10**6),
    blocks=st.integers(1, 900),
    move_bytes=st.integers(0, 10**12),
)
events = st.lists(
    st.one_of(
        st.tuples(st.just("book"), requests, bookings),
        st.tuples(st.sampled_from(["prefilled", "release"]), requests, st.none()),
        st.tuples(st.just("seat"), st.lists(st.sampled_from(WORKERS), unique=True), st.none()),
    ),
    max_size=40,
)


def column(ledger: Ledger, index: int) -> list[float]:
    return ledger.booked[:, index].tolist()


@given(events)
def test_sums_are_those_of_the_open_bookings(history: list[tuple[str, object, Booking | None]]) -> None:
    ledger, seated, opened = Ledger(), WORKERS, dict[str, tuple[Booking, bool]]()
    ledger.seat(WORKERS)
    for what, subject, booking in history:
        if what == "seat":
            assert isinstance(subject, list)
            seated = subject
            ledger.seat(seated)
            continue
        request = str(subject)
        if booking is not None:
            ledger.book(request, booking)
            opened[request] = (booking, False)
        elif what == "prefilled":
            ledger.prefilled(request)
            opened |= {request: (opened[request][0], True)} if request in opened else {}
        else:
            ledger.release(request)
            opened.pop(request, None)
    expected = np.zeros((6, len(seated)))
    for booking, is_prefilled in opened.values():
        if booking.decode in seated:
            decode = seated.index(booking.decode)
            expected[[STREAMS, BLOCKS], decode] += 1, booking.blocks
            expected[INCOMING_BYTES, decode] += 0 if is_prefilled else booking.move_bytes
        if booking.prefill in seated and not is_prefilled:
            expected[[QUEUED_TOKENS, PREFILLS], seated.index(booking.prefill)] += booking.tokens, 1
            expected[OUTGOING_BYTES, seated.index(booking.prefill)] += booking.move_bytes
    assert ledger.booked.tolist() == expected.tolist()
    assert len(ledger) == len(opened)


def test_a_prefill_is_booked_until_its_first_token() -> None:
    ledger = Ledger()
    ledger.seat(["a", "b"])
    ledger.book("r", BOOKING)
    assert column(ledger, 0) == [0, 0, 1, 7, 0, 1_000]
    assert column(ledger, 1) == [100, 1, 0, 0, 1_000, 0]
    ledger.prefilled("r")
    ledger.prefilled("r")
    assert column(ledger, 0) == [0, 0, 1, 7, 0, 0]
    assert column(ledger, 1) == [0] * 6
    ledger.release("r")
    ledger.release("r")
    assert not ledger.booked.any() and not len(ledger)


def test_what_is_booked_at_a_worker_that_left_counts_again_when_it_is_back() -> None:
    ledger = Ledger()
    ledger.seat(["a", "b"])
    ledger.book("r", BOOKING)
    ledger.seat(["b"])
    assert column(ledger, 0) == [100, 1, 0, 0, 1_000, 0]
    ledger.seat(["b", "a"])
    assert column(ledger, 1) == [0, 0, 1, 7, 0, 1_000]
