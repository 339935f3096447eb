"""Leases: blocks that another worker may write, and when they may be used again.

    reserved --wrote--> receiving --commit--> committed      the sequence owns the blocks now
        \\                   \\
         +-------------------+---abort, silence-> aborted    the blocks go to quarantine until the writer has
                                                             confirmed that it stopped, or is known to be gone

A store through a mapping cannot be called back by a message. So memory that a peer may still write is never reused:
an aborted lease keeps its blocks until `settle`: its writer confirmed, or its process ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from penstock.blocks import BlockId
from penstock.errors import LeaseLost
from penstock.kv.prefix_cache import PrefixCache

LeaseState = Literal["reserved", "receiving", "committed", "aborted"]


@dataclass(slots=True)
class Lease:
    """Blocks lent to `writer` ("worker:epoch"). Only `LeaseTable` changes it."""

    id: int
    writer: str
    needed_blocks: int  # at a time, for the whole prompt beyond the cached prefix
    renewed_s: float
    state: LeaseState = "reserved"
    blocks: list[BlockId] = field(default_factory=list)


class LeaseTable:
    """All leases on one worker's region. What comes after `lease_s` of silence is too late. Owned by the decoder."""

    def __init__(self, cache: PrefixCache, lease_s: float) -> None:
        self._cache = cache
        self._lease_s = lease_s
        self._next_id = 1
        self._open: dict[int, Lease] = {}
        self._aborted: dict[int, Lease] = {}

    @property
    def leased_blocks(self) -> int:
        return sum(len(lease.blocks) for lease in self._open.values())

    @property
    def promised_blocks(self) -> int:
        """Blocks that open leases may still grow by: new work must leave them alone."""
        return sum(max(0, lease.needed_blocks - len(lease.blocks)) for lease in self._open.values())

    def open(self, now: float, writer: str, needed_blocks: int) -> Lease:
        """A lease without blocks yet; `grow` it."""
        lease = Lease(self._next_id, writer, needed_blocks, renewed_s=now)
        self._next_id += 1
        self._open[lease.id] = lease
        return lease

    def grow(self, now: float, lease_id: int, total_blocks: int) -> Sequence[BlockId]:
        """Lends blocks until the lease has `total_blocks`; returns all of them, so a repeated request is harmless.

        Raises LeaseLost, or OutOfBlocks if the cache has too few.
        """
        lease = self._renew(now, lease_id)
        missing = min(total_blocks, lease.needed_blocks) - len(lease.blocks)
        if missing > 0:
            lease.blocks += self._cache.take(missing)
        return lease.blocks

    def wrote(self, now: float, lease_id: int) -> None:
        """The writer has begun to write, or goes on. Raises LeaseLost."""
        self._renew(now, lease_id).state = "receiving"

    def touch(self, now: float, lease_id: int) -> None:
        """The writer is alive. Raises LeaseLost."""
        self._renew(now, lease_id)

    def commit_some(self, now: float, lease_id: int, blocks: Sequence[BlockId]) -> None:
        """The caller owns these of its blocks: they are written for good, and the writer goes on with the others.

        Raises LeaseLost.
        """
        lease = self._renew(now, lease_id)
        gone = dict.fromkeys(blocks)
        lease.blocks = [block for block in lease.blocks if block not in gone]

    def commit(self, now: float, lease_id: int) -> list[BlockId]:
        """All is written: the caller owns the blocks, with one reference each. Raises LeaseLost."""
        lease = self._renew(now, lease_id)
        del self._open[lease_id]
        lease.state = "committed"
        return lease.blocks

    def abort(self, lease_id: int) -> None:
        """Nothing under this lease counts any more. Idempotent; no effect on a committed lease."""
        lease = self._open.pop(lease_id, None)
        if lease is None:
            return
        lease.state = "aborted"
        if lease.blocks:
            self._cache.quarantine(lease.blocks)
            self._aborted[lease_id] = lease

    def youngest_open(self) -> Lease | None:
        """The lease whose loss costs least: the last one opened."""
        return next(reversed(self._open.values()), None)

    def settle(self, lease_id: int) -> None:
        """Nobody can write under this aborted lease any more: its blocks are free again. Idempotent."""
        lease = self._aborted.pop(lease_id, None)
        if lease is not None:
            self._cache.readmit(lease.blocks)

    def _renew(self, now: float, lease_id: int) -> Lease:
        lease = self._open.get(lease_id)
        if lease is None:
            raise LeaseLost(f"lease {lease_id} is not open here: it lapsed, was aborted or is committed already")
        if now - lease.renewed_s > self._lease_s:
            self.abort(lease_id)
            raise LeaseLost(
                f"lease {lease_id} of {lease.writer} lapsed after {now - lease.renewed_s:.1f} s of silence; "
                "prefill again, or raise --lease-s"
            )
        lease.renewed_s = now
        return lease
