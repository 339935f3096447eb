"""What this router has sent where and not seen the end of: reports are up to a second old, bookings are not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

# Rows of `Ledger.booked`. The first four are what workers report as well.
QUEUED_TOKENS, PREFILLS, STREAMS, BLOCKS, OUTGOING_BYTES, INCOMING_BYTES = range(6)
REPORTED = 4


@dataclass(frozen=True, slots=True)
class Booking:
    """One request: `tokens` to compute at `prefill`, a stream of `blocks` at `decode`, `move_bytes` between them."""

    decode: str
    prefill: str
    tokens: int
    blocks: int = 0
    move_bytes: int = 0
    is_prefilled: bool = False


class Ledger:
    """Bookings by request id, and their sums by worker. Owned by one router.

    `booked` has a row for each kind of load and a column for each seated worker; what is booked at a worker without a
    seat is kept, and counted when it has one again.
    """

    def __init__(self) -> None:
        self._bookings: dict[str, Booking] = {}
        self._columns: dict[str, int] = {}
        self.booked: npt.NDArray[np.float64] = np.zeros((6, 0))

    def seat(self, workers: Sequence[str]) -> None:
        """Columns are for these workers from now on, in this order. `booked` is a new array."""
        self._columns = {worker: column for column, worker in enumerate(workers)}
        self.booked = np.zeros((6, len(workers)))
        for booking in self._bookings.values():
            self._add(booking, 1)

    def book(self, request_id: str, booking: Booking) -> None:
        """Replaces an earlier booking of this request."""
        self.release(request_id)
        self._bookings[request_id] = booking
        self._add(booking, 1)

    def prefilled(self, request_id: str) -> None:
        """The first token came: the prompt is computed, and its KV is taken as moved. Idempotent."""
        if (booking := self._bookings.get(request_id)) is not None:
            self._add(booking, -1)
            self._bookings[request_id] = replace(booking, is_prefilled=True)
            self._add(self._bookings[request_id], 1)

    def release(self, request_id: str) -> None:
        """The request is over. Idempotent."""
        if (booking := self._bookings.pop(request_id, None)) is not None:
            self._add(booking, -1)

    def __len__(self) -> int:
        return len(self._bookings)

    def _add(self, booking: Booking, sign: int) -> None:
        # Sums of whole numbers, exact in floats below 2**53: what is added and subtracted again leaves nothing behind.
        prefill, decode = self._columns.get(booking.prefill), self._columns.get(booking.decode)
        if decode is not None:
            self.booked[STREAMS, decode] += sign
            self.booked[BLOCKS, decode] += sign * booking.blocks
        if booking.is_prefilled:
            return
        if prefill is not None:
            self.booked[QUEUED_TOKENS, prefill] += sign * booking.tokens
            self.booked[PREFILLS, prefill] += sign
            self.booked[OUTGOING_BYTES, prefill] += sign * booking.move_bytes
        if decode is not None:
            self.booked[INCOMING_BYTES, decode] += sign * booking.move_bytes
