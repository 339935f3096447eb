"""Bookings balance, whatever the order of events."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.policy.ledger import (
    BLOCKS,
    FLIGHT_S,
    INCOMING_BYTES,
    OUTGOING_BYTES,
    PREFILLS,
    STREAMS,
    Booking,
    Ledger,
)

WORKERS = ["a", "b", "c"]
BOOKING = Booking("a", "b", prefill_s=2.0, blocks=7, move_bytes=1_000, move_bytes_per_s=8.0)

requests = st.integers(0, 3).map(str)
bookings = st.builds(
    Booking,
    decode=st.sampled_from(WORKERS),
    prefill=st.sampled_from(WORKERS),
    prefill_s=st.integers(1, 10**6).map(float),
    blocks=st.integers(1, 900),
    move_bytes=st.integers(0, 10**12),
    move_bytes_per_s=st.integers(1, 10**9).map(float),
)
events = st.lists(
    st.one_of(
        st.tuples(st.just("book"), requests, bookings),
        st.tuples(st.sampled_from(["prefilled", "moved", "release"]), requests, st.none()),
        st.tuples(st.just("seat"), st.lists(st.sampled_from(WORKERS), unique=True), st.none()),
    ),
    max_size=40,
)


class Links:
    """Adds up what is carried between columns."""

    def __init__(self, workers: int) -> None:
        self.rates = np.zeros((workers, workers))

    def carry(self, source: int, target: int, bytes_per_s: float) -> None:
        self.rates[source, target] += bytes_per_s


def column(ledger: Ledger, index: int) -> list[float]:
    return ledger.booked[:, index].tolist()


@given(events)
def test_sums_are_those_of_the_open_bookings(history: list[tuple[str, object, Booking | None]]) -> None:
    ledger, seated, links, opened = Ledger(), WORKERS, Links(3), dict[str, Booking]()
    ledger.seat(WORKERS, links.carry)
    for what, subject, booking in history:
        if what == "seat":
            assert isinstance(subject, list)
            seated, links = subject, Links(len(subject))
            ledger.seat(seated, links.carry)
            continue
        request = str(subject)
        if booking is not None:
            ledger.book(request, booking, now=0.0)
            opened[request] = booking
        elif what == "release":
            ledger.release(request)
            opened.pop(request, None)
        elif request in opened:
            getattr(ledger, what)(request)
            is_moved = what == "moved" or opened[request].is_moved
            opened[request] = replace(opened[request], is_prefilled=True, is_moved=is_moved)
    expected, rates = np.zeros((5, len(seated))), np.zeros((len(seated), len(seated)))
    for booking in opened.values():
        under_way = 0 if booking.is_moved else booking.move_bytes
        if booking.decode in seated:
            expected[[STREAMS, BLOCKS, INCOMING_BYTES], seated.index(booking.decode)] += 1, booking.blocks, under_way
        if booking.prefill in seated:
            at = seated.index(booking.prefill)
            expected[[PREFILLS, OUTGOING_BYTES], at] += not booking.is_prefilled, under_way
            if booking.decode in seated and under_way:
                rates[at, seated.index(booking.decode)] += booking.move_bytes_per_s
    assert ledger.booked.tolist() == expected.tolist()
    assert links.rates.tolist() == rates.tolist()
    assert len(ledger) == len(opened)


def test_a_prefill_is_booked_until_its_first_token_and_its_transfer_until_the_second() -> None:
    ledger = Ledger()
    ledger.seat(["a", "b"])
    ledger.book("r", BOOKING, 0.0)
    assert (column(ledger, 0), column(ledger, 1)) == ([0, 1, 7, 0, 1_000], [1, 0, 0, 1_000, 0])
    ledger.prefilled("r")
    ledger.prefilled("r")
    assert (column(ledger, 0), column(ledger, 1)) == ([0, 1, 7, 0, 1_000], [0, 0, 0, 1_000, 0])
    ledger.moved("r")
    ledger.prefilled("r")
    assert (column(ledger, 0), column(ledger, 1)) == ([0, 1, 7, 0, 0], [0] * 5)
    ledger.release("r")
    ledger.release("r")
    assert not ledger.booked.any() and not len(ledger)


def test_what_is_booked_at_a_worker_that_left_counts_again_when_it_is_back() -> None:
    ledger = Ledger()
    ledger.seat(["a", "b"])
    ledger.book("r", BOOKING, 0.0)
    ledger.seat(["b"])
    assert column(ledger, 0) == [1, 0, 0, 1_000, 0]
    ledger.seat(["b", "a"])
    assert column(ledger, 1) == [0, 1, 7, 0, 1_000]


def test_prompts_queue_one_after_the_other() -> None:
    ledger = Ledger()
    ledger.seat(["a", "b"])
    ledger.book("r", BOOKING, 10.0)
    ledger.book("s", BOOKING, 11.0)
    assert ledger.busy_until_s.tolist() == [0, 14]
    ledger.book("t", BOOKING, 20.0)
    assert ledger.busy_until_s[1] == 22


def test_a_report_has_what_others_sent_and_not_what_is_on_its_way() -> None:
    ledger = Ledger()
    ledger.seat(["a", "b"])
    ledger.book("r", BOOKING, 10.0)
    ledger.book("s", BOOKING, 10.5)
    ledger.report("b", 10.5 + FLIGHT_S / 2, queued_s=5.0)
    assert ledger.busy_until_s[1] == pytest.approx(17.5, abs=FLIGHT_S)
    ledger.report("b", 11.0, queued_s=0.5)
    assert ledger.busy_until_s[1] == 11.5


@given(st.lists(st.tuples(st.sampled_from([0, 1]), st.floats(0.01, 1.0)), min_size=1, max_size=60))
def test_two_routers_agree_after_each_report(sent: list[tuple[int, float]]) -> None:
    routers = [Ledger(), Ledger()]
    for router in routers:
        router.seat(["w"])
    done_s = 0.0  # when the worker will be, in truth
    for number, (who, work_s) in enumerate(sent):
        now = number * 0.1
        done_s = max(now, done_s) + work_s
        routers[who].book(str(number), Booking("w", "w", work_s), now)
        if number % 5 == 4:
            for router in routers:
                router.report("w", now + FLIGHT_S, max(0.0, done_s - now - FLIGHT_S))
            assert [router.busy_until_s[0] for router in routers] == pytest.approx([max(done_s, now + FLIGHT_S)] * 2)
