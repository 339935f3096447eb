"""The port of KV transports.

A worker offers its own region. Peers that reach its memory attach to it and compute in it, in place; others connect and
have blocks of their own written through to it. Who has attached or is connected can write until it leaves, is known to
be dead, or is killed: that is what `lease` quarantines wait for.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import msgspec

from penstock.blocks import BlockId, KvLayout, Region


class Offer(msgspec.Struct, frozen=True):
    """How a peer finds a region. `address` is the backend's own."""

    transport: str
    owner: str
    epoch: int
    address: str
    layout: KvLayout
    blocks: int

    @property
    def key(self) -> tuple[str, int]:
        """The offered region's."""
        return (self.owner, self.epoch)


class Exported(Protocol):
    """The owner's side of an offered region."""

    region: Region
    offer: Offer

    async def wait_gone(self, writer: str) -> None:
        """Returns once `writer` (its "worker:epoch") certainly cannot write any more: detached, dead, never came."""
        ...

    def kill(self, writer: str) -> None:
        """Ends a writer that is stuck with memory it may still write. `wait_gone` returns soon after."""
        ...


class Attached(Protocol):
    """A peer's region, mapped here. `gone` is set when the owner is."""

    region: Region

    @property
    def is_owner_gone(self) -> bool: ...


class Pipe(Protocol):
    """Writes blocks of this worker's region into a peer's, in the order asked for, while more of them are computed."""

    def write(self, blocks: Sequence[tuple[BlockId, BlockId]]) -> None:
        """Has each pair's first block, which must not change until `flush`, written into its second one there."""
        ...

    async def flush(self) -> None:
        """Returns when all of it is in place. Raises ConnectionLost if it never will be."""
        ...


class Transport(Protocol):
    """One way of reaching memory."""

    name: str
    is_in_place: bool  # whether peers `attach`; else they `connect`

    @property
    def memory(self) -> str:
        """Members with equal, non-empty values reach each other's regions."""
        ...

    def export(self, owner: str, epoch: int, layout: KvLayout, blocks: int) -> AbstractAsyncContextManager[Exported]:
        """Makes a region of zeroed, faulted-in memory and offers it while inside the block."""
        ...

    def attach(self, offer: Offer, writer: str) -> AbstractAsyncContextManager[Attached]:
        """Maps a peer's region, faulted in, while inside the block. Raises Refused, StaleEpoch or ConnectionLost."""
        ...

    def connect(self, offer: Offer, source: Region, writer: str) -> AbstractAsyncContextManager[Pipe]:
        """A pipe from `source`, this worker's own region; once left, nothing is written any more.

        Raises Refused, StaleEpoch or ConnectionLost.
        """
        ...
