"""What clients of a real server saw, kept in columns: numbers in arrays, never an object per request or per event.

What it all comes to is `report`'s business.
"""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from penstock.measures import Floats, Histogram

Ints = NDArray[np.int64]
UNKNOWN = -1  # tokens that the server did not count


class Usage(msgspec.Struct, frozen=True):
    """Tokens as the server counts them."""

    prompt_tokens: int = UNKNOWN
    output_tokens: int = UNKNOWN
    cached_tokens: int = UNKNOWN


@dataclass(frozen=True, slots=True)
class Requests:
    """One entry of each array for each request, in the order in which they were sent.

    Times are seconds on `penstock.clock`, NaN where not reached or, of `due_s`, where there is none; counts of tokens
    are UNKNOWN where the server told none. `error` is an index: see the kinds that the Recorder has of them.
    """

    due_s: Floats  # when it should have been sent
    sent_s: Floats
    first_s: Floats  # the first event with a token, and so on
    second_s: Floats
    last_s: Floats
    ended_s: Floats
    events: Ints  # that had a token
    asked_tokens: Ints  # of output
    prompt_tokens: Ints
    output_tokens: Ints
    cached_tokens: Ints
    error: Ints


_TIMES = ("due_s", "sent_s", "first_s", "second_s", "last_s", "ended_s")
_COUNTS = ("events", "asked_tokens", "prompt_tokens", "output_tokens", "cached_tokens", "error")


class Recorder:
    """Told by clients of one measurement, in order of time. Rows are numbers that it gives out."""

    def __init__(self) -> None:
        self.gaps = Histogram()  # between events with tokens, of all requests
        self.cpu_s = 0.0  # that the generator took, as its owner says at the end
        self._times = {name: array("d") for name in _TIMES}
        self._counts = {name: array("q") for name in _COUNTS}
        self._first_s, self._second_s, self._last_s = (self._times[name] for name in ("first_s", "second_s", "last_s"))
        self._events = self._counts["events"]
        self._per_second: list[int] = []
        self._begun_s = 0.0
        self._errors = {"": 0}

    def send(self, at_s: float, due_s: float | None, asked_tokens: int) -> int:
        """A request is about to be sent; its row."""
        row = len(self._events)
        if not row:
            self._begun_s = at_s
        for times in self._times.values():
            times.append(math.nan)
        for counts in self._counts.values():
            counts.append(0)
        self._times["sent_s"][row] = at_s
        self._times["due_s"][row] = math.nan if due_s is None else due_s
        self._counts["asked_tokens"][row] = asked_tokens
        for name in ("prompt_tokens", "output_tokens", "cached_tokens"):
            self._counts[name][row] = UNKNOWN
        return row

    def event(self, row: int, at_s: float) -> None:
        """Something came that has at least one token."""
        had = self._events[row]
        if had:
            self.gaps.add(at_s - self._last_s[row])
            if had == 1:
                self._second_s[row] = at_s
        else:
            self._first_s[row] = at_s
        self._events[row] = had + 1
        self._last_s[row] = at_s
        self._count(at_s)

    def end(self, row: int, at_s: float, usage: Usage, error: str) -> None:
        """The request is over. `error` is its kind, and empty where all went well."""
        self._times["ended_s"][row] = at_s
        counts = self._counts
        counts["prompt_tokens"][row] = usage.prompt_tokens
        counts["output_tokens"][row] = usage.output_tokens
        counts["cached_tokens"][row] = usage.cached_tokens
        counts["error"][row] = self._errors.setdefault(error, len(self._errors))

    def requests(self) -> Requests:
        """All that was told until now, as copies."""
        times = {name: np.array(times) for name, times in self._times.items()}
        counts = {name: np.array(counts) for name, counts in self._counts.items()}
        return Requests(**times, **counts)

    @property
    def error_kinds(self) -> list[str]:
        """The first is empty: none."""
        return list(self._errors)

    @property
    def events_per_second(self) -> list[int]:
        """How many came in each second since the first request was sent."""
        return list(self._per_second)

    def _count(self, at_s: float) -> None:
        second = int(at_s - self._begun_s)
        if second >= len(self._per_second):
            self._per_second.extend([0] * (second + 1 - len(self._per_second)))
        self._per_second[second] += 1
