"""What a router knows of its workers' prefix caches, whatever the size of their blocks."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from penstock.cluster import Member
from penstock.policy.prefix_index import Incarnation, PrefixIndex, prefix_hashes
from penstock.request import Request

GRAIN_TOKENS = 64  # what workers tell no events of is not told apart more finely: few hashes where blocks are small
DOUBT_S = 1.0  # after a prompt's first token its events have come, or were lost
RESTORE_BYTES_PER_S = 20e9  # from host memory or below to the device, over PCIe 5.0 with room to spare

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """What is believed cached of one prompt: one entry per worker, always less than the prompt.

    `lower_tokens` are those of `tokens` that lie in a tier below the device. `hashes` are the prompt's, by grain.
    `counted` are the blocks of workers of which each was looked at.
    """

    tokens: Floats
    lower_tokens: Floats
    hashes: Mapping[int, Sequence[int]]
    counted: dict[Incarnation, int] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _Kind:
    """Workers whose prefixes are told apart in grains of one size; `columns` are their places among all."""

    index: PrefixIndex
    columns: npt.NDArray[np.intp]


class Prefixes:
    """Owned by one roster: an index for each grain, and what was believed of requests that still run."""

    def __init__(self) -> None:
        self._kinds: dict[int, _Kind] = {}
        self._grain_of: dict[Incarnation, int] = {}
        self._workers = 0
        self._beliefs: dict[str, list[tuple[Incarnation, Sequence[int]]]] = {}  # by request
        self._doubts: deque[tuple[float, Incarnation, Sequence[int]]] = deque()

    def seat(self, members: Sequence[Member]) -> None:
        """These are there now, in this order; what was known of others is forgotten."""
        self._workers = len(members)
        self._grain_of = {incarnation(member): _grain(member) for member in members}
        kinds, self._kinds = self._kinds, {}
        for grain in dict.fromkeys(self._grain_of.values()):
            columns = [column for column, member in enumerate(members) if _grain(member) == grain]
            kind = self._kinds[grain] = kinds.get(grain) or _Kind(PrefixIndex(), np.empty(0, np.intp))
            kind.columns = np.array(columns, np.intp)
            seated = [members[column] for column in columns]
            capacities = [int(member.blocks * member.layout.tokens_per_block) // grain for member in seated]
            kind.index.seat([incarnation(member) for member in seated], capacities)

    def index(self, worker: Incarnation) -> PrefixIndex | None:
        """Where events of this worker belong; None if it has no seat."""
        grain = self._grain_of.get(worker)
        return None if grain is None else self._kinds[grain].index

    def find(self, request: Request) -> Found:
        """Looks the prompt up. Its last token never counts as cached: the first of the output follows from it."""
        tokens, lower = np.zeros(self._workers), np.zeros(self._workers)
        hashes: dict[int, Sequence[int]] = {}
        for grain, kind in self._kinds.items():
            hashes[grain] = prefix_hashes(request.sequence, grain, request.salt)
            reusable = hashes[grain][: (request.sequence_tokens - 1) // grain]
            if not reusable:
                continue
            lengths = kind.index.longest(reusable)
            tokens[kind.columns] = lengths * grain
            if kind.index.has_lower_tiers:
                lower[kind.columns] = (lengths - kind.index.longest(reusable, tiers=1)) * grain
        return Found(tokens, lower, hashes)

    def recount(self, worker: Incarnation, found: Found, prompt_tokens: int) -> int:
        """One worker's `tokens` with a look at every block, where `find` takes who holds one to hold its parents."""
        grain = self._grain_of[worker]
        reusable = found.hashes[grain][: (prompt_tokens - 1) // grain]
        blocks = found.counted[worker] = self._kinds[grain].index.count_held(worker, reusable)
        return blocks * grain

    def learn(self, request_id: str, worker: Incarnation, found: Found) -> None:
        """The request's prompt will be cached there."""
        grain = self._grain_of[worker]
        if news := self._kinds[grain].index.learn(worker, found.hashes[grain], found.counted.get(worker, 0)):
            self._beliefs.setdefault(request_id, []).append((worker, news))

    def end(self, request_id: str, now: float) -> None:
        """Its first token came, or never will: what was only believed of it is forgotten soon. Idempotent."""
        for worker, news in self._beliefs.pop(request_id, ()):
            self._doubts.append((now + DOUBT_S, worker, news))
        while self._doubts and self._doubts[0][0] <= now:
            _, worker, news = self._doubts.popleft()
            if (index := self.index(worker)) is not None:
                index.doubt(worker, news)


def incarnation(member: Member) -> Incarnation:
    return member.worker, member.epoch


def _grain(member: Member) -> int:
    size = member.layout.block_tokens
    return size if member.kv_events else -(-GRAIN_TOKENS // size) * size
