"""The ways from this worker's KV to that of others: which is taken, and what becomes of a transfer when one fails.

Who reaches a region's memory attaches to it. For others the way is chosen that is expected to be quickest for what is
to be moved, as earlier transfers to that worker went. One that fails is left for a while, and the next one goes on from
the first block that is not in place:

    prefill worker                                   decode worker
        over A: block 0, 1, 2 x
        leaves A, connects over B
        --- Switch(A's transfer, B's) ---------------->   fences A's off
        <-- Switched ---------------------------------
        over B: block 2, 3, ...

So at any time one transfer alone may write, and the decode worker knows which one to fence off should it give up.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from penstock import clock
from penstock.blocks import BlockId, Region
from penstock.errors import ConnectionLost, PenstockError, Refused
from penstock.policy.latency.transfers import TransferFit
from penstock.transport.api import Attached, Exported, Limits, Moved, Offer, Pipe, Transport

log = logging.getLogger(__name__)

Pairs = Sequence[tuple[BlockId, BlockId]]
Agree = Callable[[str, str], Awaitable[None]]
"""(transfer, next transfer): has the owner fence the first off, and returns once the next may write."""


@dataclass(frozen=True, slots=True)
class PathOptions:
    """A way that failed is left alone for `cool_down_s`, and after each further failure twice as long as before."""

    cool_down_s: float = 2.0
    max_cool_down_s: float = 120.0


@dataclass(frozen=True, slots=True)
class _Failure:
    cool_down_s: float
    until_s: float


class Paths:
    """This worker's transports. Owns what was learned of the ways to each peer."""

    def __init__(self, transports: Sequence[Transport], options: PathOptions = PathOptions()) -> None:
        self._transports = {transport.name: transport for transport in transports}
        self._options = options
        self._fits: dict[tuple[str, str], TransferFit] = {}  # by owner and transport, as are failures
        self._failures: dict[tuple[str, str], _Failure] = {}

    @property
    def memory(self) -> str:
        """Where this worker is, for those that may attach; empty if nobody can."""
        return next((each.memory for each in self._transports.values() if each.limits.is_in_place), "")

    @asynccontextmanager
    async def export(self, region: Region) -> AsyncIterator[Shared]:
        """Offers this worker's region by every transport while inside the block."""
        async with AsyncExitStack() as stack:
            exports = {
                name: await stack.enter_async_context(transport.export(region))
                for name, transport in self._transports.items()
            }
            yield Shared(region, exports, {name: each.limits for name, each in self._transports.items()})

    def find_in_place(self, offers: Sequence[Offer]) -> Offer | None:
        """The one of a region that this worker can compute in."""
        for offer in offers:
            transport = self._transports.get(offer.transport)
            if transport is None or not transport.limits.is_in_place or offer.memory != transport.memory:
                continue
            if not self._is_cooling(offer):
                return offer
        return None

    @asynccontextmanager
    async def attach(self, offer: Offer, writer: str) -> AsyncIterator[Attached]:
        """See `transport.api.Transport`. After a failure the offer is not found in place for a while."""
        async with AsyncExitStack() as stack:
            try:
                attached = await stack.enter_async_context(self._transports[offer.transport].attach(offer, writer))
            except (ConnectionLost, Refused) as error:
                self.note_failure(offer, error)
                raise
            yield attached

    def expect_s(self, offers: Sequence[Offer], blocks: int) -> float:
        """How long the quickest way should take for so many blocks. Raises Refused if there is none."""
        return min(self._expect_s(offer, blocks) for offer in self._ways(offers, blocks))

    def connect(
        self,
        offers: Sequence[Offer],
        source: Region,
        writer: str,
        transfer: str,
        blocks: int,
        agree: Agree,
        on_moved: Callable[[], None],
    ) -> AbstractAsyncContextManager[Conduit]:
        """A pipe for about `blocks` blocks that survives the failure of a way; see `transport.api.Transport`.

        Raises Refused, StaleEpoch or ConnectionLost.
        """
        ways = self._ways(offers, blocks)
        return _following(Conduit(self, ways, source, writer, transfer, agree, on_moved))

    def pipe(
        self, offer: Offer, source: Region, writer: str, transfer: str, on_moved: Callable[[], None]
    ) -> AbstractAsyncContextManager[Pipe]:
        """Over this way. For Conduit, like the next two."""
        return self._transports[offer.transport].connect(offer, source, writer, transfer, on_moved)

    def note_failure(self, offer: Offer, error: PenstockError) -> None:
        key = (offer.owner, offer.transport)
        before = self._failures.get(key)
        cool_down_s = self._options.cool_down_s
        if before is not None:
            cool_down_s = min(2 * before.cool_down_s, self._options.max_cool_down_s)
        self._failures[key] = _Failure(cool_down_s, clock.now() + cool_down_s)
        log.warning("%s to %s failed, left alone for %.0f s: %s", offer.transport, offer.owner, cool_down_s, error)

    def note_success(self, offer: Offer, moved: Moved) -> None:
        self._failures.pop((offer.owner, offer.transport), None)
        if moved.size_bytes:
            self._fit(offer).observe(moved.size_bytes, moved.descriptors, moved.seconds)

    def _ways(self, offers: Sequence[Offer], blocks: int) -> list[Offer]:
        """Those that peers write over: the quickest first, and those that failed of late last."""
        ways = [offer for offer in offers if self._is_written(offer)]
        if not ways:
            theirs, mine = ", ".join(offer.transport for offer in offers), ", ".join(self._transports)
            raise Refused(f"no way leads to this region: it is offered over {theirs or 'nothing'}, here is {mine}")
        return sorted(ways, key=lambda offer: (self._is_cooling(offer), self._expect_s(offer, blocks)))

    def _is_written(self, offer: Offer) -> bool:
        transport = self._transports.get(offer.transport)
        return transport is not None and not transport.limits.is_in_place

    def _is_cooling(self, offer: Offer) -> bool:
        failure = self._failures.get((offer.owner, offer.transport))
        return failure is not None and failure.until_s > clock.now()

    def _expect_s(self, offer: Offer, blocks: int) -> float:
        return self._fit(offer).seconds(blocks * offer.layout.block_bytes, blocks)

    def _fit(self, offer: Offer) -> TransferFit:
        key = (offer.owner, offer.transport)
        if (fit := self._fits.get(key)) is None:
            fit = self._fits[key] = TransferFit(self._transports[offer.transport].limits.prior)
        return fit


class Shared:
    """This worker's region, as it is offered by all transports."""

    def __init__(self, region: Region, exports: dict[str, Exported], limits: dict[str, Limits]) -> None:
        self.region = region
        self.offers = tuple(exported.offer for exported in exports.values())
        self._exports = exports
        self._limits = limits

    async def fence(self, writer: str, transfer: str) -> None:
        """See `transport.api.Exported`."""
        for exported in self._exports.values():  # those that answer at once come out the same in any order
            await exported.fence(writer, transfer)

    async def fence_off(self, writer: str, transfer: str) -> None:
        """Of a transfer that its writer has left: what is still on its way does not arrive any more."""
        for name, exported in self._exports.items():
            if not self._limits[name].is_in_place:  # who computes in place stays attached
                await exported.fence(writer, transfer)

    def kill(self, writer: str) -> None:
        """See `transport.api.Exported`."""
        for exported in self._exports.values():
            exported.kill(writer)


class Conduit:
    """A pipe whose way may change; see `transport.api.Pipe`. `transfer` names what may write at present."""

    def __init__(
        self,
        paths: Paths,
        ways: Sequence[Offer],
        source: Region,
        writer: str,
        transfer: str,
        agree: Agree,
        on_moved: Callable[[], None],
    ) -> None:
        self._paths = paths
        self._ways = list(ways)  # that have not been tried, in order
        self._source = source
        self._writer = writer
        self._name = transfer
        self._agree = agree
        self._on_moved = on_moved
        self._tried = 0
        self._failures: list[str] = []
        self._writes: list[tuple[BlockId, BlockId]] = []  # all, in order
        self._reads: list[tuple[BlockId, BlockId]] = []  # that may not be in place
        self._before = Moved()  # over ways that were left
        self._known = Moved()  # over this one, when all was in place last
        self._way: Offer
        self._pipe: Pipe | None = None  # None while the way changes
        self._next: Pipe
        self._stack = AsyncExitStack()
        self._asked = asyncio.Event()
        self._at_rest = asyncio.Event()
        self._at_rest.set()
        self._error: PenstockError | None = None

    @property
    def transfer(self) -> str:
        return f"{self._name}#{self._tried}"

    @property
    def transport(self) -> str:
        """The way that was taken last."""
        return self._way.transport

    @property
    def moved(self) -> Moved:
        """Over all ways; blocks count from the first one asked for."""
        return _sum(self._before, self._pipe.moved) if self._pipe is not None else self._before

    @property
    def moved_blocks(self) -> int:
        """That part of `moved`."""
        return self._before.blocks + (self._pipe.moved.blocks if self._pipe is not None else 0)

    @property
    def is_at_rest(self) -> bool:
        """All is in place, or nothing more will be."""
        return self._at_rest.is_set()

    def write(self, blocks: Pairs) -> None:
        self._writes += blocks
        self._begin()
        if self._pipe is not None:
            self._pipe.write(blocks)

    def read(self, blocks: Pairs) -> None:
        self._reads += blocks
        self._begin()
        if self._pipe is not None:
            self._pipe.read(blocks)

    async def flush(self) -> None:
        await self._at_rest.wait()
        self.check()

    def check(self) -> None:
        """Raises ConnectionLost if no way is left."""
        if self._error is not None:
            raise self._error

    async def open(self) -> None:
        """Connects over the first way that works. Raises StaleEpoch or ConnectionLost."""
        await self._open_next()
        self._pipe = self._next

    async def follow(self) -> None:
        """Sees to it that what is asked for arrives, until cancelled or no way is left."""
        try:
            while True:
                await self._asked.wait()
                self._asked.clear()
                await self._move()
        except PenstockError as error:
            self._error = error
            self._rest()

    async def close(self) -> None:
        await self._stack.aclose()

    async def _open_next(self) -> None:
        while self._ways:
            self._way = self._ways.pop(0)
            self._tried += 1
            connecting = self._paths.pipe(self._way, self._source, self._writer, self.transfer, self._on_moved)
            try:
                self._next = await self._stack.enter_async_context(connecting)
            except (ConnectionLost, Refused) as error:
                self._note_failure(error)
            else:
                self._known = Moved()
                return
        raise ConnectionLost("no way is left to move KV: " + "; ".join(self._failures))

    async def _move(self) -> None:
        """Returns when what was asked for so far is in place, or is asked for again over another way."""
        assert self._pipe is not None
        try:
            await self._pipe.flush()
        except ConnectionLost as error:
            await self._change(error)
        else:
            if not self._asked.is_set():
                self._reads.clear()
                moved = self._pipe.moved
                self._paths.note_success(self._way, _difference(moved, self._known))
                self._known = moved
                self._rest()

    async def _change(self, error: ConnectionLost) -> None:
        left = self.transfer
        self._note_failure(error)
        self._before, self._pipe = self.moved, None
        await self._stack.aclose()
        await self._open_next()
        await self._agree(left, self.transfer)
        pipe = self._pipe = self._next
        pipe.write(self._writes[self._before.blocks :])  # with what was asked for meanwhile
        pipe.read(self._reads)
        self._asked.set()

    def _note_failure(self, error: PenstockError) -> None:
        self._failures.append(f"{self._way.transport}: {error}")
        self._paths.note_failure(self._way, error)

    def _begin(self) -> None:
        if self._error is None:
            self._at_rest.clear()
            self._asked.set()

    def _rest(self) -> None:
        self._at_rest.set()
        self._on_moved()


@asynccontextmanager
async def _following(conduit: Conduit) -> AsyncIterator[Conduit]:
    try:
        await conduit.open()
        following = asyncio.ensure_future(conduit.follow())
        try:
            yield conduit
        finally:
            following.cancel()
            await asyncio.wait([following])
    finally:
        await conduit.close()


def _sum(a: Moved, b: Moved) -> Moved:
    return Moved(a.blocks + b.blocks, a.size_bytes + b.size_bytes, a.seconds + b.seconds, a.descriptors + b.descriptors)


def _difference(a: Moved, b: Moved) -> Moved:
    return Moved(a.blocks - b.blocks, a.size_bytes - b.size_bytes, a.seconds - b.seconds, a.descriptors - b.descriptors)
