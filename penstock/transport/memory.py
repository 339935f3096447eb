"""Regions shared by reference between the workers of one process, on any event loop.

The same promises as between processes: who has attached is a writer until it detaches or the hub is told of its death.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from penstock.blocks import KvLayout, Region
from penstock.errors import KvError, Refused
from penstock.transport.api import Attached, Exported, Limits, Offer, Pipe
from penstock.transport.offers import check

NAME = "memory"


def _nobody_kills(writer: str) -> None:
    raise KvError(f"{writer} is stuck with memory it may write, and this hub was not told how to kill it")


@asynccontextmanager
async def heap_region(owner: str, epoch: int, layout: KvLayout, blocks: int) -> AsyncIterator[Region]:
    """See `transport.api.MakeRegion`: memory of this process alone."""
    yield Region(owner, epoch, layout, blocks, memoryview(bytearray(blocks * layout.block_bytes)))


@asynccontextmanager
async def bare_region(owner: str, epoch: int, layout: KvLayout, blocks: int) -> AsyncIterator[Region]:
    """See `transport.api.MakeRegion`: no buffer, since the engine has memory of its own for it, or needs none."""
    yield Region(owner, epoch, layout, blocks, None)


class MemoryHub:
    """The host that workers of one process pretend to share. Workers on different hubs cannot reach each other.

    `on_kill` is called with the writer ("worker:epoch") that an owner gave up on; it should end in `died`.
    """

    def __init__(self, host: str = "one-process", on_kill: Callable[[str], None] = _nobody_kills) -> None:
        self.host = host
        self.on_kill = on_kill
        self._exports: dict[str, _Export] = {}  # by owner

    def died(self, worker: str) -> None:
        """`worker` ("worker:epoch") does nothing any more, neither as writer nor as owner."""
        for export in list(self._exports.values()):
            export.remove_all_of(worker)
            if f"{export.region.owner}:{export.region.epoch}" == worker:
                self.withdraw(export)

    def offer(self, export: _Export) -> None:
        """For MemoryTransport, like the next two. A newer incarnation takes the older one's place."""
        self._exports[export.region.owner] = export

    def withdraw(self, export: _Export) -> None:
        export.is_withdrawn = True
        if self._exports.get(export.region.owner) is export:
            del self._exports[export.region.owner]

    def find(self, offer: Offer) -> _Export:
        """Raises Refused or StaleEpoch."""
        export = self._exports.get(offer.address)
        if export is None:
            raise Refused(f"{offer.owner} offers no region on {self.host} any more")
        check(offer, export.offer)
        return export


class MemoryTransport:
    """See `transport.api.Transport`."""

    name = NAME
    limits = Limits(is_in_place=True)

    def __init__(self, hub: MemoryHub) -> None:
        self.memory = f"{NAME}:{hub.host}"
        self._hub = hub

    @asynccontextmanager
    async def export(self, region: Region) -> AsyncIterator[Exported]:
        """See `transport.api.Transport`."""
        export = _Export(region, self._hub, self.memory)
        self._hub.offer(export)
        try:
            yield export
        finally:
            self._hub.withdraw(export)

    def connect(
        self, offer: Offer, source: Region, writer: str, request: str, on_moved: Callable[[], None]
    ) -> AbstractAsyncContextManager[Pipe]:
        """Always raises Refused: who reaches this memory computes in it."""
        raise Refused(f"{NAME} memory is not written from afar: {writer} must attach to the region of {offer.owner}")

    @asynccontextmanager
    async def attach(self, offer: Offer, writer: str) -> AsyncIterator[Attached]:
        """See `transport.api.Transport`."""
        export = self._hub.find(offer)
        attachment = _Attachment(export, writer)
        export.add(attachment)
        try:
            yield attachment
        finally:
            export.remove(attachment)


class _Export:
    """See `transport.api.Exported`."""

    def __init__(self, region: Region, hub: MemoryHub, memory: str) -> None:
        self.region = region
        self.offer = Offer(NAME, *region.key, region.owner, region.layout, region.blocks, memory)
        self.is_withdrawn = False
        self._hub = hub
        self._attachments: list[_Attachment] = []

    async def fence(self, writer: str, request: str) -> None:
        for attachment in self._of(writer):
            await attachment.gone.wait()

    def kill(self, writer: str) -> None:
        if self._of(writer):
            self._hub.on_kill(writer)

    def add(self, attachment: _Attachment) -> None:
        self._attachments.append(attachment)

    def remove(self, attachment: _Attachment) -> None:
        """Idempotent: a death and the end of a block may both report it."""
        if attachment in self._attachments:
            self._attachments.remove(attachment)
            attachment.gone.set()

    def remove_all_of(self, writer: str) -> None:
        for attachment in self._of(writer):
            self.remove(attachment)

    def _of(self, writer: str) -> list[_Attachment]:
        return [attachment for attachment in self._attachments if attachment.writer == writer]


class _Attachment:
    """See `transport.api.Attached`."""

    def __init__(self, export: _Export, writer: str) -> None:
        self.region = export.region
        self.writer = writer
        self.gone = asyncio.Event()
        self._export = export

    @property
    def is_owner_gone(self) -> bool:
        return self._export.is_withdrawn
