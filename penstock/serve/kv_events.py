"""What a worker's cache holds, told to routers that ask: all of it once, then every change.

router --- kv_events -----------------> worker
       <-- Part, Part, ... ------------  what can be found now, a few thousand blocks each
       <-- Change, Change, ... --------  as it comes, at most every `flush_s`; an empty one when it has been quiet
       --- how many were read -------->  so that no more than `WINDOW` are ever under way

A router that reads too slowly gets the last change of each block only, and if even these become too many, all again.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import msgspec
import numpy as np

from penstock import clock
from penstock.errors import ConnectionLost
from penstock.kv.journal import Journal, Tail
from penstock.serve.rpc import Call

CALL = "call"  # `Member.kv_events` of a worker that serves this
WINDOW = 16  # messages under way to one router, at most; it says what it has read when it has read half of that


class Part(msgspec.Struct, frozen=True, array_like=True, tag=0):
    """`hashes` are packed, 8 bytes each, little-endian. `count` and `digest` are those of all parts together."""

    number: int
    parts: int
    hashes: bytes
    count: int
    digest: int


class Change(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """What became findable and what was evicted; `count` and `digest` are how it stands after that.

    `sequence` counts them from 1 since the last snapshot. `age_s` is for how long the oldest may have waited.
    """

    sequence: int
    stored: bytes
    removed: bytes
    count: int
    digest: int
    age_s: float = 0.0


@dataclass(frozen=True, slots=True)
class TellOptions:
    """How often changes are told; how long after the last one it is said once more how things stand."""

    flush_s: float = 0.02
    audit_s: float = 2.0
    part_blocks: int = 4096


_decode_read = msgspec.msgpack.Decoder(int).decode


class Teller:
    """Serves `kv_events` of one worker, to any number of routers."""

    def __init__(self, journal: Journal, options: TellOptions) -> None:
        self._journal = journal
        self._options = options

    async def tell(self, call: Call) -> None:
        """Until the caller leaves."""
        changed = asyncio.Event()
        with self._journal.follow(changed.set) as tail:
            reader = _Reader(call, self._journal, tail, changed, self._options)
            while True:
                await reader.tell_all()
                await reader.tell_changes()


class _Reader:
    """One router that is told. `changed` is set while its tail holds something, or was cut."""

    def __init__(self, call: Call, journal: Journal, tail: Tail, changed: asyncio.Event, options: TellOptions) -> None:
        self._call = call
        self._journal = journal
        self._tail = tail
        self._changed = changed
        self._options = options
        self._unread = 0

    async def tell_all(self) -> None:
        size, count, digest = self._options.part_blocks, self._journal.count, self._journal.digest
        hashes = self._journal.snapshot(self._tail).astype("<u8", copy=False)
        self._changed.clear()
        parts = max(1, -(-count // size))
        for number in range(parts):
            await self._wait_room()
            packed = hashes[number * size : (number + 1) * size].tobytes()
            self._send(Part(number, parts, packed, count, digest))
            await asyncio.sleep(0)

    async def tell_changes(self) -> None:
        """Returns when so much changed that all must be told again."""
        sequence, audit_s = 0, None
        while True:
            is_change = await _comes(self._changed, audit_s)
            since_s = clock.now()
            if is_change:
                await asyncio.sleep(self._options.flush_s)
            await self._wait_room()
            if self._tail.is_cut:
                return
            sequence += 1
            self._send(self._take(sequence, since_s))
            audit_s = self._options.audit_s if is_change else None

    def _take(self, sequence: int, since_s: float) -> Change:
        changes = self._tail.take()
        self._changed.clear()
        stored = np.array([route for route, origin in changes.items() if origin is not None], "<u8").tobytes()
        removed = np.array([route for route, origin in changes.items() if origin is None], "<u8").tobytes()
        return Change(sequence, stored, removed, self._journal.count, self._journal.digest, clock.now() - since_s)

    def _send(self, message: Part | Change) -> None:
        self._unread += 1
        self._call.send(message)

    async def _wait_room(self) -> None:
        """Returns when one more may be under way."""
        while self._unread >= WINDOW:
            read = await self._call.receive(_decode_read)
            if read is None:
                raise ConnectionLost(f"{self._call.peer_name} reads no more KV events")
            self._unread -= read


async def _comes(changed: asyncio.Event, within_s: float | None) -> bool:
    """Whether it is set within that time."""
    try:
        async with asyncio.timeout(within_s):
            await changed.wait()
        return True
    except TimeoutError:
        return False
