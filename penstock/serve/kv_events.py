"""What a worker's cache holds, told to routers that ask: all of it once, then every change.

router --- kv_events -----------------> worker
       <-- Part, Part, ... ------------  what can be found now, a few thousand blocks each
       <-- Change, Change, ... --------  as it comes, at most every `flush_s`; an empty one as audit
       --- how many were read -------->  so that no more than `WINDOW` are ever under way

A router that reads too slowly gets the last change of each block only, and if even these become too many, all again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import numpy as np

from penstock import clock
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
    """How long changes are collected, and how long after one it is said once more how things stand."""

    flush_s: float = 0.02
    audit_s: float = 5.0
    part_blocks: int = 4096


_decode_read = msgspec.msgpack.Decoder(int).decode


class Teller:
    """Serves `kv_events` of one worker, to any number of routers."""

    def __init__(self, journal: Journal, options: TellOptions) -> None:
        self._journal = journal
        self._options = options

    async def tell(self, call: Call) -> None:
        """Until the caller leaves."""
        with self._journal.follow() as tail:
            await _Reader(call, self._journal, tail, self._options).serve()


class _Reader:
    """One router that is told. While nothing changes there is no timer, and its task waits for what the router read."""

    def __init__(self, call: Call, journal: Journal, tail: Tail, options: TellOptions) -> None:
        self._call = call
        self._journal = journal
        self._tail = tail
        self._options = options
        self._loop = asyncio.get_running_loop()
        self._parts: Iterator[Part] = iter(())  # of a snapshot, yet to be sent
        self._unread = 0
        self._sequence = 0
        self._changed_s = 0.0
        self._is_audit_due = False
        self._flush: asyncio.TimerHandle | None = None
        self._audit: asyncio.TimerHandle | None = None

    async def serve(self) -> None:
        self._tail.on_change = self._on_change
        self._begin()
        try:
            self._tell()
            while (read := await self._call.receive(_decode_read)) is not None:
                self._unread -= read
                self._tell()
        finally:
            for timer in (self._flush, self._audit):
                if timer is not None:
                    timer.cancel()

    def _on_change(self) -> None:
        self._changed_s = clock.now()
        if self._flush is None:
            self._flush = self._loop.call_later(self._options.flush_s, self._on_flush)

    def _on_flush(self) -> None:
        self._flush = None
        if self._audit is None:
            self._audit = self._loop.call_later(self._options.audit_s, self._on_audit)
        self._tell()

    def _on_audit(self) -> None:
        self._audit = None
        self._is_audit_due = True
        self._tell()

    def _tell(self) -> None:
        """Sends what there is and due, as far as the router keeps up; called again when it has read more."""
        if self._tail.is_cut:
            self._begin()
        while self._unread < WINDOW and (part := next(self._parts, None)) is not None:
            self._send(part)
        if self._unread < WINDOW and self._flush is None and (len(self._tail) or self._is_audit_due):
            self._sequence += 1
            self._send(self._take())

    def _begin(self) -> None:
        count, digest, size = self._journal.count, self._journal.digest, self._options.part_blocks
        hashes = self._journal.snapshot(self._tail).astype("<u8", copy=False)
        parts = max(1, -(-count // size))
        self._parts = (
            Part(number, parts, hashes[number * size : (number + 1) * size].tobytes(), count, digest)
            for number in range(parts)
        )
        self._sequence = 0

    def _take(self) -> Change:
        self._is_audit_due = False
        changes = self._tail.take()
        stored = np.array([route for route, origin in changes.items() if origin is not None], "<u8").tobytes()
        removed = np.array([route for route, origin in changes.items() if origin is None], "<u8").tobytes()
        age_s = clock.now() - self._changed_s if changes else 0.0
        return Change(self._sequence, stored, removed, self._journal.count, self._journal.digest, age_s)

    def _send(self, message: Part | Change) -> None:
        self._unread += 1
        self._call.send(message)
