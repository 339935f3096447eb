"""KV that crosses a simulated network: the transport port over `network`, with the faults of real ones.

A transfer takes the links' bandwidth while it flows, and goes on when its sender freezes, as an RDMA write does. Where
regions have buffers, bytes land as they arrive, so that what is used too early or too late is wrong.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

from penstock import clock
from penstock.blocks import BlockId, KvLayout, Region
from penstock.errors import ConnectionLost, KvError, Refused
from penstock.policy.latency.transfers import TransferModel, over
from penstock.sim.network import Flow, Network
from penstock.sim.wiring import Route, Wiring
from penstock.transport.api import Attached, Exported, Limits, Moved, Offer, Pipe
from penstock.transport.offers import check

NAME = "fabric"
LOCAL_BYTES_PER_S = 1e12  # between workers on one device
LINK = over(start_s=1e-5, descriptor_s=1e-7, bytes_per_s=40e9)  # what a transfer is expected to take at first
HALF_A_BYTE = 0.5  # bytes that have arrived are no whole number, and may fall a little short of one
STALLED_S = 10.0  # without a byte more, after which a transfer is given up


@dataclass(frozen=True, slots=True)
class Software:
    """What programs add to what links take: to each transfer once, and for each block, one block after the other."""

    start_s: float = 0.0
    block_s: float = 0.0


def _nobody_kills(writer: str) -> None:
    raise KvError(f"{writer} is stuck with memory it may write, and this hub was not told how to kill it")


class FabricHub:
    """What all workers of a simulated cluster share that reach each other in one way: the network, who may write where.

    With `is_fenced` owners take what arrives themselves, as over TCP; else it is stored without them, as over RDMA.
    `on_kill` is called with the writer ("worker:epoch") that an owner gave up on; it should end in `died`.
    """

    def __init__(
        self,
        network: Network,
        wiring: Wiring,
        name: str = NAME,
        is_fenced: bool = False,
        prior: TransferModel = LINK,
        on_kill: Callable[[str], None] = _nobody_kills,
        software: Software = Software(),
    ) -> None:
        self.network = network
        self.wiring = wiring
        self.name = name
        self.is_fenced = is_fenced
        self.prior = prior
        self.on_kill = on_kill
        self.software = software
        self.is_broken = False
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

    def fail(self) -> None:
        """A driver that crashed, a switch that lost its rules: nothing gets through this way, until `mend`."""
        self.is_broken = True
        for export in list(self._exports.values()):
            for pipe in [*export.pipes]:
                pipe.close(f"{self.name} broke down")

    def mend(self) -> None:
        self.is_broken = False

    def offer(self, export: _Export) -> None:
        """For FabricTransport, like the next two. A newer incarnation takes the older one's place."""
        self._exports[export.region.owner] = export

    def withdraw(self, export: _Export) -> None:
        if self._exports.get(export.region.owner) is export:
            del self._exports[export.region.owner]

    def find(self, offer: Offer) -> _Export:
        """Raises Refused, StaleEpoch or ConnectionLost."""
        if self.is_broken:
            raise ConnectionLost(f"{offer.owner} cannot be reached: {self.name} broke down")
        export = self._exports.get(offer.address)
        if export is None:
            raise Refused(f"{offer.owner} offers no region any more")
        check(offer, export.offer)
        return export


class FabricTransport:
    """See `transport.api.Transport`."""

    memory = ""

    def __init__(self, hub: FabricHub) -> None:
        self.name = hub.name
        self.limits = Limits(is_fenced=hub.is_fenced, prior=hub.prior)
        self._hub = hub

    @asynccontextmanager
    async def export(self, region: Region) -> AsyncIterator[Exported]:
        """See `transport.api.Transport`."""
        export = _Export(region, self._hub)
        self._hub.offer(export)
        try:
            yield export
        finally:
            for pipe in [*export.pipes]:
                pipe.close(f"{region.owner} is gone")
            self._hub.withdraw(export)

    def attach(self, offer: Offer, writer: str) -> AbstractAsyncContextManager[Attached]:
        """Always raises Refused: it is another device's memory."""
        raise Refused(f"{writer} cannot compute in the memory of {offer.owner}")

    @asynccontextmanager
    async def connect(
        self, offer: Offer, source: Region, writer: str, request: str, on_moved: Callable[[], None]
    ) -> AsyncIterator[Pipe]:
        """See `transport.api.Transport`."""
        export = self._hub.find(offer)
        pipe = _Pipe(self._hub, source, export, writer, request, on_moved)
        export.pipes[pipe] = None
        try:
            yield pipe
        finally:
            pipe.close("the transfer was left")


class _Export:
    """See `transport.api.Exported`."""

    def __init__(self, region: Region, hub: FabricHub) -> None:
        self.region = region
        self.offer = Offer(hub.name, *region.key, region.owner, region.layout, region.blocks)
        self.pipes: dict[_Pipe, None] = {}
        self._hub = hub

    async def fence(self, writer: str, request: str) -> None:
        for pipe in self._of(writer):
            if self._hub.is_fenced and pipe.request == request:
                pipe.close(f"{self.region.owner} took its memory back")
            elif not self._hub.is_fenced:
                await pipe.gone.wait()

    def kill(self, writer: str) -> None:
        if self._of(writer):
            self._hub.on_kill(writer)

    def _of(self, writer: str) -> list[_Pipe]:
        return [pipe for pipe in self.pipes if pipe.writer == writer]


class _Pipe:
    """See `transport.api.Pipe`."""

    def __init__(
        self, hub: FabricHub, source: Region, export: _Export, writer: str, request: str, on_moved: Callable[[], None]
    ) -> None:
        self.writer = writer
        self.request = request
        self.gone = asyncio.Event()
        self._hub = hub
        self._source = source
        self._export = export
        self._on_moved = on_moved
        self._why = ""  # it was closed
        self._latency_s = 0.0
        self._block_bytes = source.layout.block_bytes
        self._ways: dict[bool, _Way] = {}  # to the owner, and from there
        self._busy_s = 0.0
        self._began_s: float | None = None  # when there was something to move, after there was nothing

    @property
    def moved(self) -> Moved:
        landed = {is_write: way.landed_blocks for is_write, way in self._ways.items()}
        blocks = sum(landed.values())
        return Moved(landed.get(True, 0), blocks * self._block_bytes, self._busy_s, blocks)

    def write(self, blocks: Sequence[tuple[BlockId, BlockId]]) -> None:
        self._move(True, list(blocks))

    def read(self, blocks: Sequence[tuple[BlockId, BlockId]]) -> None:
        self._move(False, [(there, here) for here, there in blocks])

    async def flush(self) -> None:
        for way in self._ways.values():
            await way.wait_landed(self._export.region.owner)
        if self._why:
            raise ConnectionLost(self._why)
        await asyncio.sleep(self._latency_s)

    def close(self, why: str) -> None:
        """Nothing is moved from now on. Idempotent."""
        if self._why:
            return
        self._why = why
        for way in self._ways.values():
            way.close(why)
        self._export.pipes.pop(self, None)
        self.gone.set()

    def _move(self, is_write: bool, blocks: list[tuple[BlockId, BlockId]]) -> None:
        if self._why or not blocks:
            return  # `flush` says so
        if self._began_s is None:
            self._began_s = clock.now()
        way = self._ways.get(is_write) or self._open(is_write)
        way.add(blocks)

    def _open(self, is_write: bool) -> _Way:
        hub, here, there = self._hub, self._source, self._export.region
        ends = (here, there) if is_write else (there, here)
        route = hub.wiring.route(ends[0].owner, ends[1].owner)
        self._latency_s = route.latency_s + hub.software.start_s
        flow = hub.network.start(route.links, 0.0, _cap_bytes_per_s(hub.software, route, here.layout))
        way = self._ways[is_write] = _Way(flow, *ends, self._on_landed)
        return way

    def _on_landed(self) -> None:
        if self._began_s is not None and all(way.is_idle for way in self._ways.values()):
            self._busy_s, self._began_s = self._busy_s + clock.now() - self._began_s, None
        self._on_moved()


class _Way:
    """One direction of a pipe. `on_landed` is called for each piece of what is added: where bytes land, a block."""

    def __init__(self, flow: Flow, source: Region, target: Region, on_landed: Callable[[], None]) -> None:
        self._flow = flow
        self._source = source
        self._target = target
        self._on_landed = on_landed
        self._pieces: deque[list[tuple[BlockId, BlockId]]] = deque()  # under way
        self._landed = asyncio.Event()  # nothing is under way
        self._landed.set()
        self._block_bytes = source.layout.block_bytes
        self._stored_blocks = 0
        self._due_bytes = 0  # with the piece that lands next

    @property
    def landed_blocks(self) -> int:
        if self._target.buffer is not None:
            return self._stored_blocks
        return int(self._flow.sent_bytes(clock.now()) + HALF_A_BYTE) // self._block_bytes

    @property
    def is_idle(self) -> bool:
        return not self._pieces

    def add(self, blocks: list[tuple[BlockId, BlockId]]) -> None:
        lands = self._target.buffer is not None
        self._pieces.extend([[pair] for pair in blocks] if lands else [blocks])
        self._flow.write(len(blocks) * self._block_bytes)
        if self._landed.is_set():
            self._landed.clear()
            self._expect_next()

    async def wait_landed(self, owner: str) -> None:
        """Returns when nothing is under way, or none will arrive. Raises ConnectionLost if for long no byte moves."""
        sent = -1.0
        while not self._landed.is_set():
            try:
                async with asyncio.timeout(STALLED_S):
                    await self._landed.wait()
            except TimeoutError:
                before, sent = sent, self._flow.sent_bytes(asyncio.get_running_loop().time())
                if sent <= before:
                    raise ConnectionLost(f"no byte of {owner}'s has moved for {STALLED_S:.0f} s") from None

    def close(self, why: str) -> None:
        self._flow.cancel(why)

    def _expect_next(self) -> None:
        self._due_bytes += len(self._pieces[0]) * self._block_bytes
        self._flow.sent(self._due_bytes).add_done_callback(self._land)

    def _land(self, sent: asyncio.Future[None]) -> None:
        """The next piece has arrived, or never will: who closed the pipe knows why."""
        if sent.exception() is not None:
            self._landed.set()
            return
        self._store(self._pieces.popleft())
        self._on_landed()
        if self._pieces:
            self._expect_next()
        else:
            self._landed.set()

    def _store(self, blocks: list[tuple[BlockId, BlockId]]) -> None:
        source, target, size = self._source.buffer, self._target.buffer, self._block_bytes
        if source is None or target is None:
            return
        for here, there in blocks:
            target[there * size : (there + 1) * size] = source[here * size : (here + 1) * size]
            self._stored_blocks += 1


def _cap_bytes_per_s(software: Software, route: Route, layout: KvLayout) -> float:
    """What one pipe gets of links that nobody else is on: less where each block takes time of its own."""
    if software.block_s:
        block_s = software.block_s + layout.block_bytes / (route.bytes_per_s or LOCAL_BYTES_PER_S)
        return layout.block_bytes / block_s
    return math.inf if route.links else LOCAL_BYTES_PER_S
