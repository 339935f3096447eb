"""A pipe of the `tcp` transport on the I/O thread: blocks that are to be moved, cut into frames, and counted."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from penstock import clock
from penstock.blocks import BlockId
from penstock.errors import ConnectionLost, PenstockError
from penstock.transport.api import Moved
from penstock.transport.tcp_backlog import Backlog, Run
from penstock.transport.tcp_frames import CLOSE, MAX_RANGES, OPEN, digest, frame_head

if TYPE_CHECKING:
    from penstock.transport.tcp_link import Link, Peer

log = logging.getLogger(__name__)

ATTEMPTS = 2  # at getting a frame over undamaged


@dataclass(slots=True, eq=False)
class _Part:
    """What a frame moves, however often: it ends so many blocks."""

    blocks: int
    is_placed: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """A part of a pipe's blocks on its way: to the owner or, if `is_read`, from there."""

    session: Session
    number: int
    is_read: bool
    runs: list[Run]
    size: int
    part: _Part
    attempt: int
    loaded_s: float


class Session:
    """new -> open (`move`, `flush`) -> left;  lost with its link, or fenced off, at any time"""

    def __init__(self, peer: Peer, region: memoryview, request: str, on_moved: Callable[[], None]) -> None:
        self.moved = Moved()
        self._peer = peer
        self._region = region
        self._request = request
        self._on_moved = on_moved
        self._link: Link | None = None
        self._number = 0
        self._asked: deque[Backlog] = deque()  # in order; each is for another direction than the one before
        self._again: deque[Frame] = deque()  # arrived damaged
        self._writes: deque[_Part] = deque()  # in order, from the first one on that is not placed
        self._under_way = 0  # frames
        self._began_s = 0.0  # when there was something to do, after there was nothing
        self._error: PenstockError | None = None
        self._answered = asyncio.Event()  # it is open, or lost
        self._settled = asyncio.Event()  # everything is placed, or nothing more will be
        self._settled.set()

    # For the pipe

    async def open(self) -> None:
        """Raises Refused, StaleEpoch or ConnectionLost."""
        self._link = link = await self._peer.link()
        self._number = link.register(self)
        link.say(OPEN, self._number, name=digest((self._request.encode(),)))
        await link.wait(self._answered)
        if self._error is not None:
            raise self._error

    def move(self, pairs: Sequence[tuple[BlockId, BlockId]], is_read: bool) -> None:
        if self._link is None or self.is_over or not pairs:
            return  # `flush` says so
        if self._settled.is_set():
            self._settled.clear()
            self._began_s = clock.now()
        if not self._asked or self._asked[-1].is_read != is_read:
            self._asked.append(Backlog(self._peer.offer.layout.block_bytes, is_read))
        self._asked[-1].add(pairs)
        self._link.send(self)

    async def flush(self) -> None:
        """Raises ConnectionLost."""
        if self._link is not None:
            await self._link.wait(self._settled)
        if self._error is not None:
            raise self._error

    async def leave(self) -> None:
        """Nothing is sent from the region any more, and nothing stored there."""
        link, self._link = self._link, None
        if link is None or not self._number:
            return
        link.withdraw(self)
        if link.error is None:
            link.say(CLOSE, self._number)
            link.forget(self._number)

    # For its link and lanes

    @property
    def has_more(self) -> bool:
        """To be sent or asked for."""
        return bool(self._asked or self._again)

    @property
    def is_over(self) -> bool:
        """It was left, lost or fenced off: its region is not to be touched."""
        return self._link is None or self._error is not None

    def next_frame(self, number: int, limit_bytes: int) -> Frame:
        """Only while it `has_more`."""
        self._under_way += 1
        if self._again:
            bad = self._again.popleft()
            return replace(bad, number=number, attempt=bad.attempt + 1, loaded_s=clock.now())
        backlog = self._asked[0]
        before = backlog.taken_pairs
        runs = backlog.take(limit_bytes, MAX_RANGES)
        if not backlog:
            self._asked.popleft()
        part = _Part(backlog.taken_pairs - before)
        if not backlog.is_read:
            self._writes.append(part)
        size = sum(run.size for run in runs)
        return Frame(self, number, backlog.is_read, runs, size, part, attempt=1, loaded_s=clock.now())

    def own(self, frame: Frame) -> list[memoryview]:
        """Where a frame's bytes are in this worker's region."""
        return [self._region[run.here : run.here + run.size] for run in frame.runs]

    def message(self, frame: Frame, has_checksums: bool) -> list[memoryview]:
        """All of a frame as it is sent; the first piece is its head."""
        payload = None if frame.is_read else self.own(frame)
        ranges = [(run.there, run.size) for run in frame.runs]
        return [memoryview(frame_head(self._number, frame.number, ranges, payload, has_checksums)), *(payload or ())]

    def on_opened(self) -> None:
        self._answered.set()

    def on_placed(self, frame: Frame) -> None:
        """It is all in place, here or there."""
        self._under_way -= 1
        if self.is_over:
            return
        frame.part.is_placed = True
        blocks, seconds = self.moved.blocks, self.moved.seconds
        while self._writes and self._writes[0].is_placed:
            blocks += self._writes.popleft().blocks
        if not self._under_way and not self.has_more:
            seconds += clock.now() - self._began_s
            self._settled.set()
        size_bytes, descriptors = self.moved.size_bytes + frame.size, self.moved.descriptors + len(frame.runs)
        self.moved = Moved(blocks, size_bytes, seconds, descriptors)
        self._on_moved()

    def on_damaged(self, frame: Frame) -> None:
        """It is moved once more."""
        self._under_way -= 1
        if self._link is None or self.is_over:
            return
        owner = self._peer.offer.owner
        if frame.attempt == ATTEMPTS:
            why = f"{frame.size} bytes to or from {owner} were damaged on their way {ATTEMPTS} times"
            self._give_up(self._link, ConnectionLost(why))
            return
        log.warning("%d bytes to or from %s were damaged on their way and are sent again", frame.size, owner)
        self._again.append(frame)
        self._link.send(self)

    def on_dropped(self) -> None:
        """The owner has closed this session."""
        self._under_way -= 1
        if self._link is not None and not self.is_over:
            self._give_up(self._link, ConnectionLost(f"{self._peer.offer.owner} took its memory back"))

    def on_lost(self, error: PenstockError) -> None:
        self._error = error
        self._answered.set()
        self._settled.set()

    def _give_up(self, link: Link, error: ConnectionLost) -> None:
        """Its link goes on."""
        link.withdraw(self)
        self.on_lost(error)
