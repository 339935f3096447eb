"""The port of KV transports.

A worker exports its own region. Peers that reach its memory attach to it and compute in it, in place; others connect,
and have blocks of their own written into it, or some of its blocks read into theirs. Who is attached or connected may
write until it leaves, is known to be dead, is killed, or is fenced off: that is what quarantined blocks wait for.

    owner                                   peer
    export(region) --> Exported.offer --->  attach(offer) --> Attached.region           in place
                                            connect(offer, own region) --> Pipe         from afar
    fence, kill                             write, read, flush
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

import msgspec

from penstock.blocks import BlockId, KvLayout, Region
from penstock.policy.latency.transfers import TransferModel, over

UNKNOWN = over(start_s=1e-4, descriptor_s=1e-6, bytes_per_s=1e9)

MakeRegion = Callable[[str, int, KvLayout, int], AbstractAsyncContextManager[Region]]
"""(owner, epoch, layout, blocks): memory for a region while inside the block. Raises SetupError for want of it."""


class Offer(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a peer finds a region. `address` is the backend's own.

    `memory` is where the region is, for transports that are in place: peers with an equal one may attach to it.
    """

    transport: str
    owner: str
    epoch: int
    address: str
    layout: KvLayout
    blocks: int
    memory: str = ""

    @property
    def key(self) -> tuple[str, int]:
        """The offered region's."""
        return (self.owner, self.epoch)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a backend is able to do.

    `is_in_place`: peers attach, and nothing is copied; else they connect. `is_fenced`: the owner takes every byte
    itself, so it can stop taking those of one transfer at any moment; else only the writer's word or its end is proof.
    `prior` is how long transfers are expected to take before any was measured.
    """

    is_in_place: bool = False
    is_fenced: bool = False
    prior: TransferModel = UNKNOWN


class Moved(msgspec.Struct, frozen=True):
    """What of a transfer is in place. `seconds` are those in which something was on its way.

    `blocks` counts pairs in the order of asking: the first one that is missing comes after so many. What was moved
    beyond that is in `size_bytes` alone, which went in `descriptors` pieces.
    """

    blocks: int = 0
    size_bytes: int = 0
    seconds: float = 0.0
    descriptors: int = 0


class Exported(Protocol):
    """The owner's side of an exported region."""

    region: Region
    offer: Offer

    async def fence(self, writer: str, request: str) -> None:
        """Returns once nothing of what `writer` (its "worker:epoch") moves for `request` can be written any more.

        At once where the transport `is_fenced`; else when the writer has left this region, or is dead.
        """
        ...

    def kill(self, writer: str) -> None:
        """Ends a writer that is stuck with memory it may still write. `fence` returns soon after."""
        ...


class Attached(Protocol):
    """A peer's region, mapped here."""

    region: Region

    @property
    def is_owner_gone(self) -> bool: ...


class Pipe(Protocol):
    """Moves blocks between this worker's region and a peer's, in the order asked for, while more are computed."""

    @property
    def moved(self) -> Moved: ...

    def write(self, blocks: Sequence[tuple[BlockId, BlockId]]) -> None:
        """Has each pair's first block, which must not change until it is in place, written into its second one there.

        Raises KvError for blocks that do not exist.
        """
        ...

    def read(self, blocks: Sequence[tuple[BlockId, BlockId]]) -> None:
        """Has each pair's second block there read into its first one here. Raises KvError as `write` does."""
        ...

    async def flush(self) -> None:
        """Returns when all of it is in place. Raises ConnectionLost if it never will be."""
        ...


class Transport(Protocol):
    """One way of reaching memory. Used inside its own `async with` where it has one."""

    name: str
    limits: Limits

    @property
    def memory(self) -> str:
        """Where this worker is, for in-place transports: it may attach to regions whose offer says the same."""
        ...

    def export(self, region: Region) -> AbstractAsyncContextManager[Exported]:
        """Offers this worker's region while inside the block. Raises Refused for memory of a kind it cannot reach."""
        ...

    def attach(self, offer: Offer, writer: str) -> AbstractAsyncContextManager[Attached]:
        """Maps a peer's region, faulted in, while inside the block. Raises Refused, StaleEpoch or ConnectionLost."""
        ...

    def connect(
        self, offer: Offer, source: Region, writer: str, request: str, on_moved: Callable[[], None]
    ) -> AbstractAsyncContextManager[Pipe]:
        """A pipe between `source`, this worker's own region, and the one on offer; `on_moved` is called as blocks move.

        Once inside, the owner knows of this writer and request, so that it may fence them. Once left, nothing is sent
        any more; what is on its way of a pipe that was not flushed may still arrive, unless the owner fences it.
        Raises Refused, StaleEpoch or ConnectionLost.
        """
        ...
