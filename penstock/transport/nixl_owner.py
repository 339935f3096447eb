"""The owner's side of the `nixl` transport: who may write into a region, and the proof that they cannot any more.

A region has an agent of its own, and each writer a connection, over which it says how it ended:

    LEFT                      all that it moved is in place                      -> gone
    LOST                      it moves nothing more; some may be on its way      -> the agent is closed, gone
    nothing, of this host     it may still write, until its process is dead      -> the agent is closed, gone
    nothing, from elsewhere   nobody knows                                       -> the agent is closed, gone

Closing the agent takes the way from all other writers too: they lose their pipes, and connect again to its successor.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from penstock import auth
from penstock.errors import ConnectionLost, PenstockError, Refused, WireForm, to_wire
from penstock.transport import host_memory
from penstock.transport.api import Offer
from penstock.transport.nixl_agent import Agent, new_agent
from penstock.transport.nixl_options import Options
from penstock.transport.offers import check
from penstock.transport.sockets import listening, read_message, send_message

log = logging.getLogger(__name__)

PURPOSE = b"kv-nixl"
LEFT, LOST = b"+", b"-"

_START_TIME = 19  # of the fields in /proc/PID/stat that follow the name


class Process(msgspec.Struct, frozen=True):
    """A process as others of its host can find it: `host` names the kernel, and the namespace that `pid` is of.

    `started` tells it from a later one of the same number, in ticks of the kernel's clock.
    """

    host: str
    pid: int
    started: int


class Hello(msgspec.Struct, frozen=True):
    """I am `writer`, and move blocks of this region for `request`."""

    offer: Offer
    writer: str
    request: str
    process: Process


class Welcome(msgspec.Struct, frozen=True):
    """How the region is reached: its agent's metadata, and where it begins."""

    metadata: bytes
    address: int


Answer = tuple[WireForm | None, Welcome | None]

encode = msgspec.msgpack.Encoder().encode
_decode_hello = msgspec.msgpack.Decoder(Hello).decode


def this_process() -> Process:
    return Process(_this_host(), os.getpid(), _started(os.getpid()))


@dataclass(frozen=True, slots=True, eq=False)
class _Writer:
    """A pipe into the region, by way of `agent`. `gone` is set by proof alone. `pidfd` is of a process of this host."""

    hello: Hello
    sock: socket.socket
    agent: Agent
    pidfd: int | None
    gone: asyncio.Event = field(default_factory=asyncio.Event)


class Owner:
    """Offers one region. `offer` has no address before `open` returned one. Lives on the I/O thread."""

    def __init__(self, offer: Offer, address: int, size_bytes: int, token: str, options: Options) -> None:
        self._offer = offer
        self._address = address
        self._size_bytes = size_bytes
        self._token = token
        self._options = options
        self._agent: Agent | None = None
        self._writers: list[_Writer] = []
        self._came = asyncio.Event()  # a writer
        self._stack = AsyncExitStack()

    async def open(self) -> str:
        """Listens, and returns the address. Raises MissingExtra, AddressInUse or SetupError."""
        self._reachable()
        listener = self._stack.enter_context(await listening(self._options.host, self._options.port))
        await self._stack.enter_async_context(auth.admitting(listener, self._token, PURPOSE, self._serve))
        progress = asyncio.create_task(self._make_progress())
        self._stack.callback(progress.cancel)
        host, port = listener.getsockname()[:2]
        return f"tcp:[{host}]:{port}" if ":" in host else f"tcp:{host}:{port}"

    async def close(self) -> None:
        """Nothing is written into the region any more, unless a process of this host is frozen as it does so."""
        for writer in self._writers:
            _hang_up(writer)
        near = [asyncio.create_task(writer.gone.wait()) for writer in self._writers if writer.pidfd is not None]
        if near:
            _, late = await asyncio.wait(near, timeout=self._options.hello_s)
            for waiting in late:
                log.warning("a writer did not stop as %s withdrew its region: it may be frozen", self._offer.owner)
                waiting.cancel()
        await self._stack.aclose()
        if self._agent is not None:
            self._withdraw(self._agent)

    async def wait_gone(self, writer: str, request: str) -> None:
        """Returns when nothing can be written any more of what `writer` moves for `request` now."""
        for each in [each for each in self._of(writer) if each.hello.request == request]:
            await each.gone.wait()

    def kill(self, writer: str) -> None:
        """Ends a process of this host; takes the way from one of another."""
        for each in self._of(writer):
            if each.pidfd is None:
                self._withdraw(each.agent)
                continue
            try:
                signal.pidfd_send_signal(each.pidfd, signal.SIGKILL)
            except ProcessLookupError:
                pass  # it died by itself; the loop is about to tell

    async def _serve(self, sock: socket.socket) -> None:
        """Tells a peer how to write, and returns when it cannot write any more."""
        async with asyncio.timeout(self._options.hello_s):
            hello = _decode_hello(await read_message(sock))
        try:
            check(hello.offer, self._offer)
            watched = _watched(hello.process) if hello.process.host == _this_host() else nullcontext()
            with watched as pidfd:
                await self._follow(_Writer(hello, sock, self._reachable(), pidfd))
        except PenstockError as error:
            await send_message(sock, encode((to_wire(error), None)))

    async def _follow(self, writer: _Writer) -> None:
        self._writers.append(writer)
        self._came.set()
        word = await self._word_of(writer)
        if word not in (LEFT, LOST) and writer.pidfd is not None:
            await _wait_dead(writer.pidfd)
        if word != LEFT:
            log.info(
                "%s ended in mid-transfer, so other writers of %s lose theirs", writer.hello.writer, self._offer.owner
            )
            self._withdraw(writer.agent)
        self._writers.remove(writer)
        writer.gone.set()

    async def _word_of(self, writer: _Writer) -> bytes:
        """How it says it ended; empty if it is gone without a word, or out of reach for so long as TCP keeps trying."""
        try:
            async with asyncio.timeout(self._options.hello_s):
                await send_message(writer.sock, encode((None, Welcome(writer.agent.metadata, self._address))))
            return await asyncio.get_running_loop().sock_recv(writer.sock, 1)
        except OSError as error:  # a TimeoutError, too
            log.info("lost the connection of %s: %s", writer.hello.writer, error)
            return b""

    def _reachable(self) -> Agent:
        """The agent by which the region is reached, a new one if the one before was closed."""
        if self._agent is None:
            self._agent = new_agent(self._options)
            self._agent.register(self._address, self._size_bytes)
        return self._agent

    def _withdraw(self, agent: Agent) -> None:
        """Nothing is stored any more by way of this agent. Who used it must connect again."""
        if agent is not self._agent:
            return  # that was so already
        self._agent = None
        agent.close()
        for writer in self._writers:
            if writer.agent is agent:
                _hang_up(writer)
                if writer.pidfd is None:
                    writer.gone.set()

    async def _make_progress(self) -> None:
        while True:
            if not self._writers:
                self._came.clear()
                await self._came.wait()
            await asyncio.sleep(self._options.progress_s)
            if self._agent is None:
                continue
            try:
                self._agent.make_progress()
            except ConnectionLost as error:
                log.warning("%s takes its memory back from all writers: %s", self._offer.owner, error)
                self._withdraw(self._agent)

    def _of(self, writer: str) -> list[_Writer]:
        return [each for each in self._writers if each.hello.writer == writer]


def _hang_up(writer: _Writer) -> None:
    """Tells it that its pipe is lost. Its own last word can still come."""
    try:
        writer.sock.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # it is gone, which is told elsewhere


def _this_host() -> str:
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot_id}/{Path('/proc/self/ns/pid').readlink()}"


def _started(pid: int) -> int:
    """Raises FileNotFoundError or ProcessLookupError for one that is gone."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[_START_TIME])


@contextmanager
def _watched(process: Process) -> Iterator[int]:
    """A pidfd of it. Raises Refused if its death could be neither seen nor brought about."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError:
        raise Refused(f"process {process.pid} is dead already") from None
    with host_memory.closing(descriptor):
        try:
            if _started(process.pid) != process.started:
                raise Refused(f"process {process.pid} is not the one that asks for memory any more")
            signal.pidfd_send_signal(descriptor, 0)
        except (FileNotFoundError, ProcessLookupError):
            raise Refused(f"process {process.pid} is dead already") from None
        except PermissionError:
            raise Refused(f"process {process.pid} is another user's: its death could not be brought about") from None
        yield descriptor


async def _wait_dead(pidfd: int) -> None:
    dead = asyncio.Event()
    asyncio.get_running_loop().add_reader(pidfd, dead.set)
    try:
        await dead.wait()
    finally:
        asyncio.get_running_loop().remove_reader(pidfd)
