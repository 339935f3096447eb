"""KV that crosses a simulated network: the transport port over `network`, with the faults of real ones.

A transfer takes the links' bandwidth while it flows, and goes on when its sender freezes, as an RDMA write does. Where
regions have memory, bytes land as they arrive, so that what is used too early or too late is wrong.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

from penstock.blocks import BlockId, KvLayout, Region
from penstock.errors import ConnectionLost, KvError, Refused
from penstock.sim.network import Network
from penstock.sim.wiring import Route, Wiring
from penstock.transport.api import Attached, Exported, Offer, Pipe
from penstock.transport.offers import check

NAME = "fabric"
LOCAL_BYTES_PER_S = 1e12  # between workers on one device
STALLED_S = 10.0  # without a byte more, after which a transfer is given up


@dataclass(frozen=True, slots=True)
class Software:
    """What programs add to what links take: to each transfer once, and for each block, one block after the other."""

    start_s: float = 0.0
    block_s: float = 0.0


def _nobody_kills(writer: str) -> None:
    raise KvError(f"{writer} is stuck with memory it may write, and this hub was not told how to kill it")


class FabricHub:
    """What all workers of a simulated cluster share: the network, and who may write where.

    With `has_memory` regions are made of real bytes, for engines that read what they wrote. `on_kill` is called with
    the writer ("worker:epoch") that an owner gave up on; it should end in `died`.
    """

    def __init__(
        self,
        network: Network,
        wiring: Wiring,
        has_memory: bool = False,
        on_kill: Callable[[str], None] = _nobody_kills,
        software: Software = Software(),
    ) -> None:
        self.network = network
        self.wiring = wiring
        self.has_memory = has_memory
        self.on_kill = on_kill
        self.software = software
        self._exports: dict[str, _Export] = {}  # by owner

    def died(self, worker: str) -> None:
        """`worker` ("worker:epoch") does nothing any more, neither as writer nor as owner."""
        for export in list(self._exports.values()):
            is_owner = f"{export.region.owner}:{export.region.epoch}" == worker
            for pipe in [*export.pipes]:
                if is_owner or pipe.writer == worker:
                    pipe.close(f"{worker} died")
            if is_owner:
                self.withdraw(export)

    def offer(self, export: _Export) -> None:
        """For FabricTransport, like the next two. A newer incarnation takes the older one's place."""
        self._exports[export.region.owner] = export

    def withdraw(self, export: _Export) -> None:
        if self._exports.get(export.region.owner) is export:
            del self._exports[export.region.owner]

    def find(self, offer: Offer) -> _Export:
        """Raises Refused or StaleEpoch."""
        export = self._exports.get(offer.address)
        if export is None:
            raise Refused(f"{offer.owner} offers no region any more")
        check(offer, export.offer)
        return export


class FabricTransport:
    """See `transport.api.Transport`."""

    name = NAME
    is_in_place = False
    memory = ""

    def __init__(self, hub: FabricHub) -> None:
        self._hub = hub

    @asynccontextmanager
    async def export(self, owner: str, epoch: int, layout: KvLayout, blocks: int) -> AsyncIterator[Exported]:
        """See `transport.api.Transport`."""
        buffer = memoryview(bytearray(blocks * layout.block_bytes)) if self._hub.has_memory else None
        export = _Export(Region(owner, epoch, layout, blocks, buffer), self._hub)
        self._hub.offer(export)
        try:
            yield export
        finally:
            for pipe in [*export.pipes]:
                pipe.close(f"{owner} is gone")
            self._hub.withdraw(export)

    def attach(self, offer: Offer, writer: str) -> AbstractAsyncContextManager[Attached]:
        """Always raises Refused: it is another device's memory."""
        raise Refused(f"{writer} cannot compute in the memory of {offer.owner}")

    @asynccontextmanager
    async def connect(self, offer: Offer, source: Region, writer: str) -> AsyncIterator[Pipe]:
        """See `transport.api.Transport`."""
        export = self._hub.find(offer)
        route = self._hub.wiring.route(source.owner, offer.owner)
        pipe = _Pipe(self._hub, route, source, export, writer)
        export.pipes[pipe] = None
        try:
            yield pipe
        finally:
            pipe.close("the transfer was left")


class _Export:
    """See `transport.api.Exported`."""

    def __init__(self, region: Region, hub: FabricHub) -> None:
        self.region = region
        self.offer = Offer(NAME, region.owner, region.epoch, region.owner, region.layout, region.blocks)
        self.pipes: dict[_Pipe, None] = {}
        self._hub = hub

    async def wait_gone(self, writer: str) -> None:
        for pipe in self._of(writer):
            await pipe.gone.wait()

    def kill(self, writer: str) -> None:
        if self._of(writer):
            self._hub.on_kill(writer)

    def _of(self, writer: str) -> list[_Pipe]:
        return [pipe for pipe in self.pipes if pipe.writer == writer]


class _Pipe:
    """See `transport.api.Pipe`."""

    def __init__(self, hub: FabricHub, route: Route, source: Region, export: _Export, writer: str) -> None:
        self.writer = writer
        self.gone = asyncio.Event()
        self._source = source
        self._export = export
        self._latency_s = route.latency_s + hub.software.start_s
        self._flow = hub.network.start(route.links, 0.0, _cap_bytes_per_s(hub.software, route, source.layout))
        self._block_bytes = source.layout.block_bytes
        self._under_way: deque[tuple[float, BlockId, BlockId]] = (
            deque()
        )  # (the flow's bytes when it is there, from, to)
        self._landing: asyncio.Task[None] | None = None

    def write(self, blocks: Sequence[tuple[BlockId, BlockId]]) -> None:
        if self.gone.is_set():
            return  # `flush` says so
        if self._export.region.buffer is not None:
            at = self._flow.written_bytes
            for number, pair in enumerate(blocks, start=1):
                self._under_way.append((at + number * self._block_bytes, *pair))
            self._landing = self._landing or asyncio.ensure_future(self._land())
        self._flow.write(len(blocks) * self._block_bytes)

    async def flush(self) -> None:
        sent = -1.0
        while True:
            try:
                async with asyncio.timeout(STALLED_S):
                    await self._flow.wait_done()
                    if self._landing is not None:
                        await asyncio.shield(self._landing)
                break
            except TimeoutError:
                before, sent = sent, self._flow.sent_bytes(asyncio.get_running_loop().time())
                if sent <= before:
                    owner = self._export.region.owner
                    raise ConnectionLost(f"no byte has reached {owner} for {STALLED_S:.0f} s") from None
        await asyncio.sleep(self._latency_s)

    def close(self, why: str) -> None:
        """Nothing is written from now on. Idempotent."""
        if self.gone.is_set():
            return
        self._flow.cancel(why)
        if self._landing is not None:
            self._landing.cancel()
        self._export.pipes.pop(self, None)
        self.gone.set()

    async def _land(self) -> None:
        """Puts each block into memory when its last byte is there; returns when nothing is under way."""
        source, target = self._source.buffer, self._export.region.buffer
        size = self._block_bytes
        while self._under_way and source is not None and target is not None:
            await self._flow.wait_sent(self._under_way[0][0])
            _, here, there = self._under_way.popleft()
            target[there * size : (there + 1) * size] = source[here * size : (here + 1) * size]
        self._landing = None


def _cap_bytes_per_s(software: Software, route: Route, layout: KvLayout) -> float:
    """What one pipe gets of links that nobody else is on: less where each block takes time of its own."""
    if software.block_s:
        block_s = software.block_s + layout.block_bytes / (route.bytes_per_s or LOCAL_BYTES_PER_S)
        return layout.block_bytes / block_s
    return math.inf if route.links else LOCAL_BYTES_PER_S
