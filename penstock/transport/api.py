"""The port of KV transports.

A worker offers its own region; peers attach to it and then compute in it, in place. Who has attached can write until
it detaches, is known to be dead, or is killed: that is what `lease` quarantines wait for. Transports that copy
(write-through, streamed) join this port with the transfer library.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Protocol

import msgspec

from penstock.blocks import KvLayout, Region


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


class Transport(Protocol):
    """One way of reaching memory."""

    name: str

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
