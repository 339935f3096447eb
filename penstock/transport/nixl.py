"""KV over NIXL: UCX between the hosts' memory, by RDMA where there is such a network, by CMA or TCP where there is not.

One agent for each process, on a thread of its own. What NIXL does not do for us goes over a TCP connection for each
pipe: proof of the token, the owner's metadata, and the news that a writer has left.

    writer                                    owner
        --- handshake of `auth`, Hello ----------->   remembers the writer
        <-- Welcome (metadata, address) -----------
        === WRITE and READ, one-sided ============>   its region; nobody there is asked
        --- LEFT --------------------------------->   forgets it

The owner cannot stop such a store, so this transport is not fenced: memory waits for the writer's LEFT or for the end
of its process, which closes the connection. Silence is no proof. A writer that is stuck is killed if it is on this
host; elsewhere the owner registers its memory anew, which makes the keys void that the network card checks. (CMA and
TCP check none; and that path was never run on RDMA.) Memory of GPUs is not offered yet.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Self

import msgspec

from penstock import auth, clock
from penstock.blocks import BlockId, Region
from penstock.errors import ConnectionLost, KvError, MissingExtra, PenstockError, Refused, WireForm, from_wire, to_wire
from penstock.policy.latency.transfers import over
from penstock.transport.api import Attached, Exported, Limits, Moved, Offer
from penstock.transport.io_thread import IoThread, on_loop
from penstock.transport.offers import check
from penstock.transport.sockets import check_host, dial, listening, read_message, send_message
from penstock.transport.tcp_backlog import Backlog, Run

log = logging.getLogger(__name__)

NAME = "nixl"
CHUNK_BYTES = 8 << 20  # of one operation: the interpreter waits while the kernel copies it
MAX_RUNS = 1024
UNDER_WAY = 2  # operations of one pipe, so that the next one is there when the first is done

_PURPOSE = b"kv-nixl"
_LEFT = b"left"


@dataclass(frozen=True, slots=True)
class Options:
    """`host` is where peers reach this worker; `port` 0 takes a free one. `backends` are NIXL's plugins.

    A connection is made within `dial_s`, and a transfer given up that is not done after `stalled_s` with no other one
    of it either. While something is under way it is looked at every `poll_s`; an owner looks after what arrives every
    `progress_s`, which transports without RDMA need.
    """

    host: str = "127.0.0.1"
    port: int = 0
    backends: tuple[str, ...] = ("UCX",)
    dial_s: float = 5.0
    stalled_s: float = 10.0
    poll_s: float = 20e-6
    progress_s: float = 1e-3


class Hello(msgspec.Struct, frozen=True):
    """I am `writer`, process `pid` of `host`, and move blocks of this region for `request`."""

    offer: Offer
    writer: str
    request: str
    host: str
    pid: int


class Welcome(msgspec.Struct, frozen=True):
    """How the region is reached: NIXL's metadata, and where it begins."""

    metadata: bytes
    address: int


_encode = msgspec.msgpack.Encoder().encode
_decode_hello = msgspec.msgpack.Decoder(Hello).decode
_decode_answer = msgspec.msgpack.Decoder(tuple[WireForm | None, Welcome | None]).decode


class NixlTransport:
    """See `transport.api.Transport`. Used inside its own block: the agent and its thread end with that."""

    name = NAME
    limits = Limits(prior=over(start_s=5e-5, descriptor_s=2e-6, bytes_per_s=6e9))
    memory = ""

    def __init__(self, token: str, options: Options = Options()) -> None:
        self._token = token
        self._options = options
        self._io = IoThread("penstock-kv-nixl")
        self._agent: _Agent

    async def __aenter__(self) -> Self:
        """Raises MissingExtra where NIXL is not installed."""
        await self._io.__aenter__()
        try:
            self._agent = await self._io.run(_new_agent(self._options))
        except BaseException:
            await self._io.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._io.__aexit__()

    @asynccontextmanager
    async def export(self, region: Region) -> AsyncIterator[Exported]:
        """See `transport.api.Transport`. Raises SetupError for want of an address to listen at."""
        check_host(self._options.host, self._token)
        if region.buffer is None:
            raise Refused(f"the blocks of {region.owner} are not in host memory, so {NAME} cannot offer them")
        offer = Offer(NAME, *region.key, "", region.layout, region.blocks)
        owner = _Owner(self._agent, offer, region.buffer, self._token, self._options)
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
            raise Refused(f"the blocks of {source.owner} are not in host memory, so {NAME} cannot send them")
        moving = _Moving(self._agent, offer, source.buffer, self._options, on_loop(on_moved))
        hello = Hello(offer, writer, request, _this_host(), os.getpid())
        try:
            await self._io.run(moving.open(hello, self._token))
            if source.layout != offer.layout:
                raise Refused(f"{offer.owner} keeps KV as {offer.layout}, {source.owner} as {source.layout}")
            yield NixlPipe(self._io, moving, source.blocks, offer)
        finally:
            await self._io.run_out(moving.leave())


class _Export:
    """See `transport.api.Exported`."""

    def __init__(self, region: Region, offer: Offer, io: IoThread, owner: _Owner) -> None:
        self.region = region
        self.offer = offer
        self._io = io
        self._owner = owner

    async def fence(self, writer: str, request: str) -> None:
        await self._io.run(self._owner.wait_left(writer, request))

    def kill(self, writer: str) -> None:
        self._io.call(self._owner.kill, writer)


class NixlPipe:
    """See `transport.api.Pipe`."""

    def __init__(self, io: IoThread, moving: _Moving, blocks: int, offer: Offer) -> None:
        self._io = io
        self._moving = moving
        self._blocks = blocks
        self._offer = offer

    @property
    def moved(self) -> Moved:
        return self._moving.moved

    def write(self, blocks: Sequence[tuple[BlockId, BlockId]]) -> None:
        """See `transport.api.Pipe`."""
        self._io.call(self._moving.move, "WRITE", self._checked(blocks))

    def read(self, blocks: Sequence[tuple[BlockId, BlockId]]) -> None:
        """See `transport.api.Pipe`."""
        self._io.call(self._moving.move, "READ", self._checked(blocks))

    async def flush(self) -> None:
        """See `transport.api.Pipe`."""
        await self._io.run(self._moving.flush())

    def _checked(self, blocks: Sequence[tuple[BlockId, BlockId]]) -> tuple[tuple[BlockId, BlockId], ...]:
        """Raises KvError for blocks that do not exist."""
        for here, there in blocks:
            if not (0 <= here < self._blocks and 0 <= there < self._offer.blocks):
                raise KvError(f"no block {here} of {self._blocks} here, or {there} of {self._offer.blocks} there")
        return tuple(blocks)


# The rest lives on the I/O thread.


class _Agent:
    """NIXL's agent of this process, and what it has registered, each once."""

    def __init__(self, nixl: Any) -> None:
        self.nixl = nixl
        self._registered: dict[tuple[int, int], tuple[Any, int]] = {}  # handle and users, by address and size
        self._peers: dict[bytes, tuple[str, int]] = {}  # name and users, by metadata
        self._lists: dict[tuple[str, int, int, int], Any] = {}  # prepared blocks, by whose, address, number and size

    def register(self, address: int, size: int) -> None:
        handle, users = self._registered.get((address, size), (None, 0))
        if handle is None:
            handle = self.nixl.register_memory([(address, size, 0, "")], "DRAM")
        self._registered[(address, size)] = handle, users + 1

    def release(self, address: int, size: int) -> None:
        handle, users = self._registered.pop((address, size))
        if users > 1:
            self._registered[(address, size)] = handle, users - 1
            return
        for key in [key for key in self._lists if key[:2] == ("", address)]:
            self.nixl.release_dlist_handle(self._lists.pop(key))
        self.nixl.deregister_memory(handle)

    def register_anew(self, address: int, size: int) -> None:
        """Keys that peers have for this memory are void from now on."""
        handle, users = self._registered[(address, size)]
        self.nixl.deregister_memory(handle)
        self._registered[(address, size)] = self.nixl.register_memory([(address, size, 0, "")], "DRAM"), users

    def meet(self, metadata: bytes) -> str:
        """The name of the agent that this metadata is of."""
        name, users = self._peers.get(metadata, ("", 0))
        if not users:
            found = self.nixl.add_remote_agent(metadata)
            name = found.decode() if isinstance(found, bytes) else str(found)
            self.nixl.make_connection(name)
        self._peers[metadata] = name, users + 1
        return name

    def part(self, metadata: bytes) -> None:
        name, users = self._peers.pop(metadata)
        if users > 1:
            self._peers[metadata] = name, users - 1
            return
        for key in [key for key in self._lists if key[0] == name]:
            self.nixl.release_dlist_handle(self._lists.pop(key))
        self.nixl.remove_remote_agent(name)

    def blocks(self, whose: str, address: int, number: int, size: int) -> Any:
        """A prepared list of all blocks of a region; "" is this agent."""
        key = (whose, address, number, size)
        if key not in self._lists:
            descriptors = self.nixl.get_xfer_descs([(address + n * size, size, 0) for n in range(number)], "DRAM")
            self._lists[key] = self.nixl.prep_xfer_dlist(whose, descriptors)
        return self._lists[key]


async def _new_agent(options: Options) -> _Agent:
    try:
        nixl = import_module("nixl._api")
    except ImportError as error:
        raise MissingExtra(
            f"the nixl transport needs NIXL ({error}): pip install --no-deps nixl==1.5.1 nixl-cu12==1.5.1"
        ) from error
    for handler in logging.getLogger("nixl").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)  # standard output is what scripts read
    # Its own progress thread spins, which starves the workers of a small host.
    config = nixl.nixl_agent_config(backends=list(options.backends), enable_prog_thread=False)
    return _Agent(nixl.nixl_agent(f"penstock-{clock.nonce(8).hex()}", config))


@dataclass(slots=True, eq=False)
class _Writer:
    """A pipe into the region. `left` is set by proof alone. `pidfd` is that of a process of this host."""

    hello: Hello
    pidfd: int | None
    left: asyncio.Event = field(default_factory=asyncio.Event)


class _Owner:
    """Admits the writers of one region."""

    def __init__(self, agent: _Agent, offer: Offer, buffer: memoryview, token: str, options: Options) -> None:
        self._agent = agent
        self._offer = offer
        self._address, self._size = _address_of(buffer), len(buffer)
        self._token = token
        self._options = options
        self._writers: list[_Writer] = []
        self._stack = AsyncExitStack()

    async def open(self) -> str:
        """Listens, and returns the address. Raises AddressInUse or SetupError."""
        self._agent.register(self._address, self._size)
        self._stack.callback(self._agent.release, self._address, self._size)
        listener = self._stack.enter_context(await listening(self._options.host, self._options.port))
        await self._stack.enter_async_context(auth.admitting(listener, self._token, _PURPOSE, self._serve))
        progress = asyncio.ensure_future(self._make_progress())
        self._stack.callback(progress.cancel)
        host, port = listener.getsockname()[:2]
        return f"tcp:[{host}]:{port}" if ":" in host else f"tcp:{host}:{port}"

    async def close(self) -> None:
        await self._stack.aclose()
        for writer in self._writers:
            writer.left.set()

    async def wait_left(self, writer: str, request: str) -> None:
        for each in [each for each in self._writers if (each.hello.writer, each.hello.request) == (writer, request)]:
            await each.left.wait()

    def kill(self, writer: str) -> None:
        stuck = [each for each in self._writers if each.hello.writer == writer]
        for each in stuck:
            if each.pidfd is not None:
                try:
                    signal.pidfd_send_signal(each.pidfd, signal.SIGKILL)
                except ProcessLookupError:
                    pass  # it died by itself; its connection is about to tell
        far = [each for each in stuck if each.pidfd is None]
        if far:
            self._agent.register_anew(self._address, self._size)
        for each in far:
            each.left.set()

    async def _serve(self, sock: socket.socket) -> None:
        """Tells a peer how to write, and returns when it cannot write any more."""
        async with asyncio.timeout(self._options.dial_s):
            hello = _decode_hello(await read_message(sock))
            try:
                check(hello.offer, self._offer)
            except PenstockError as error:
                await send_message(sock, _encode((to_wire(error), None)))
                return
            pidfd = os.pidfd_open(hello.pid) if hello.host == _this_host() else None
            writer = _Writer(hello, pidfd)
            self._writers.append(writer)
        try:
            welcome = Welcome(self._agent.nixl.get_agent_metadata(), self._address)
            await send_message(sock, _encode((None, welcome)))
            await _wait_end(sock)
            writer.left.set()
        finally:
            self._writers.remove(writer)
            if pidfd is not None:
                os.close(pidfd)

    async def _make_progress(self) -> None:
        """What comes over TCP is stored by this side's UCX, when somebody calls it."""
        while True:
            await asyncio.sleep(self._options.progress_s if self._writers else 50 * self._options.progress_s)
            self._agent.nixl.get_new_notifs()


@dataclass(slots=True, eq=False)
class _Operation:
    handle: Any
    size: int
    pieces: int
    pairs: int  # with it and all before it, so many pairs are written


class _Moving:
    """A pipe on the I/O thread."""

    def __init__(
        self, agent: _Agent, offer: Offer, source: memoryview, options: Options, on_moved: Callable[[], None]
    ) -> None:
        self.moved = Moved()
        self._agent = agent
        self._offer = offer
        self._source, self._size = _address_of(source), len(source)
        self._options = options
        self._on_moved = on_moved
        block_bytes = offer.layout.block_bytes
        self._backlogs = {"READ": Backlog(block_bytes), "WRITE": Backlog(block_bytes)}
        self._under_way: deque[_Operation] = deque()
        self._began_s = 0.0
        self._asked = asyncio.Event()
        self._settled = asyncio.Event()
        self._settled.set()
        self._error: PenstockError | None = None
        self._peer = ""
        self._welcome: Welcome | None = None
        self._sock: socket.socket | None = None
        self._stack = AsyncExitStack()

    async def open(self, hello: Hello, token: str) -> None:
        """Raises Refused, StaleEpoch or ConnectionLost."""
        owner = self._offer.owner
        try:
            async with asyncio.timeout(self._options.dial_s):
                self._sock = sock = self._stack.enter_context(await dial(self._offer.address))
                await auth.join(sock, token, _PURPOSE, owner)
                await send_message(sock, _encode(hello))
                refusal, welcome = _decode_answer(await read_message(sock))
        except TimeoutError:
            raise ConnectionLost(f"{owner} gave no answer within {self._options.dial_s:g} s when dialled") from None
        except OSError as error:
            raise ConnectionLost(f"lost {owner} at {self._offer.address} when dialling: {error}") from error
        if refusal is not None or welcome is None:
            raise from_wire(refusal) if refusal is not None else ConnectionLost(f"{owner} said nothing of its memory")
        self._welcome = welcome
        self._agent.register(self._source, self._size)
        self._stack.callback(self._agent.release, self._source, self._size)
        self._peer = self._agent.meet(welcome.metadata)
        self._stack.callback(self._agent.part, welcome.metadata)
        working = asyncio.ensure_future(self._work())
        watching = asyncio.ensure_future(self._watch(sock))
        self._stack.callback(working.cancel)
        self._stack.callback(watching.cancel)

    def move(self, kind: str, pairs: Sequence[tuple[BlockId, BlockId]]) -> None:
        if self._error is not None or not pairs or kind not in self._backlogs:
            return  # `flush` says so, or it was left
        if self._settled.is_set():
            self._settled.clear()
            self._began_s = clock.now()
        self._backlogs[kind].add(pairs)
        self._asked.set()

    async def flush(self) -> None:
        """Raises ConnectionLost."""
        await self._settled.wait()
        if self._error is not None:
            raise self._error

    async def leave(self) -> None:
        """Nothing is moved any more, and the owner knows."""
        self._backlogs.clear()
        if self._under_way and self._error is None:
            await asyncio.wait([asyncio.ensure_future(self._settled.wait())], timeout=self._options.stalled_s)
        for operation in self._under_way:
            self._agent.nixl.release_xfer_handle(operation.handle)  # which aborts it
        self._under_way.clear()
        if self._sock is not None and self._welcome is not None:
            try:
                self._sock.send(_LEFT)
            except OSError:
                pass  # the owner is gone, and with it the need to know
        await self._stack.aclose()

    async def _work(self) -> None:
        try:
            while True:
                await self._asked.wait()
                self._asked.clear()
                await self._move_all()
        except PenstockError as error:
            self._fail(error)
        except Exception as error:  # NIXL's own, of which there are many
            self._fail(ConnectionLost(f"NIXL cannot move blocks of {self._offer.owner}: {error!r}"))

    async def _watch(self, sock: socket.socket) -> None:
        """An owner that is gone cannot be asked any more; what is under way may never end."""
        await _wait_end(sock)
        self._fail(ConnectionLost(f"{self._offer.owner} has left"))

    def _fail(self, error: PenstockError) -> None:
        if self._error is None:
            self._error = error
            self._settled.set()
            self._on_moved()

    async def _move_all(self) -> None:
        """Raises ConnectionLost for what fails or stalls."""
        progress_s = clock.now()
        while self._error is None:
            while len(self._under_way) < UNDER_WAY and self._start_next():
                pass
            if not self._under_way:
                return
            first = self._under_way[0]
            state = self._agent.nixl.check_xfer_state(first.handle)
            if state == "DONE":
                self._under_way.popleft()
                self._agent.nixl.release_xfer_handle(first.handle)
                self._note(first)
                progress_s = clock.now()
                await asyncio.sleep(0)
            elif state != "PROC":
                raise ConnectionLost(f"NIXL says {state} of a transfer with {self._offer.owner}")
            elif clock.now() - progress_s > self._options.stalled_s:
                raise ConnectionLost(f"nothing moved with {self._offer.owner} for {self._options.stalled_s:g} s")
            else:
                await asyncio.sleep(self._options.poll_s)

    def _start_next(self) -> bool:
        """Whether there was something to start."""
        for kind, backlog in self._backlogs.items():
            if runs := backlog.take(CHUNK_BYTES, MAX_RUNS):
                handle = self._prepare(kind, runs)
                pairs = backlog.taken_pairs if kind == "WRITE" else self._backlogs["WRITE"].taken_pairs
                self._under_way.append(_Operation(handle, sum(run.size for run in runs), len(runs), pairs))
                if (state := self._agent.nixl.transfer(handle)) not in ("PROC", "DONE"):
                    raise ConnectionLost(f"NIXL says {state} of a transfer with {self._offer.owner}")
                return True
        return False

    def _prepare(self, kind: str, runs: Sequence[Run]) -> Any:
        """Of single blocks by their numbers in prepared lists, of long runs by their addresses."""
        assert self._welcome is not None
        nixl, size, there = self._agent.nixl, self._offer.layout.block_bytes, self._welcome.address
        if all(run.size == size for run in runs):
            near = self._agent.blocks("", self._source, self._size // size, size)
            far = self._agent.blocks(self._peer, there, self._offer.blocks, size)
            sources, targets = [run.here // size for run in runs], [run.there // size for run in runs]
            return nixl.make_prepped_xfer(kind, near, sources, far, targets, b"")
        own = nixl.get_xfer_descs([(self._source + run.here, run.size, 0) for run in runs], "DRAM")
        theirs = nixl.get_xfer_descs([(there + run.there, run.size, 0) for run in runs], "DRAM")
        return nixl.initialize_xfer(kind, own, theirs, self._peer, b"")

    def _note(self, done: _Operation) -> None:
        moved, seconds = self.moved, self.moved.seconds
        if not self._under_way and not any(self._backlogs.values()):
            seconds += clock.now() - self._began_s
            self._settled.set()
        size_bytes, pieces = moved.size_bytes + done.size, moved.descriptors + done.pieces
        self.moved = Moved(done.pairs, size_bytes, seconds, pieces)
        self._on_moved()


async def _wait_end(sock: socket.socket) -> None:
    """Returns when the peer said that it left, or closed its end, as its kernel does when it dies.

    A connection that is lost otherwise proves nothing: then this waits for ever.
    """
    try:
        while await asyncio.get_running_loop().sock_recv(sock, len(_LEFT)) not in (_LEFT, b""):
            pass
    except ConnectionResetError:
        return
    except OSError as error:
        log.warning("the connection to a peer was lost, which does not prove that it stopped: %s", error)
        await asyncio.Event().wait()


def _address_of(buffer: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def _this_host() -> str:
    """Names the kernel and the namespace that process ids are seen in."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot_id}/{Path('/proc/self/ns/pid').readlink()}"


TRANSPORT = NixlTransport
