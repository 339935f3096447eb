"""What the workers of a fleet tell of their caches, entered into the router's prefix indices.

One task for each worker that tells. What it was told is compared with the worker's own count and digest after each
change: if they differ something was lost, and the worker is asked for all of it again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import msgspec
import numpy as np

from penstock import clock
from penstock.cluster import Member
from penstock.errors import PenstockError
from penstock.metrics import IndexMetrics
from penstock.policy.prefix_index import Incarnation, PrefixIndex
from penstock.serve import kv_events
from penstock.serve.kv_events import Change, Part
from penstock.serve.rpc import Call, Endpoint

log = logging.getLogger(__name__)


class Feed(Protocol):
    """One worker's events, whatever they come by."""

    async def run(self, index: PrefixIndex, worker: Incarnation) -> None:
        """Enters into `index` what `worker` tells, which has a seat there until this is cancelled.

        Does not return by itself, and raises only what is a bug: who tells is lost and found again.
        """
        ...


NewFeed: TypeAlias = Callable[[Member, Endpoint, IndexMetrics], Feed]


class KvWatch:
    """Keeps one feed for each worker that is there and tells. Owned by one router.

    `feeds` makes them, by the scheme of `Member.kv_events`; a worker whose scheme is not there counts as one that tells
    nothing. Each feed is a task of `endpoint`.
    """

    def __init__(self, endpoint: Endpoint, feeds: Mapping[str, NewFeed]) -> None:
        self.metrics = IndexMetrics()
        self._endpoint = endpoint
        self._feeds = feeds
        self._tasks: dict[Incarnation, asyncio.Task[None]] = {}

    def update(self, seats: Mapping[Incarnation, tuple[Member, PrefixIndex]]) -> None:
        """These are there now; those who left have lost their seats already."""
        for worker in [worker for worker in self._tasks if worker not in seats]:
            self._tasks.pop(worker).cancel()
        for worker, (member, index) in seats.items():
            new_feed = self._feeds.get(member.kv_events.partition(":")[0])
            if worker not in self._tasks and new_feed is not None:
                self._tasks[worker] = self._endpoint.spawn(
                    new_feed(member, self._endpoint, self.metrics).run(index, worker)
                )

    async def close(self) -> None:
        """Returns when all feeds have ended."""
        tasks = list(self._tasks.values())
        self.update({})
        if tasks:
            await asyncio.wait(tasks)


@dataclass(frozen=True, slots=True)
class FollowOptions:
    """How many blocks are entered in one turn of the loop, and how long a lost worker is left alone."""

    turn_blocks: int = 2048
    retry_s: float = 0.1
    retry_most_s: float = 1.0
    steady_s: float = 5.0  # a snapshot that was right for so long is replaced at once when it no longer is


Update: TypeAlias = Part | Change

_decode_update: Callable[[msgspec.Raw], Update] = msgspec.msgpack.Decoder(Part | Change).decode


class CallFeed:
    """Events of penstock's own workers, by a call to their addresses."""

    def __init__(
        self, member: Member, endpoint: Endpoint, metrics: IndexMetrics, options: FollowOptions = FollowOptions()
    ) -> None:
        self._member = member
        self._endpoint = endpoint
        self._metrics = metrics
        self._options = options

    async def run(self, index: PrefixIndex, worker: Incarnation) -> None:
        """See Feed."""
        options, retry_s = self._options, 0.0
        while True:
            began_s = clock.now()
            try:
                await self._follow(_Copy(index, worker, self._metrics, options.turn_blocks))
                log.warning("%s (epoch %d) holds other blocks than it told; asking for all of them", *worker)
            except PenstockError as error:
                log.warning("%s (epoch %d) tells nothing of its cache now: %s", *worker, error)
            index.tell(worker, False)
            is_steady = clock.now() - began_s > options.steady_s
            retry_s = 0.0 if is_steady else min(options.retry_most_s, max(options.retry_s, 2 * retry_s))
            await asyncio.sleep(retry_s)

    async def _follow(self, copy: _Copy) -> None:
        """Returns when the copy is wrong. Raises PenstockError where the worker is lost or refuses."""
        peer = await self._endpoint.peer(self._member.addresses)
        async with peer.call("kv_events", None) as call:
            unsaid = 0
            while (update := await self.receive(call)) is not None:
                if not await copy.enter(update):
                    self._metrics.drifts += 1
                    return
                unsaid += 1
                if unsaid >= kv_events.WINDOW // 2:
                    call.send(unsaid)
                    unsaid = 0

    async def receive(self, call: Call) -> Update | None:
        """What the worker tells next."""
        return await call.receive(_decode_update)


class _Copy:
    """What one worker holds, as one call told it."""

    def __init__(self, index: PrefixIndex, worker: Incarnation, metrics: IndexMetrics, turn_blocks: int) -> None:
        self._index = index
        self._worker = worker
        self._metrics = metrics
        self._turn_blocks = turn_blocks
        self._next_part = 0
        self._sequence: int | None = None  # of the last change; None: the snapshot is not whole yet

    async def enter(self, update: Update) -> bool:
        """False if something is missing. What comes once more is passed over."""
        return await (self._enter_part(update) if isinstance(update, Part) else self._enter_change(update))

    async def _enter_part(self, part: Part) -> bool:
        if part.number == 0:
            self._next_part, self._sequence = 0, None
            self._index.cleared(self._worker)
            self._index.tell(self._worker, True)  # from here on: what is believed meanwhile must end as well
        elif self._sequence is not None or part.number != self._next_part:
            return False
        await self._by_turns(self._index.stored, part.hashes)
        self._next_part += 1
        if self._next_part < part.parts:
            return True
        self._sequence = 0
        self._metrics.snapshots += 1
        return self._index.digest(self._worker) == (part.count, part.digest)

    async def _enter_change(self, change: Change) -> bool:
        if self._sequence is not None and change.sequence <= self._sequence:
            return True
        if self._sequence is None or change.sequence != self._sequence + 1:
            return False
        self._sequence = change.sequence
        await self._by_turns(self._index.removed, change.removed)
        await self._by_turns(self._index.stored, change.stored)
        if blocks := (len(change.removed) + len(change.stored)) // 8:
            self._metrics.changes += blocks
            self._metrics.lag_s.observe(change.age_s)
        return self._index.digest(self._worker) == (change.count, change.digest)

    async def _by_turns(self, enter: Callable[[Incarnation, Sequence[int]], None], packed: bytes) -> None:
        """Others get their turn after each `turn_blocks`."""
        blocks: list[int] = np.frombuffer(packed, "<u8").tolist()
        for start in range(0, len(blocks), self._turn_blocks):
            some = blocks[start : start + self._turn_blocks]
            enter(self._worker, some)
            if len(some) == self._turn_blocks:
                await asyncio.sleep(0)
