"""What this router has sent where and not seen the end of: reports are up to a second old, bookings are not.

How long a worker is busy with prompts is followed from both: a report says how much is queued there, whoever sent it,
and is worked off as time passes; what is booked since comes on top. So several routers, each of which knows only its
own bookings, differ by what the others sent since the last report, and agree again with the next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

# Rows of `Ledger.booked`. The first three are what workers report as well.
PREFILLS, STREAMS, BLOCKS, OUTGOING_BYTES, INCOMING_BYTES = range(5)
REPORTED = 3
FLIGHT_S = 0.002  # what was booked so short a time before a report came is not in it

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Booking:
    """One request: `prefill_s` of computing at `prefill`, a stream of `blocks` at `decode`, bytes between them."""

    decode: str
    prefill: str
    prefill_s: float
    blocks: int = 0
    move_bytes: int = 0
    move_bytes_per_s: float = 0.0  # in the mean, from now until they should be there
    is_prefilled: bool = False
    is_moved: bool = False


def _carry_nothing(source: int, target: int, bytes_per_s: float) -> None:
    pass


class Ledger:
    """Bookings by request id, and their sums by worker. Owned by one router.

    `booked` has a row for each kind of load and a column for each seated worker; what is booked at a worker without a
    seat is kept, and counted when it has one again.
    """

    def __init__(self) -> None:
        self._bookings: dict[str, Booking] = {}
        self._columns: dict[str, int] = {}
        self._carry: Callable[[int, int, float], None] = _carry_nothing
        self._recent: list[deque[tuple[float, float]]] = []  # by column: when, and how many seconds of prefill
        self.booked: Floats = np.zeros((5, 0))
        self.busy_until_s: Floats = np.zeros(0)  # when each will have computed the prompts that are queued there

    def seat(self, workers: Sequence[str], carry: Callable[[int, int, float], None] = _carry_nothing) -> None:
        """Columns are for these workers from now on, in this order. `booked` and `busy_until_s` are new arrays.

        `carry` is told how many bytes per second more, or less, are booked from one column to another.
        """
        self._carry = carry
        before, busy = self._columns, self.busy_until_s
        self._columns = {worker: column for column, worker in enumerate(workers)}
        self._recent = [deque() for _ in workers]
        self.busy_until_s = np.array([busy[before[worker]] if worker in before else 0.0 for worker in workers])
        self.booked = np.zeros((5, len(workers)))
        for booking in self._bookings.values():
            self._add(booking, 1)

    def report(self, worker: str, now: float, queued_s: float) -> None:
        """`worker` says that it has prompts for so many seconds. Raises KeyError for one without a seat."""
        column = self._columns[worker]
        recent = self._recent[column]
        while recent and recent[0][0] <= now - FLIGHT_S:
            recent.popleft()
        self.busy_until_s[column] = now + queued_s + sum(seconds for _, seconds in recent)

    def book(self, request_id: str, booking: Booking, now: float) -> None:
        """Replaces an earlier booking of this request."""
        self.release(request_id)
        self._bookings[request_id] = booking
        self._add(booking, 1)
        if (column := self._columns.get(booking.prefill)) is not None:
            self.busy_until_s[column] = max(now, self.busy_until_s[column]) + booking.prefill_s
            self._recent[column].append((now, booking.prefill_s))

    def prefilled(self, request_id: str) -> None:
        """The first token came: the prompt is computed. Idempotent."""
        self._go_on(request_id, is_moved=False)

    def moved(self, request_id: str) -> None:
        """The second token came: the prompt's KV is where it decodes. Idempotent."""
        self._go_on(request_id, is_moved=True)

    def release(self, request_id: str) -> None:
        """The request is over. Idempotent."""
        if (booking := self._bookings.pop(request_id, None)) is not None:
            self._add(booking, -1)

    def __len__(self) -> int:
        return len(self._bookings)

    def _go_on(self, request_id: str, is_moved: bool) -> None:
        if (booking := self._bookings.get(request_id)) is not None:
            self._add(booking, -1)
            booking = replace(booking, is_prefilled=True, is_moved=is_moved or booking.is_moved)
            self._bookings[request_id] = booking
            self._add(booking, 1)

    def _add(self, booking: Booking, sign: int) -> None:
        # Sums of whole numbers, exact in floats below 2**53: what is added and subtracted again leaves nothing behind.
        prefill, decode = self._columns.get(booking.prefill), self._columns.get(booking.decode)
        if decode is not None:
            self.booked[STREAMS, decode] += sign
            self.booked[BLOCKS, decode] += sign * booking.blocks
            if not booking.is_moved:
                self.booked[INCOMING_BYTES, decode] += sign * booking.move_bytes
        if prefill is not None:
            if not booking.is_prefilled:
                self.booked[PREFILLS, prefill] += sign
            if not booking.is_moved:
                self.booked[OUTGOING_BYTES, prefill] += sign * booking.move_bytes
                if decode is not None and booking.move_bytes:
                    self._carry(prefill, decode, sign * booking.move_bytes_per_s)
