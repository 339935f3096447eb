"""What this router has sent where and not seen the end of: reports are up to a second old, bookings are not."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Booked:
    """One worker's share of the bookings."""

    prefill_tokens: int = 0
    streams: int = 0


@dataclass(slots=True)
class _Booking:
    decode: str
    prefill: str
    prompt_tokens: int


class Ledger:
    """Bookings by request id. Owned by one router."""

    def __init__(self) -> None:
        self._bookings: dict[str, _Booking] = {}
        self._prefill_tokens: dict[str, int] = {}
        self._streams: dict[str, int] = {}

    def book(self, request_id: str, decode: str, prefill: str, prompt_tokens: int) -> None:
        """A prefill of `prompt_tokens` at `prefill` and a stream at `decode`. Replaces an earlier booking."""
        self.release(request_id)
        self._bookings[request_id] = _Booking(decode, prefill, prompt_tokens)
        self._prefill_tokens[prefill] = self._prefill_tokens.get(prefill, 0) + prompt_tokens
        self._streams[decode] = self._streams.get(decode, 0) + 1

    def prefilled(self, request_id: str) -> None:
        """The first token came. Idempotent."""
        if (booking := self._bookings.get(request_id)) is not None:
            _subtract(self._prefill_tokens, booking.prefill, booking.prompt_tokens)
            booking.prompt_tokens = 0

    def release(self, request_id: str) -> None:
        """The request is over. Idempotent."""
        self.prefilled(request_id)
        if (booking := self._bookings.pop(request_id, None)) is not None:
            _subtract(self._streams, booking.decode, 1)

    def booked(self, worker: str) -> Booked:
        return Booked(self._prefill_tokens.get(worker, 0), self._streams.get(worker, 0))

    def __len__(self) -> int:
        return len(self._bookings)


def _subtract(totals: dict[str, int], key: str, amount: int) -> None:
    left = totals.get(key, 0) - amount
    if left > 0:
        totals[key] = left
    else:
        totals.pop(key, None)
