"""KV over NIXL: UCX between the hosts' memory, by RDMA where there is such a network, by CMA or TCP where there is not.

What NIXL does not do for us goes over a TCP connection for each pipe: proof of the token, the owner's metadata, and the
news of how a writer ended. See `nixl_owner` and `nixl_writer` for the two sides, and `nixl_options` for limits.

    writer                                    owner
        --- handshake of `auth`, Hello ----------->   remembers the writer
        <-- Welcome (metadata, address) -----------
        === WRITE and READ, one-sided ============>   its region; nobody there is asked
        --- LEFT, or LOST ------------------------>   forgets it

The owner cannot stop a store in mid-air, so this is not fenced: memory waits for the writer's word or for its end. What
it can do is close the agent by which its region is reached: UCX then stores nothing more that comes by TCP, and network
cards refuse what comes by RDMA. It does so for each writer that ended without a good word, and when told to kill one of
another host. A process of this host copies by itself (CMA), so there only its death is proof, and killing means that.

Of the agents' own connections none is authenticated: whoever reaches the ports that UCX opens, on every network device
of the host, may write to this process. Use it in networks that you trust, and say with UCX_NET_DEVICES which those are.

Tried over CMA and TCP. Not tried, for want of them: RDMA networks. Memory of GPUs is not offered: a `Region` is memory
of the host.
"""

from __future__ import annotations

import ctypes
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Self

import msgspec

from penstock.blocks import BlockId, Region
from penstock.errors import KvError, Refused
from penstock.policy.latency.transfers import over
from penstock.transport.api import Attached, Exported, Limits, Moved, Offer
from penstock.transport.io_thread import IoThread, on_loop
from penstock.transport.nixl_options import Options
from penstock.transport.nixl_owner import Hello, Owner, this_process
from penstock.transport.nixl_writer import Mover, Transfer
from penstock.transport.sockets import check_host

__all__ = ["NAME", "NixlPipe", "NixlTransport", "Options"]

NAME = "nixl"


class NixlTransport:
    """See `transport.api.Transport`. Used inside its own block: its thread and agents end with that.

    `token` is asked of peers, and shown to owners.
    """

    name = NAME
    limits = Limits(prior=over(start_s=5e-5, descriptor_s=2e-6, bytes_per_s=6e9))
    memory = ""

    def __init__(self, token: str, options: Options = Options()) -> None:
        self._token = token
        self._options = options
        self._io = IoThread("penstock-kv-nixl")
        self._mover = Mover(options)

    async def __aenter__(self) -> Self:
        """Raises MissingExtra where NIXL is not installed."""
        await self._io.__aenter__()
        try:
            await self._io.run_out(self._mover.open())
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._io.run_out(self._mover.close())
        await self._io.__aexit__()

    @asynccontextmanager
    async def export(self, region: Region) -> AsyncIterator[Exported]:
        """See `transport.api.Transport`. Raises SetupError for want of an address to listen at."""
        check_host(self._options.host, self._token)
        if region.buffer is None:
            raise Refused(f"the blocks of {region.owner} are not in host memory, so {NAME} cannot offer them")
        offer = Offer(NAME, *region.key, "", region.layout, region.blocks)
        owner = Owner(offer, _address_of(region.buffer), len(region.buffer), self._token, self._options)
        try:
            offer = msgspec.structs.replace(offer, address=await self._io.run(owner.open()))
            yield _Export(region, offer, self._io, owner)
        finally:
            await self._io.run_out(owner.close())

    def attach(self, offer: Offer, writer: str) -> AbstractAsyncContextManager[Attached]:
        """Always raises Refused: who writes over NIXL does not compute there."""
        raise Refused(f"{writer} cannot compute in the memory of {offer.owner} over {NAME}: connect, and write into it")

    @asynccontextmanager
    async def connect(
        self, offer: Offer, source: Region, writer: str, request: str, on_moved: Callable[[], None]
    ) -> AsyncIterator[NixlPipe]:
        """See `transport.api.Transport`."""
        if source.buffer is None:
            raise Refused(f"the blocks of {source.owner} are not in host memory, so {NAME} cannot move them")
        transfer = Transfer(self._mover, offer, _address_of(source.buffer), source.blocks, on_loop(on_moved))
        try:
            await self._io.run(transfer.open(Hello(offer, writer, request, this_process()), self._token))
            if source.layout != offer.layout:
                raise Refused(f"{offer.owner} keeps KV as {offer.layout}, {source.owner} as {source.layout}")
            yield NixlPipe(self._io, transfer, source.blocks, offer)
        finally:
            await self._io.run_out(transfer.leave())


class _Export:
    """See `transport.api.Exported`."""

    def __init__(self, region: Region, offer: Offer, io: IoThread, owner: Owner) -> None:
        self.region = region
        self.offer = offer
        self._io = io
        self._owner = owner

    async def fence(self, writer: str, request: str) -> None:
        """Returns once each pipe is gone that `writer` has for `request` now."""
        await self._io.run(self._owner.wait_gone(writer, request))

    def kill(self, writer: str) -> None:
        """Ends its process on this host; from another one all writers lose their pipes, and may come back."""
        self._io.call(self._owner.kill, writer)


class NixlPipe:
    """See `transport.api.Pipe`."""

    def __init__(self, io: IoThread, transfer: Transfer, blocks: int, offer: Offer) -> None:
        self._io = io
        self._transfer = transfer
        self._blocks = blocks
        self._offer = offer

    @property
    def moved(self) -> Moved:
        """So far."""
        return self._transfer.moved

    def write(self, blocks: Sequence[tuple[BlockId, BlockId]]) -> None:
        """See `transport.api.Pipe`. Raises KvError for blocks that do not exist."""
        self._io.call(self._transfer.move, self._checked(blocks), is_read=False)

    def read(self, blocks: Sequence[tuple[BlockId, BlockId]]) -> None:
        """See `transport.api.Pipe`. Raises KvError for blocks that do not exist."""
        self._io.call(self._transfer.move, self._checked(blocks), is_read=True)

    async def flush(self) -> None:
        """See `transport.api.Pipe`."""
        await self._io.run(self._transfer.flush())

    def _checked(self, blocks: Sequence[tuple[BlockId, BlockId]]) -> tuple[tuple[BlockId, BlockId], ...]:
        for here, there in blocks:
            if not (0 <= here < self._blocks and 0 <= there < self._offer.blocks):
                raise KvError(
                    f"there is no block {here} of {self._blocks} here, or no block {there} of the {self._offer.blocks} "
                    f"of {self._offer.owner}"
                )
        return tuple(blocks)


def _address_of(buffer: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


TRANSPORT = NixlTransport
