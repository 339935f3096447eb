"""KV over TCP: regions in host memory that workers anywhere write into and read from, over connections that are kept.

The bytes go from one region to the kernel, and from the other side's kernel to where they belong in its region: nothing
is copied in between. That happens on a thread of its own on either side, so the workers' loops keep turning.
See `tcp_frames` for what is said, `tcp_link` and `tcp_owner` for the two sides, and `tcp_options` for limits.

    writer                                               owner
    Pipe.write --> Session --> frames --> lanes ======> lanes --> region
    Pipe.read                             lanes <====== lanes <-- region
    Pipe.flush <-- all placed <----------- replies ----- a frame is in place

Who may write is decided where the bytes arrive. An owner that fences a transfer off, or revokes a writer, closes their
sessions, and nothing of them is received any more, though the writer be frozen with bytes on their way: no process must
die for it. Nor is anything sent any more of what they asked for, so blocks that were read may be used again as well.

Both sides prove that they know the token. What follows is not encrypted: TLS in Python takes every byte through a
buffer of its own, and neither gathers nor scatters. For untrusted networks put a tunnel below, such as WireGuard.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import Self

import msgspec

from penstock.blocks import BlockId, Region
from penstock.errors import KvError, Refused
from penstock.policy.latency.transfers import over
from penstock.transport.api import Attached, Exported, Limits, Moved, Offer
from penstock.transport.io_thread import IoThread, on_loop
from penstock.transport.sockets import check_host
from penstock.transport.tcp_link import Peer
from penstock.transport.tcp_options import Options
from penstock.transport.tcp_owner import Receiver
from penstock.transport.tcp_session import Session

__all__ = ["NAME", "Options", "TcpPipe", "TcpTransport"]

NAME = "tcp"


class TcpTransport:
    """See `transport.api.Transport`. Used inside its own block: its thread and connections end with that.

    `token` is asked of peers, and shown to owners.
    """

    name = NAME
    limits = Limits(is_fenced=True, prior=over(start_s=2e-4, descriptor_s=1e-6, bytes_per_s=3e9))
    memory = ""

    def __init__(self, token: str, options: Options = Options()) -> None:
        self._token = token
        self._options = options
        self._io = IoThread("penstock-kv-tcp")
        self._peers: dict[tuple[str, int, str, str], Peer] = {}

    async def __aenter__(self) -> Self:
        await self._io.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        for peer in self._peers.values():
            self._io.call(peer.close)
        self._peers.clear()
        await self._io.__aexit__()

    @asynccontextmanager
    async def export(self, region: Region) -> AsyncIterator[Exported]:
        """See `transport.api.Transport`. Raises SetupError for want of an address to listen at."""
        check_host(self._options.host, self._token)
        if region.buffer is None:
            raise Refused(f"the blocks of {region.owner} are not in host memory, so {NAME} cannot offer them")
        offer = Offer(NAME, *region.key, "", region.layout, region.blocks)
        receiver = Receiver(offer, region.buffer, self._token, self._options)
        try:
            offer = msgspec.structs.replace(offer, address=await self._io.run(receiver.open()))
            yield _Export(region, offer, self._io, receiver)
        finally:
            await self._io.run_out(receiver.close())

    def attach(self, offer: Offer, writer: str) -> AbstractAsyncContextManager[Attached]:
        """Always raises Refused: it is another host's memory."""
        raise Refused(f"{writer} cannot compute in the memory of {offer.owner} over {NAME}: connect, and write into it")

    @asynccontextmanager
    async def connect(
        self, offer: Offer, source: Region, writer: str, request: str, on_moved: Callable[[], None]
    ) -> AsyncIterator[TcpPipe]:
        """See `transport.api.Transport`."""
        if source.buffer is None:
            raise Refused(f"the blocks of {source.owner} are not in host memory, so {NAME} cannot move them")
        with self._using(offer, writer) as peer:
            session = Session(peer, source.buffer, request, on_loop(on_moved))
            try:
                await self._io.run(session.open())
                if source.layout != offer.layout:
                    raise Refused(f"{offer.owner} keeps KV as {offer.layout}, {source.owner} as {source.layout}")
                yield TcpPipe(self._io, session, source.blocks, offer)
            finally:
                await self._io.run_out(session.leave())

    @contextmanager
    def _using(self, offer: Offer, writer: str) -> Iterator[Peer]:
        for key in [key for key, peer in self._peers.items() if peer.is_idle]:
            del self._peers[key]
        key = (*offer.key, offer.address, writer)
        peer = self._peers.get(key)
        if peer is None:
            peer = self._peers[key] = Peer(offer, writer, self._token, self._options)
        peer.users += 1
        try:
            yield peer
        finally:
            peer.users -= 1


class _Export:
    """See `transport.api.Exported`."""

    def __init__(self, region: Region, offer: Offer, io: IoThread, receiver: Receiver) -> None:
        self.region = region
        self.offer = offer
        self._io = io
        self._receiver = receiver

    async def fence(self, writer: str, request: str) -> None:
        """See `transport.api.Exported`."""
        await self._io.run(self._receiver.fence(writer, request))

    def kill(self, writer: str) -> None:
        """Closes every pipe of `writer`, whatever that is doing."""
        self._io.call(self._receiver.revoke, writer)


class TcpPipe:
    """See `transport.api.Pipe`."""

    def __init__(self, io: IoThread, session: Session, blocks: int, offer: Offer) -> None:
        self._io = io
        self._session = session
        self._blocks = blocks
        self._offer = offer

    @property
    def moved(self) -> Moved:
        """So far."""
        return self._session.moved

    def write(self, blocks: Sequence[tuple[BlockId, BlockId]]) -> None:
        """See `transport.api.Pipe`."""
        self._io.call(self._session.move, self._checked(blocks), is_read=False)

    def read(self, blocks: Sequence[tuple[BlockId, BlockId]]) -> None:
        """See `transport.api.Pipe`."""
        self._io.call(self._session.move, self._checked(blocks), is_read=True)

    async def flush(self) -> None:
        """See `transport.api.Pipe`."""
        await self._io.run(self._session.flush())

    def _checked(self, blocks: Sequence[tuple[BlockId, BlockId]]) -> tuple[tuple[BlockId, BlockId], ...]:
        """Raises KvError for blocks that do not exist."""
        pairs = tuple(blocks)
        for here, there in pairs:
            if not (0 <= here < self._blocks and 0 <= there < self._offer.blocks):
                raise KvError(
                    f"block {here} of {self._blocks} cannot be moved to or from block {there} of the "
                    f"{self._offer.blocks} of {self._offer.owner}"
                )
        return pairs


TRANSPORT = TcpTransport
