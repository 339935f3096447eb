"""No transport: a region that only its owner's engine can reach, such as a GPU's memory without peer access.

Its `memory` is empty, so routers pair such a worker with itself alone.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from penstock.blocks import KvLayout, Region
from penstock.errors import Refused
from penstock.transport.api import Attached, Exported, Offer, Pipe

NAME = "private"


class PrivateTransport:
    """See `transport.api.Transport`. The region has no buffer: the engine allocates its own memory for it."""

    name = NAME
    is_in_place = True
    memory = ""

    @asynccontextmanager
    async def export(self, owner: str, epoch: int, layout: KvLayout, blocks: int) -> AsyncIterator[Exported]:
        """See `transport.api.Transport`."""
        yield _Export(Region(owner, epoch, layout, blocks, None))

    def connect(self, offer: Offer, source: Region, writer: str) -> AbstractAsyncContextManager[Pipe]:
        """Always raises Refused: who reaches this memory computes in it."""
        raise Refused(f"{NAME} memory is not written from afar: {writer} must attach to the region of {offer.owner}")

    def attach(self, offer: Offer, writer: str) -> AbstractAsyncContextManager[Attached]:
        """Always raises Refused."""
        raise Refused(f"the KV of {offer.owner} is in memory that {writer} cannot reach")


class _Export:
    """See `transport.api.Exported`. Nobody ever attaches."""

    def __init__(self, region: Region) -> None:
        self.region = region
        self.offer = Offer(NAME, region.owner, region.epoch, "", region.layout, region.blocks)

    async def wait_gone(self, writer: str) -> None:
        return

    def kill(self, writer: str) -> None:
        return
