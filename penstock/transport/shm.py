"""Regions in shared memory: any processes of one user on one host, nothing copied.

A region is a memory file without a name (memfd). Its descriptor goes to each peer over an abstract Unix socket, so
neither leaves anything behind, however a process ends.

    peer                                     owner
        --- handshake of `auth` ------------
        --- _Ask -------------------------->
        <-- None and the descriptor, or why not    with that the peer is a writer
    maps it, computes, unmaps it
        --- UNMAPPED ---------------------->       the proof that it writes no more

The end of the connection is no such proof, since a process can close its socket and keep the mapping. The only other
one is the death of the process, told by a pidfd that belongs to the connection: a process id used again fools nobody.
Forked children do not inherit the mapping; they would be writers that nobody knows.
"""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from penstock import auth, clock
from penstock.blocks import Region
from penstock.errors import (
    ConnectionLost,
    KvError,
    PenstockError,
    Refused,
    WireForm,
    from_wire,
    to_wire,
)
from penstock.transport import host_memory
from penstock.transport.api import Attached, Exported, Limits, Offer, Pipe
from penstock.transport.offers import check

NAME = "shm"
ATTACH_S = 5.0  # how long an owner may take to hand its region over, and a peer to ask for it
LISTEN_BACKLOG = 128

_PURPOSE = b"kv"
_UNMAPPED = b"unmapped"
_PACKET_BYTES = 1 << 16
_SO_PEERPIDFD = 77  # since Linux 6.5; Python 3.11 does not name it


@dataclass(frozen=True, slots=True)
class Options:
    """There is nothing to set."""


class _Ask(msgspec.Struct, frozen=True):
    """Hand me the region of this offer; I am `writer`."""

    offer: Offer
    writer: str


_encode = msgspec.msgpack.Encoder().encode
_decode_ask = msgspec.msgpack.Decoder(_Ask).decode
_decode_reply = msgspec.msgpack.Decoder(WireForm | None).decode  # None: here it is


class ShmTransport:
    """See `transport.api.Transport`. `token` is asked of peers, and shown to owners."""

    name = NAME
    limits = Limits(is_in_place=True)

    def __init__(self, token: str, options: Options = Options()) -> None:
        self._token = token

    @property
    def memory(self) -> str:
        """Names the kernel, the user, and the namespaces that sockets, process ids and users are seen in."""
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespaces = (str(Path(f"/proc/self/ns/{kind}").readlink()) for kind in ("net", "pid", "user"))
        return "/".join((NAME, boot_id, *namespaces, str(os.geteuid())))

    @asynccontextmanager
    async def export(self, region: Region) -> AsyncIterator[Exported]:
        """See `transport.api.Transport`."""
        if region.descriptor is None:
            raise Refused(f"the blocks of {region.owner} are not in a memory file, so {NAME} cannot share them")
        address = f"@penstock-kv-{clock.nonce(8).hex()}"
        offer = Offer(NAME, *region.key, address, region.layout, region.blocks, self.memory)
        with _packet_socket() as listener:
            listener.bind(_socket_address(offer))
            listener.listen(LISTEN_BACKLOG)
            export = _Export(region, offer, region.descriptor)
            async with auth.admitting(listener, self._token, _PURPOSE, export.serve):
                yield export

    def connect(
        self, offer: Offer, source: Region, writer: str, request: str, on_moved: Callable[[], None]
    ) -> AbstractAsyncContextManager[Pipe]:
        """Always raises Refused: who reaches this memory computes in it."""
        raise Refused(f"{NAME} memory is not written from afar: {writer} must attach to the region of {offer.owner}")

    @asynccontextmanager
    async def attach(self, offer: Offer, writer: str) -> AsyncIterator[Attached]:
        """See `transport.api.Transport`. Raises KvError at the end if the region's buffer is still in use."""
        with _packet_socket() as sock:
            await self._join(sock, offer)
            memory: mmap.mmap | None = None
            try:
                memory = await _obtain(sock, _Ask(offer, writer))
                with memoryview(memory) as buffer:
                    yield _Attachment(Region(offer.owner, offer.epoch, offer.layout, offer.blocks, buffer), sock)
            finally:
                if memory is not None:
                    host_memory.unmap(memory, offer.owner)  # if it raises, the owner must go on counting us as a writer
                _say_unmapped(sock)

    async def _join(self, sock: socket.socket, offer: Offer) -> None:
        """Connects to the owner, up to the end of the handshake. Raises Refused or ConnectionLost."""
        async with _answering(offer.owner):
            await asyncio.get_running_loop().sock_connect(sock, _socket_address(offer))
            await auth.join(sock, self._token, _PURPOSE, offer.owner)


@dataclass(frozen=True, slots=True, eq=False)
class _Writer:
    """A process that may write. `gone` is set by proof alone."""

    name: str
    pidfd: int
    gone: asyncio.Event = field(default_factory=asyncio.Event)


class _Export:
    """See `transport.api.Exported`."""

    def __init__(self, region: Region, offer: Offer, descriptor: int) -> None:
        self.region = region
        self.offer = offer
        self._descriptor = descriptor
        self._writers: list[_Writer] = []

    async def fence(self, writer: str, request: str) -> None:
        for each in self._of(writer):
            await each.gone.wait()

    def kill(self, writer: str) -> None:
        for each in self._of(writer):
            try:
                signal.pidfd_send_signal(each.pidfd, signal.SIGKILL)
            except ProcessLookupError:
                pass  # it died by itself; the loop is about to tell

    async def serve(self, sock: socket.socket) -> None:
        """Hands the region to a peer that knows the token, and returns when that peer cannot write any more."""
        # The pidfd comes before the peer's next message: whoever sent that was alive when the pidfd was opened.
        with _watched(sock) as pidfd:
            async with asyncio.timeout(ATTACH_S):
                packet = await asyncio.get_running_loop().sock_recv(sock, _PACKET_BYTES)
            if packet in (b"", _UNMAPPED):  # it gave up before it asked
                return
            ask = _decode_ask(packet)
            try:
                check(ask.offer, self.offer)
            except PenstockError as error:
                socket.send_fds(sock, [_encode(to_wire(error))], [])
                return
            socket.send_fds(sock, [_encode(None)], [self._descriptor])
            writer = _Writer(ask.writer, pidfd)
            self._writers.append(writer)
            await _wait_proof(sock, pidfd)
            self._writers.remove(writer)
            writer.gone.set()

    def _of(self, writer: str) -> list[_Writer]:
        return [each for each in self._writers if each.name == writer]


class _Attachment:
    """See `transport.api.Attached`. Good inside the block that made it."""

    def __init__(self, region: Region, sock: socket.socket) -> None:
        self.region = region
        self._sock = sock

    @property
    def is_owner_gone(self) -> bool:
        try:
            return not self._sock.recv(1, socket.MSG_PEEK)  # the owner says nothing more; only its end can be read
        except BlockingIOError:
            return False
        except ConnectionResetError:
            return True


@asynccontextmanager
async def _answering(owner: str) -> AsyncIterator[None]:
    """Bounds a conversation with an owner, and tells its failures as what they mean: Refused or ConnectionLost."""
    try:
        async with asyncio.timeout(ATTACH_S):
            yield
    except TimeoutError:
        raise ConnectionLost(f"{owner} gave no answer within {ATTACH_S:g} s when asked for its region") from None
    except ConnectionRefusedError:
        raise Refused(f"{owner} does not offer this region any more, or not on this host") from None
    except OSError as error:
        raise ConnectionLost(f"lost {owner} when asked for its region: {error}") from error


async def _obtain(sock: socket.socket, ask: _Ask) -> mmap.mmap:
    """The region asked for, mapped. Raises what the owner answered, ConnectionLost, or KvError if it cannot be."""
    owner, size_bytes = ask.offer.owner, ask.offer.blocks * ask.offer.layout.block_bytes
    async with _answering(owner):
        await asyncio.get_running_loop().sock_sendall(sock, _encode(ask))
        await auth.wait_readable(sock)
        packet, descriptors, _, _ = socket.recv_fds(sock, _PACKET_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
    if not packet:
        raise ConnectionLost(f"{owner} left when asked for its region")
    if (refusal := _decode_reply(packet)) is not None:
        raise from_wire(refusal)
    with host_memory.closing(descriptors[0]) as descriptor:
        if (found_bytes := os.fstat(descriptor).st_size) != size_bytes:
            raise KvError(f"the region of {owner} has {found_bytes} bytes, its offer says {size_bytes}")
        try:
            return await host_memory.mapped(descriptor)
        except OSError as error:
            raise KvError(f"cannot map the region of {owner}, {size_bytes} bytes: {error}") from error


def _say_unmapped(sock: socket.socket) -> None:
    try:
        sock.send(_UNMAPPED)
    except (BrokenPipeError, ConnectionResetError):
        pass  # the owner is gone, and with it the need to know


async def _wait_proof(sock: socket.socket, pidfd: int) -> None:
    """Returns when the peer has said that it unmapped, or is dead. Not when it merely closes."""
    loop = asyncio.get_running_loop()
    proven = asyncio.Event()

    def on_readable() -> None:
        # Reads all there is: uvloop tells of a socket with an error just once.
        while not proven.is_set():
            try:
                packet = sock.recv(_PACKET_BYTES)
            except ConnectionResetError:
                continue  # it closed before it read our answer, which is told once; what it said last comes next
            except BlockingIOError:
                return
            if packet == _UNMAPPED:
                proven.set()
            elif not packet:
                loop.remove_reader(sock)
                return

    loop.add_reader(pidfd, proven.set)
    loop.add_reader(sock, on_readable)
    try:
        await proven.wait()
    finally:
        loop.remove_reader(sock)
        loop.remove_reader(pidfd)


def _watched(sock: socket.socket) -> AbstractContextManager[int]:
    """A pidfd of the process that made the connection. Raises Refused for one whose death could not be proven."""
    pid, uid = auth.process_of(sock)
    if pid == 0:
        raise Refused("a process of another PID namespace wants to map KV; its death could not be seen here")
    if uid != os.geteuid():
        raise Refused(f"process {pid} of user {uid} wants to map KV of user {os.geteuid()}")
    try:
        return host_memory.closing(sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD))
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise
    return host_memory.closing(os.pidfd_open(pid))


def _packet_socket() -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.setblocking(False)
    return sock


def _socket_address(offer: Offer) -> str:
    return "\0" + offer.address.removeprefix("@")


TRANSPORT = ShmTransport
