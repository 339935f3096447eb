"""What became findable in a prefix cache and what was evicted from it, for those who follow it from elsewhere.

A block is named by its route hash, the chained 60-bit hash by which routers know it. Each follower has a tail: what
changed since it last took from it, where only the last change of a block counts. Who begins, or fell so far behind that
its tail was cut, takes a snapshot.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from penstock.blocks import BlockId

MOST_PENDING = 1 << 16  # changes; beyond them a snapshot is as cheap


class Origin(NamedTuple):
    """What a block holds, for followers who tell those that name blocks by hashes of their own."""

    parent: int | None  # route hash of the block before it
    tokens: bytes  # packed
    salt: str


UNTOLD = Origin(None, b"", "")  # where nobody asks for origins

Changes = dict[int, Origin | None]  # by route hash, in order: stored, or evicted


class Tail:
    """One follower's part of a journal. `is_cut`: more changed than a tail holds, so it must begin anew.

    The follower sets `on_change` to what is called when the tail is no longer empty.
    """

    def __init__(self, most_pending: int) -> None:
        self.on_change: Callable[[], None] = lambda: None
        self.is_cut = False
        self._changes: Changes = {}
        self._most_pending = most_pending

    def __len__(self) -> int:
        return len(self._changes)

    def take(self) -> Changes:
        """What changed since the last call; some of it may be no news."""
        changes, self._changes = self._changes, {}
        return changes

    def add(self, route: int, origin: Origin | None) -> None:
        """Called by Journal."""
        if self.is_cut:
            return
        was_empty = not self._changes
        self._changes.pop(route, None)  # the order is that of the last changes
        self._changes[route] = origin
        if was_empty:
            self.on_change()
        elif len(self._changes) > self._most_pending:
            self.is_cut = True
            self._changes = {}

    def begin(self) -> None:
        """What came before this moment is known otherwise, or does not matter any more."""
        self.is_cut = False
        self._changes = {}


class Journal:
    """Owned by one worker, fed by its `PrefixCache`.

    `count` and `digest` are how many blocks can be found, and the XOR of their route hashes. Of blocks whose route
    hashes collide only the first is told. `keeps_origins` says whether a follower wants them.
    """

    def __init__(self, blocks: int, keeps_origins: bool = False, most_pending: int = MOST_PENDING) -> None:
        self.count = 0
        self.digest = 0
        self.keeps_origins = keeps_origins
        self._most_pending = most_pending
        self._route_of = array("Q", bytes(8 * blocks))  # by block; 0: it is not told of
        self._told: set[int] = set()
        self._tails: dict[Tail, None] = {}

    def stored(self, block: BlockId, route: int, origin: Origin = UNTOLD) -> None:
        """`block` can be found from now on."""
        if route in self._told or not route:
            return
        self._told.add(route)
        self._route_of[block] = route
        self._note(1, route, origin)

    def evicted(self, block: BlockId) -> None:
        """`block` can not be found any more."""
        if route := self._route_of[block]:
            self._told.remove(route)
            self._route_of[block] = 0
            self._note(-1, route, None)

    @contextmanager
    def follow(self) -> Iterator[Tail]:
        """A tail that grows while inside the block."""
        tail = Tail(self._most_pending)
        self._tails[tail] = None
        try:
            yield tail
        finally:
            del self._tails[tail]

    def snapshot(self, tail: Tail) -> npt.NDArray[np.uint64]:
        """The route hashes of all blocks that can be found, a copy; `tail` has what changes from now on."""
        tail.begin()
        routes = np.frombuffer(self._route_of, np.uint64)
        told: npt.NDArray[np.uint64] = routes[routes != 0]
        return told

    def _note(self, sign: int, route: int, origin: Origin | None) -> None:
        self.count += sign
        self.digest ^= route
        for tail in self._tails:
            tail.add(route, origin)
