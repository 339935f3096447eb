"""What happened in a simulation, kept in columns: numbers in arrays, never an object per request or per token.

The clients of the virtual cluster tell a Recorder what they see, the cluster is sampled from time to time; what it
all comes to is `report`'s business. 300,000 requests take about 55 MB, however many tokens they had.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from penstock.measures import Floats, Histogram
from penstock.request import Timeline

Ints = NDArray[np.int64]

FIRST_INTERVAL_S = 0.5
MOST_SAMPLES = 400  # even: when there are so many, neighbours become one
NOBODY = 0  # the index of no worker, as of no tenant and no error


class WorkerSample(NamedTuple):
    """A worker at one moment, but for `busy`, the share of the time since the last sample that it was in a step."""

    running: int
    waiting: int
    queued_tokens: int
    busy: float
    used: float  # share of its KV blocks


class LinkSample(NamedTuple):
    """One direction of a link since the last sample."""

    utilisation: float  # share of the bytes it could have carried


class Series:
    """Rows of samples of things with names, all about equally long apart. Things that join later were 0 before."""

    def __init__(self, fields: Sequence[str]) -> None:
        self._fields = tuple(fields)
        self._names: dict[str, int] = {}
        self._rows: list[Floats] = []  # each [names known then, fields]

    @property
    def names(self) -> list[str]:
        return list(self._names)

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, samples: Iterable[tuple[str, Sequence[float]]]) -> None:
        known = dict(samples)
        for name in known:
            self._names.setdefault(name, len(self._names))
        row = np.zeros((len(self._names), len(self._fields)))
        if known:
            row[[self._names[name] for name in known]] = list(known.values())
        self._rows.append(row)

    def halve(self) -> None:
        """Of every two neighbours the mean remains."""
        rows = self.values()
        self._rows = list((rows[0::2] + rows[1::2]) / 2)

    def values(self) -> Floats:
        """[samples, names, fields]"""
        values = np.zeros((len(self._rows), len(self._names), len(self._fields)))
        for index, row in enumerate(self._rows):
            values[index, : len(row)] = row
        return values

    def of(self, field: str) -> Floats:
        """[samples, names]"""
        return self.values()[:, :, self._fields.index(field)]


@dataclass(frozen=True, slots=True)
class Requests:
    """One entry of each array for each request, in order of their beginning. Times are NaN where not reached.

    `error`, `tenant`, `decode_worker` and `prefill_worker` are indices: see the names that the Recorder has of them.
    What comes from a Timeline is 0 where there was none.
    """

    begun_s: Floats
    first_s: Floats
    second_s: Floats
    last_s: Floats
    ended_s: Floats
    queued_s: Floats  # from the beginning to the first chunk
    output_tokens: Ints
    prompt_tokens: Ints
    cached_tokens: Ints
    computed_tokens: Ints
    moved_tokens: Ints
    copied_bytes: Ints
    attempts: Ints
    preemptions: Ints
    decode_worker: Ints
    prefill_worker: Ints
    tenant: Ints
    error: Ints


_TIMES = ("begun_s", "first_s", "second_s", "last_s", "ended_s", "queued_s")
_COUNTS = tuple(name for name in Requests.__slots__ if name not in _TIMES)


class Recorder:
    """Is told what happens, in order of time; a request is known by the row that `begin` returned.

        row = begin(...);  tokens(row, ...) ...;  end(row, ...)
        sample(...) whenever `next_sample_s` has come

    The gap between the first two tokens, in which a hand-over hides, is kept apart from the others, `gaps`.
    """

    def __init__(self) -> None:
        self.gaps = Histogram()
        self.workers = Series(WorkerSample._fields)
        self.links = Series(LinkSample._fields)
        self.interval_s = FIRST_INTERVAL_S
        self.next_sample_s = FIRST_INTERVAL_S
        self._times = {name: array("d") for name in _TIMES}
        self._counts = {name: array("q") for name in _COUNTS}
        self._first_s, self._second_s, self._last_s = (self._times[name] for name in ("first_s", "second_s", "last_s"))
        self._output_tokens = self._counts["output_tokens"]
        self._tenants = {"": 0}
        self._workers = {"": 0}
        self._errors = {"": 0}

    def begin(self, at_s: float, prompt_tokens: int, tenant: str = "") -> int:
        """A client asks; the row of its request."""
        row = len(self._output_tokens)
        for times in self._times.values():
            times.append(math.nan)
        for counts in self._counts.values():
            counts.append(0)
        self._times["begun_s"][row] = at_s
        self._counts["prompt_tokens"][row] = prompt_tokens
        self._counts["tenant"][row] = _index(self._tenants, tenant)
        return row

    def tokens(self, row: int, at_s: float, count: int, over_s: float) -> None:
        """`count` tokens came: the last at `at_s`, the first `over_s` before, the others evenly between them."""
        if not count:  # the end of an answer may come alone
            return
        had = self._output_tokens[row]
        first_s = at_s - over_s
        pace_s = over_s / (count - 1) if count > 1 else 0.0
        if had >= 2:
            self.gaps.add(first_s - self._last_s[row])
        elif had == 1:
            self._second_s[row] = first_s
        else:
            self._first_s[row] = first_s
            if count > 1:
                self._second_s[row] = first_s + pace_s
        inner = count - 1 if had else count - 2  # gaps between these tokens, without that after the very first
        if inner > 0:
            self.gaps.add(pace_s, inner)
        self._output_tokens[row] = had + count
        self._last_s[row] = at_s

    def end(self, row: int, at_s: float, timeline: Timeline | None, error: str) -> None:
        """The request is over. `error` is its kind, such as a class name, and empty where all went well."""
        self._times["ended_s"][row] = at_s
        counts = self._counts
        counts["error"][row] = _index(self._errors, error)
        if timeline is None:
            return
        if timeline.prefill_started_s is not None:
            self._times["queued_s"][row] = timeline.prefill_started_s
        counts["cached_tokens"][row] = timeline.cached_tokens
        counts["computed_tokens"][row] = timeline.computed_tokens
        counts["moved_tokens"][row] = timeline.moved_tokens
        counts["copied_bytes"][row] = timeline.copied_bytes
        counts["attempts"][row] = timeline.prefill_attempts
        counts["preemptions"][row] = timeline.preemptions
        counts["decode_worker"][row] = _index(self._workers, timeline.decode_worker)
        counts["prefill_worker"][row] = _index(self._workers, timeline.prefill_worker)

    def sample(
        self,
        at_s: float,
        workers: Sequence[tuple[str, WorkerSample]],
        links: Sequence[tuple[str, LinkSample]],
    ) -> None:
        """How the cluster does, once `next_sample_s` has come."""
        self.workers.add(workers)
        self.links.add(links)
        if len(self.workers) == MOST_SAMPLES:
            self.workers.halve()
            self.links.halve()
            self.interval_s *= 2
        self.next_sample_s = at_s + self.interval_s

    def requests(self) -> Requests:
        """All that was told of requests until now, as copies."""
        times = {name: np.array(times) for name, times in self._times.items()}
        counts = {name: np.array(counts) for name, counts in self._counts.items()}
        return Requests(**times, **counts)

    @property
    def tenant_names(self) -> list[str]:
        return list(self._tenants)

    @property
    def worker_names(self) -> list[str]:
        """The first is empty: NOBODY."""
        return list(self._workers)

    @property
    def error_kinds(self) -> list[str]:
        """The first is empty: none."""
        return list(self._errors)


def _index(names: dict[str, int], name: str) -> int:
    return names.setdefault(name, len(names))
