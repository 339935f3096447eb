"""What is particular to TCP: other processes and their deaths, bad peers, bad networks, and what is left behind."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import signal
import socket
import struct
import termios
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock import auth, clock
from penstock.blocks import BlockId, KvLayout, Region
from penstock.errors import (
    AddressInUse,
    ConnectionLost,
    KvError,
    PenstockError,
    Refused,
    SetupError,
    StaleEpoch,
    UnsafeBind,
)
from penstock.transport import sockets, tcp_frames
from penstock.transport.api import Exported, Offer
from penstock.transport.host_memory import new_region
from penstock.transport.io_thread import on_loop
from penstock.transport.tcp import Options, TcpPipe, TcpTransport, _Export
from penstock.transport.tcp_backlog import Backlog, Run
from penstock.transport.tcp_frames import (
    CLOSE,
    DATA,
    DROPPED,
    FETCH,
    FETCHED,
    GOODBYE,
    HEAD,
    OPEN,
    OPENED,
    PAYLOAD,
    PLACED,
    RANGE,
    REPLY,
    Hello,
)
from penstock.transport.tcp_owner import MAX_WAITING, _Link
from penstock.transport.tcp_session import Session
from tests.support import errors_of_loop, run
from tests.transport.peers import TOKEN, WRITER, peer_of

LAYOUT = KvLayout(layers=4, kv_heads=2, head_dim=32, block_tokens=16, dtype="float32")
BLOCKS = 1024  # 32 MiB
EVERYTHING = [(BlockId(number), BlockId(number)) for number in range(BLOCKS)]
QUICK = Options(connections=2, stalled_s=0.2, dial_s=0.5, hello_s=0.2)


@asynccontextmanager
async def exporting(options: Options = Options(), blocks: int = BLOCKS) -> AsyncIterator[_Export]:
    async with (
        TcpTransport(TOKEN, options) as transport,
        new_region("d", 1, LAYOUT, blocks) as region,
        transport.export(region) as exported,
    ):
        assert isinstance(exported, _Export)
        yield exported


class Writer:
    """A transport, and a region full of 7 to write from."""

    def __init__(self, transport: TcpTransport, source: Region) -> None:
        self.transport = transport
        self.source = source

    @asynccontextmanager
    async def pipe(self, exported: Exported, port: int | None = None, request: str = "r") -> AsyncIterator[TcpPipe]:
        """Dials another port if asked to."""
        offer = exported.offer
        if port is not None:
            offer = msgspec.structs.replace(offer, address=f"tcp:127.0.0.1:{port}")
        async with self.transport.connect(offer, self.source, WRITER, request, lambda: None) as pipe:
            yield pipe


@asynccontextmanager
async def writing(options: Options = Options(), token: str = TOKEN, blocks: int = BLOCKS) -> AsyncIterator[Writer]:
    async with TcpTransport(token, options) as transport, new_region("p", 1, LAYOUT, blocks) as source:
        assert source.buffer is not None
        source.buffer[:] = b"\7" * len(source.buffer)
        yield Writer(transport, source)


class Network:
    """Forwards connections to a port, as bad as it is told to be."""

    def __init__(self) -> None:
        self.port = 0
        self.change: Callable[[bytearray], None] = lambda _: None  # what goes towards the owner
        self.change_back: Callable[[bytearray], None] = lambda _: None  # what comes from there
        self.open = asyncio.Event()
        self.open.set()
        self.connections = 0
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: list[asyncio.Task[None]] = []

    def cut(self) -> None:
        """Resets all connections."""
        for writer in self._writers:
            writer.transport.abort()

    async def accept(self, target: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", target)
        self._writers += [writer, there_writer]
        self._tasks += [
            asyncio.create_task(self._forward(reader, there_writer, lambda data: self.change(data))),
            asyncio.create_task(self._forward(there_reader, writer, lambda data: self.change_back(data))),
        ]

    async def close(self) -> None:
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _forward(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, change: Callable[[bytearray], None]
    ) -> None:
        try:
            while data := bytearray(await reader.read(1 << 16)):
                await self.open.wait()
                change(data)
                writer.write(data)
                await writer.drain()
        except OSError:
            pass  # cut
        writer.close()


@asynccontextmanager
async def network_to(exported: Exported) -> AsyncIterator[Network]:
    network = Network()
    target = int(exported.offer.address.rpartition(":")[2])
    server = await asyncio.start_server(lambda r, w: network.accept(target, r, w), "127.0.0.1", 0)
    network.port = server.sockets[0].getsockname()[1]
    try:
        yield network
    finally:
        server.close()
        await network.close()


def buffer_of(exported: Exported) -> memoryview:
    assert exported.region.buffer is not None
    return exported.region.buffer


def is_untouched(exported: Exported) -> bool:
    return buffer_of(exported) == bytes(len(buffer_of(exported)))


def link_of(exported: _Export, writer: str = WRITER) -> _Link:
    return exported._receiver._links[writer]


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


def traces() -> list[list[str]]:
    """What this process has that a transport may have forgotten."""
    gc.collect()
    links = [path.readlink().name for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return [
        sorted(link.split("[")[0] for link in links),
        sorted(thread.name for thread in threading.enumerate()),
        [line for line in Path("/proc/self/maps").read_text().splitlines() if "penstock-kv" in line],
    ]


# What a pipe does


def test_a_block_larger_than_a_frame_arrives_whole() -> None:
    layout = msgspec.structs.replace(LAYOUT, block_tokens=16 * 256)  # 8 MiB

    async def story() -> None:
        async with (
            TcpTransport(TOKEN) as here,
            new_region("d", 1, layout, 3) as there,
            new_region("p", 1, layout, 3) as source,
            here.export(there) as exported,
            here.connect(exported.offer, source, WRITER, "r", lambda: None) as pipe,
        ):
            size = layout.block_bytes
            pattern = b"".join(struct.pack("<I", number) for number in range(size // 4))
            assert source.buffer is not None
            source.buffer[size : 2 * size] = pattern
            pipe.write([(BlockId(1), BlockId(2))])
            await pipe.flush()
            assert buffer_of(exported)[2 * size :] == pattern
            assert buffer_of(exported)[: 2 * size] == bytes(2 * size)

    run(story())


def test_pipes_between_two_workers_share_their_connections() -> None:
    async def story() -> None:
        async with exporting() as exported, writing(Options(connections=3)) as writer:
            for _ in range(3):
                async with writer.pipe(exported) as one, writer.pipe(exported) as two:
                    one.write(EVERYTHING[:10])
                    two.write(EVERYTHING[10:20])
                    await one.flush()
                    await two.flush()
                    assert len(link_of(exported).lanes) == 3
                    first = link_of(exported)
            async with writer.pipe(exported):
                assert link_of(exported) is first

    run(story())


def test_what_was_moved_is_counted() -> None:
    async def story() -> None:
        async with exporting() as exported, writing() as writer, writer.pipe(exported) as pipe:
            assert (pipe.moved.size_bytes, pipe.moved.seconds, pipe.moved.descriptors) == (0, 0, 0)
            pipe.write([(BlockId(0), BlockId(5)), (BlockId(1), BlockId(6)), (BlockId(9), BlockId(9))])
            await pipe.flush()
            assert (pipe.moved.size_bytes, pipe.moved.descriptors) == (3 * LAYOUT.block_bytes, 2)
            before_s = pipe.moved.seconds
            assert before_s > 0
            pipe.write([(BlockId(3), BlockId(3))])
            await pipe.flush()
            assert (pipe.moved.size_bytes, pipe.moved.descriptors) == (4 * LAYOUT.block_bytes, 3)
            assert pipe.moved.seconds > before_s

    run(story())


def test_a_small_write_does_not_wait_for_a_big_one() -> None:
    async def story() -> None:
        async with (
            exporting() as exported,
            writing() as writer,
            writer.pipe(exported) as big,
            writer.pipe(exported) as small,
        ):
            for _ in range(32):  # 1 GiB
                big.write(EVERYTHING)
            await until(lambda: big.moved.size_bytes)
            small.write(EVERYTHING[:1])
            await small.flush()
            assert big.moved.size_bytes < 32 * BLOCKS * LAYOUT.block_bytes

    run(story())


def test_the_loop_turns_while_bytes_move() -> None:
    async def story() -> None:
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        async with exporting() as exported, writing() as writer, writer.pipe(exported) as pipe:
            counting = asyncio.create_task(count())
            pipe.write(EVERYTHING)
            await pipe.flush()
            counting.cancel()
        assert turns > 10

    run(story())


def test_a_block_that_does_not_exist_is_refused_before_it_is_sent() -> None:
    async def story() -> None:
        async with exporting() as exported, writing() as writer, writer.pipe(exported) as pipe:
            for pair in ((0, BLOCKS), (BLOCKS, 0), (-1, 0), (0, -1)):
                with pytest.raises(KvError, match=f"of the {BLOCKS} of d"):
                    pipe.write([(BlockId(pair[0]), BlockId(pair[1]))])
            await pipe.flush()

    run(story())


def test_a_region_without_host_memory_cannot_be_sent_from() -> None:
    async def story() -> None:
        async with exporting() as exported, writing() as writer:
            hidden = replace(writer.source, buffer=None)
            with pytest.raises(Refused, match="not in host memory"):
                async with writer.transport.connect(exported.offer, hidden, WRITER, "r", lambda: None):
                    pytest.fail("connected")

    run(story())


def test_ipv6_is_an_address_too() -> None:
    async def story() -> None:
        async with exporting(Options(host="::1")) as exported, writing() as writer, writer.pipe(exported) as pipe:
            assert exported.offer.address.startswith("tcp:[::1]:")
            pipe.write(EVERYTHING[:3])
            await pipe.flush()

    run(story())


# Who is gone, and who cannot write any more


def test_a_killed_process_is_gone_and_writes_no_more() -> None:
    async def story() -> None:
        async with exporting() as exported, peer_of(exported) as peer:
            peer.tell("stream")
            await until(lambda: buffer_of(exported)[0] == 7)
            waiting = asyncio.create_task(exported.fence(WRITER, "r"))
            peer.process.kill()
            await waiting
            buffer_of(exported)[:] = bytes(len(buffer_of(exported)))
            await peer.process.wait()
            await exported.fence(WRITER, "r")
            assert is_untouched(exported)

    run(story())


def test_a_stopped_process_can_be_taken_back_from_and_lives() -> None:
    async def story() -> None:
        async with exporting() as exported, peer_of(exported) as peer, peer_of(exported, "q:1") as other:
            peer.tell("stream")
            await until(lambda: buffer_of(exported)[0] == 7)
            peer.process.send_signal(signal.SIGSTOP)
            await exported.fence(WRITER, "r")
            buffer_of(exported)[:] = bytes(len(buffer_of(exported)))
            peer.process.send_signal(signal.SIGCONT)
            assert await peer.read() == "ConnectionLost"
            assert is_untouched(exported)
            assert await other.ask("write") == "done"
            assert await other.ask("flush") == "done"
            assert buffer_of(exported) == b"\7" * len(buffer_of(exported))
            assert await peer.ask("leave") == "left"

    run(story())


@pytest.mark.parametrize("end", [signal.SIGSTOP, signal.SIGKILL])
def test_bytes_that_the_kernel_holds_cannot_reach_memory_that_was_taken_back(end: signal.Signals) -> None:
    async def story() -> None:
        async with exporting() as exported, peer_of(exported) as peer:
            lanes = link_of(exported).lanes
            is_held, go_on = threading.Event(), threading.Event()
            exported._io.call(lambda: (is_held.set(), go_on.wait()))  # from now on nothing is received
            await until(is_held.is_set)
            try:
                peer.tell("stream")
                await until(lambda: sum(map(unread_bytes, (lane._sock for lane in lanes))) > 100_000)
                peer.process.send_signal(end)
                exported.kill(WRITER)
            finally:
                go_on.set()
            await exported.fence(WRITER, "r")
            assert is_untouched(exported)
            if end == signal.SIGSTOP:
                peer.process.send_signal(signal.SIGCONT)
            assert await peer.read() == ("ConnectionLost" if end == signal.SIGSTOP else "")
            assert is_untouched(exported)

    run(story())


def unread_bytes(sock: socket.socket) -> int:
    return int(struct.unpack("i", fcntl.ioctl(sock, termios.FIONREAD, bytes(4)))[0])


def test_who_was_taken_back_from_may_come_again() -> None:
    async def story() -> None:
        async with exporting() as exported, writing() as writer:
            async with writer.pipe(exported) as pipe:
                exported.kill(WRITER)
                await exported.fence(WRITER, "r")
                pipe.write(EVERYTHING)
                with pytest.raises(ConnectionLost, match="took its memory back"):
                    await pipe.flush()
            async with writer.pipe(exported) as pipe:
                pipe.write(EVERYTHING[:1])
                await pipe.flush()

    run(story())


def test_a_pipe_left_in_mid_transfer_is_fenced_off_and_its_neighbour_goes_on() -> None:
    async def story() -> None:
        async with (
            exporting() as exported,
            writing() as writer,
            writer.pipe(exported) as kept,
        ):
            for _ in range(5):
                async with writer.pipe(exported, request="other") as pipe:
                    for _ in range(8):
                        pipe.write(EVERYTHING)
                    await until(lambda pipe=pipe: pipe.moved.size_bytes)
                await exported.fence(WRITER, "other")
                assert len(link_of(exported).sessions) == 1
                buffer_of(exported)[:] = bytes(len(buffer_of(exported)))
                kept.write(EVERYTHING[:1])
                await kept.flush()  # and with it the rest of the frames that were being sent
                buffer_of(exported)[: LAYOUT.block_bytes] = bytes(LAYOUT.block_bytes)
                assert is_untouched(exported)

    run(story())


def test_what_a_broken_network_still_holds_is_fenced_off() -> None:
    async def story() -> None:
        async with exporting() as exported, writing(QUICK) as writer, network_to(exported) as network:
            async with writer.pipe(exported, network.port) as pipe:
                pipe.write(EVERYTHING)
                await until(lambda: pipe.moved.size_bytes)
                network.open.clear()
                with pytest.raises(ConnectionLost, match=r"took and said nothing for 0\.2 s"):
                    await pipe.flush()
            await exported.fence(WRITER, "r")
            buffer_of(exported)[:] = bytes(len(buffer_of(exported)))
            network.open.set()
            async with writer.pipe(exported) as pipe:
                pipe.write(EVERYTHING[:1])
                await pipe.flush()
            buffer_of(exported)[: LAYOUT.block_bytes] = bytes(LAYOUT.block_bytes)
            assert is_untouched(exported)

    run(story())


def test_an_owner_that_leaves_in_mid_transfer_is_lost() -> None:
    async def story() -> None:
        export = exporting()
        exported = await export.__aenter__()
        async with writing(QUICK) as writer, writer.pipe(exported) as pipe:
            pipe.write(EVERYTHING)
            await export.__aexit__(None, None, None)
            with pytest.raises(ConnectionLost):
                pipe.write(EVERYTHING)
                await pipe.flush()

    run(story())


def test_a_connect_cancelled_anywhere_leaves_no_writer() -> None:
    async def story() -> None:
        async def connect() -> None:
            async with writer.pipe(exported):
                await asyncio.Event().wait()

        with errors_of_loop() as errors:
            async with exporting(blocks=16) as exported, writing(blocks=16) as writer:
                for turns in range(40):
                    connecting = asyncio.create_task(connect())
                    for _ in range(turns):
                        await asyncio.sleep(0)
                    connecting.cancel()
                    await asyncio.wait((connecting,))
                    await exported.fence(WRITER, "r")
        assert errors == []

    run(story())


# Bad networks


BOTH_WAYS = pytest.mark.parametrize("move", [TcpPipe.write, TcpPipe.read], ids=["write", "read"])
Move = Callable[[TcpPipe, list[tuple[BlockId, BlockId]]], None]


@BOTH_WAYS
def test_a_stalled_owner_is_given_up_on(move: Move) -> None:
    async def story() -> None:
        async with (
            exporting() as exported,
            writing(QUICK) as writer,
            network_to(exported) as network,
            writer.pipe(exported, network.port) as pipe,
        ):
            network.open.clear()
            move(pipe, EVERYTHING)
            with pytest.raises(ConnectionLost, match=r"d took and said nothing for 0\.2 s"):
                await pipe.flush()
            network.open.set()

    run(story())


@BOTH_WAYS
def test_a_slow_owner_is_not_given_up_on(move: Move) -> None:
    async def story() -> None:
        async with (
            exporting() as exported,
            writing(QUICK) as writer,
            network_to(exported) as network,
            writer.pipe(exported, network.port) as pipe,
        ):
            loop = asyncio.get_running_loop()

            def hold(data: bytearray) -> None:  # everything that arrives stops the network for a while
                if len(data) > 1000:
                    network.open.clear()
                    loop.call_later(0.01, network.open.set)

            network.change = network.change_back = hold
            began_s = loop.time()
            move(pipe, EVERYTHING[:256])
            await pipe.flush()
            assert loop.time() - began_s > QUICK.stalled_s
            assert pipe.moved.size_bytes == 256 * LAYOUT.block_bytes

    run(story())


def damager(times: int) -> Callable[[bytearray], None]:
    """One bit of the payload, in so many of the next pieces."""
    left = times

    def change(data: bytearray) -> None:
        nonlocal left
        at = data.find(b"\7" * 100)
        if at >= 0 and left:
            left -= 1
            data[at + 50] ^= 1

    return change


def test_what_was_damaged_is_sent_again(caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        options = Options(connections=1, has_checksums=True)
        async with (
            exporting() as exported,
            writing(options) as writer,
            network_to(exported) as network,
            writer.pipe(exported, network.port) as pipe,
        ):
            network.change = damager(times=1)
            pipe.write(EVERYTHING)
            await pipe.flush()
            assert buffer_of(exported) == b"\7" * len(buffer_of(exported))
            assert pipe.moved.size_bytes == len(buffer_of(exported))

    run(story())
    assert "damaged on their way and are sent again" in caplog.text


def test_what_is_damaged_again_is_an_error() -> None:
    async def story() -> None:
        options = Options(connections=1, has_checksums=True)
        async with (
            exporting() as exported,
            writing(options) as writer,
            network_to(exported) as network,
            writer.pipe(exported, network.port) as pipe,
        ):
            network.change = damager(times=1_000_000)
            pipe.write(EVERYTHING[:4])
            with pytest.raises(ConnectionLost, match="damaged on their way 2 times"):
                await pipe.flush()

    run(story())


def test_a_damaged_head_writes_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        options = Options(connections=1, has_checksums=True)
        async with (
            exporting() as exported,
            writing(options) as writer,
            network_to(exported) as network,
            writer.pipe(exported, network.port) as pipe,
        ):

            def change(data: bytearray) -> None:
                if data[0] == DATA:
                    data[HEAD.size + 2] ^= 1  # of the first range

            network.change = change
            pipe.write(EVERYTHING[:4])
            with pytest.raises(ConnectionLost, match="head of a frame was damaged"):
                await pipe.flush()
            assert is_untouched(exported)

    run(story())


# Reading


@pytest.mark.parametrize("times", [0, 1], ids=["undamaged", "damaged"])
def test_all_that_was_asked_for_is_read(times: int) -> None:
    async def story() -> None:
        async with (
            exporting() as exported,
            writing(Options(has_checksums=True)) as writer,
            network_to(exported) as network,
            writer.pipe(exported, network.port) as pipe,
        ):
            theirs, own = buffer_of(exported), writer.source.buffer
            assert own is not None
            theirs[:] = (b"\7" * 4095 + b"\1") * (len(theirs) // 4096)
            network.change_back = damager(times)
            pipe.read(EVERYTHING)
            await pipe.flush()
            assert own == theirs
            assert pipe.moved.size_bytes == len(own) and pipe.moved.blocks == 0

    run(story())


def test_reads_and_writes_of_pipes_go_side_by_side() -> None:
    async def story() -> None:
        half = BLOCKS // 2
        async with (
            exporting() as exported,
            writing() as writer,
            writer.pipe(exported, request="a") as one,
            writer.pipe(exported, request="b") as two,
        ):
            theirs, own = buffer_of(exported), writer.source.buffer
            assert own is not None
            middle = half * LAYOUT.block_bytes
            theirs[middle:] = b"\5" * (len(theirs) - middle)
            for first in range(0, half, 64):
                one.write(EVERYTHING[first : first + 64])
                two.read(EVERYTHING[half + first : half + first + 64])
            await one.flush()
            await two.flush()
            expected = b"\7" * middle + b"\5" * (len(theirs) - middle)
            assert theirs == expected and own == expected

    run(story())


def test_nothing_is_stored_by_a_read_that_was_left() -> None:
    async def story() -> None:
        async with (
            exporting() as exported,
            writing() as writer,
            writer.pipe(exported, request="kept") as kept,
        ):
            own = writer.source.buffer
            assert own is not None
            for _ in range(10):
                async with writer.pipe(exported) as pipe:
                    for _ in range(4):
                        pipe.read(EVERYTHING)
                    await until(lambda pipe=pipe: pipe.moved.size_bytes)
                own[:] = b"\3" * len(own)
                kept.read(EVERYTHING[:1])
                await kept.flush()  # and with it the rest of the answers that were under way
                assert own[LAYOUT.block_bytes :] == b"\3" * (len(own) - LAYOUT.block_bytes)

    run(story())


def test_a_read_that_is_fenced_off_is_told() -> None:
    async def story() -> None:
        async with exporting() as exported, writing() as writer, writer.pipe(exported) as pipe:
            await exported.fence(WRITER, "r")
            pipe.read(EVERYTHING)
            with pytest.raises(ConnectionLost, match="took its memory back"):
                await pipe.flush()

    run(story())


def test_a_frozen_reader_gets_nothing_of_what_it_was_fenced_off_from() -> None:
    async def story() -> None:
        async with exporting() as exported, peer_of(exported) as peer:
            peer.tell("read for ever")
            lanes = link_of(exported).lanes
            await until(lambda: any(lane._sending for lane in lanes))
            peer.process.send_signal(signal.SIGSTOP)
            await until(lambda: all(lane._sending for lane in lanes))  # the kernels on the way are full
            await exported.fence(WRITER, "r")
            buffer_of(exported)[:] = b"\x09" * len(buffer_of(exported))  # for somebody else
            peer.process.send_signal(signal.SIGCONT)
            assert await peer.read() == "ConnectionLost"
            assert await peer.ask("holds 9") == "False"

    run(story())


def test_a_read_that_is_damaged_again_is_an_error_of_its_pipe_alone() -> None:
    async def story() -> None:
        async with (
            exporting() as exported,
            writing(Options(connections=1, has_checksums=True)) as writer,
            network_to(exported) as network,
            writer.pipe(exported, network.port) as pipe,
            writer.pipe(exported, network.port, request="other") as other,
        ):
            buffer_of(exported)[:] = b"\7" * len(buffer_of(exported))
            network.change_back = damager(times=1_000_000)
            pipe.read(EVERYTHING[:4])
            with pytest.raises(ConnectionLost, match="damaged on their way 2 times"):
                await pipe.flush()
            network.change_back = lambda _: None
            other.read(EVERYTHING[:4])
            await other.flush()

    run(story())


@pytest.mark.parametrize("end", [signal.SIGSTOP, signal.SIGKILL])
def test_a_reader_that_does_not_read_holds_up_nobody(end: signal.Signals) -> None:
    async def story() -> None:
        async with exporting() as exported, peer_of(exported) as peer, writing() as writer:
            peer.tell("read for ever")
            lanes = link_of(exported).lanes
            await until(lambda: any(lane._sending for lane in lanes))
            peer.process.send_signal(end)
            async with writer.transport.connect(exported.offer, writer.source, "q:1", "r", lambda: None) as pipe:
                pipe.write(EVERYTHING)
                await pipe.flush()
            await exported.fence(WRITER, "r")

    run(story())


# Who is let in, and what is taken from them


def test_a_wrong_token_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        async with exporting() as exported, writing(token="wrong") as writer:
            with pytest.raises(Refused, match="token"):
                async with writer.pipe(exported):
                    pytest.fail("connected with a wrong token")

    run(story())
    assert "another token" in caplog.text


def test_strangers_are_only_let_in_with_a_token() -> None:
    async def story() -> None:
        async with TcpTransport("", Options(host="192.0.2.1")) as transport, new_region("d", 1, LAYOUT, 1) as region:
            with pytest.raises(UnsafeBind, match="PENSTOCK_TOKEN"):
                async with transport.export(region):
                    pytest.fail("exported")

    run(story())


@pytest.mark.parametrize(
    ("host", "complaint"),
    [("0.0.0.0", "cannot dial"), ("192.0.2.1", "cannot offer KV at"), ("no-such-host.invalid", "no host of that name")],
)
def test_an_address_that_cannot_be_offered_is_a_setup_error(host: str, complaint: str) -> None:
    async def story() -> None:
        with pytest.raises(SetupError, match=complaint):
            async with exporting(Options(host=host), blocks=1):
                pytest.fail("exported")

    run(story())


def test_a_port_in_use_is_named() -> None:
    async def story() -> None:
        async with exporting(blocks=1) as exported:
            port = int(exported.offer.address.rpartition(":")[2])
            with pytest.raises(AddressInUse, match=f"{port} is in use"):
                async with exporting(Options(port=port), blocks=1):
                    pytest.fail("exported")

    run(story())


def test_an_owner_that_hangs_is_given_up_on() -> None:
    async def story() -> None:
        async with exporting() as exported, writing(QUICK) as writer:
            with (
                socket.create_server(("127.0.0.1", 0)) as hung,
                pytest.raises(ConnectionLost, match=r"no answer within 0\.5 s"),
            ):
                async with writer.pipe(exported, hung.getsockname()[1]):
                    pytest.fail("connected to nobody")

    run(story())


def test_there_are_no_more_peers_and_connections_than_allowed() -> None:
    async def story() -> None:
        options = Options(max_peers=1, max_connections=2)
        async with exporting(options) as exported:
            async with writing(Options(connections=3)) as writer:
                with pytest.raises(Refused, match="2 connections to d, its limit"):
                    async with writer.pipe(exported):
                        pytest.fail("connected")
            await until(lambda: not exported._receiver._links)
            async with writing(Options(connections=2)) as writer, writer.pipe(exported):
                with pytest.raises(Refused, match="1 writers connected, its limit"):
                    async with writer.transport.connect(exported.offer, writer.source, "q:1", "r", lambda: None):
                        pytest.fail("connected")

    run(story())


class RawPeer:
    """A peer that knows the token and says what it likes."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self._sock, data)

    async def read_reply(self) -> tuple[int, int, int]:
        kind, session, number = REPLY.unpack(await self.read_bytes(REPLY.size))
        return kind, session, number

    async def read_reason(self) -> str:
        kind, _, length = await self.read_reply()
        assert kind == GOODBYE
        return (await self.read_bytes(length)).decode()

    async def read_bytes(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            piece = await asyncio.get_running_loop().sock_recv(self._sock, length - len(data))
            assert piece, "it ended"
            data += piece
        return bytes(data)


@asynccontextmanager
async def raw_peer(exported: Exported) -> AsyncIterator[RawPeer]:
    """With session 1 open."""
    with await sockets.dial(exported.offer.address) as sock:
        await auth.join(sock, TOKEN, tcp_frames.PURPOSE, "d")
        await tcp_frames.say_hello(sock, Hello(exported.offer, WRITER, clock.nonce(16), has_checksums=False))
        peer = RawPeer(sock)
        name = tcp_frames.digest((b"r",))
        await peer.send(HEAD.pack(OPEN, 1, name, 0))
        assert await peer.read_reply() == (OPENED, 1, name)
        yield peer


SIZE = BLOCKS * LAYOUT.block_bytes
BAD = {
    "beyond the end": (HEAD.pack(DATA, 1, 1, 1) + RANGE.pack(SIZE - 1, 2), "not in a region of"),
    "far beyond": (HEAD.pack(DATA, 1, 1, 1) + RANGE.pack(2**64 - 1, 1), "not in a region of"),
    "huge": (HEAD.pack(DATA, 1, 1, 1) + RANGE.pack(0, 2**64 - 1), "not in a region of"),
    "second of two": (HEAD.pack(DATA, 1, 1, 2) + RANGE.pack(0, 8) + RANGE.pack(SIZE, 8), "not in a region of"),
    "empty": (HEAD.pack(DATA, 1, 1, 1) + RANGE.pack(0, 0), "not in a region of"),
    "no ranges": (HEAD.pack(DATA, 1, 1, 0), "has 0 ranges"),
    "many ranges": (HEAD.pack(DATA, 1, 1, 100_000), "has 100000 ranges"),
    "long frame": (HEAD.pack(DATA, 1, 1, 1) + RANGE.pack(0, SIZE), "bytes; the limit"),
    "unknown kind": (HEAD.pack(77, 1, 1, 0), "no frames of kind 77"),
    "fetched beyond the end": (HEAD.pack(FETCH, 1, 1, 1) + RANGE.pack(SIZE - 1, 2), "not in a region of"),
    "fetched in one": (HEAD.pack(FETCH, 1, 1, 1) + RANGE.pack(0, SIZE), "bytes; the limit"),
    "opened twice": (HEAD.pack(OPEN, 1, 0, 0), "opened twice"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_peer_is_cut_with_a_reason_and_writes_nothing(name: str, caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        frame, complaint = BAD[name]
        async with exporting() as exported, raw_peer(exported) as peer:
            await peer.send(frame + b"\7" * 1000)
            assert complaint in await peer.read_reason()
            await exported.fence(WRITER, "r")
            assert is_untouched(exported)

    run(story())
    assert "broke the protocol" in caplog.text


def test_what_comes_for_a_closed_session_is_thrown_away() -> None:
    async def story() -> None:
        async with exporting() as exported, raw_peer(exported) as peer:
            size = 3 << 20
            frame = HEAD.pack(DATA, 1, 5, 1) + RANGE.pack(0, size) + b"\7" * size
            await peer.send(HEAD.pack(CLOSE, 1, 0, 0) + frame)
            assert await peer.read_reply() == (DROPPED, 1, 5)
            assert is_untouched(exported)

    run(story())


def test_more_sessions_than_allowed_cut_the_peer(caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        async with exporting(Options(max_pipes=1)) as exported, raw_peer(exported) as peer:
            await peer.send(HEAD.pack(OPEN, 2, 0, 0))
            assert "1 sessions are open, the limit" in await peer.read_reason()

    run(story())


MIB = 1 << 20
ASKED = 100  # MiB, more than the kernels on the way take


async def ask_for_much(exported: _Export, peer: RawPeer) -> None:
    """Returns when much of it waits at the owner, which takes no more."""
    for number in range(ASKED):
        await peer.send(HEAD.pack(FETCH, 1, number, 1) + RANGE.pack(number % 32 * MIB, MIB))
    lane = link_of(exported).lanes[0]
    await until(lambda: len(lane._fetches) == MAX_WAITING and not lane._inlet._is_open)


def test_a_peer_that_reads_no_answers_is_not_read_from_either() -> None:
    async def story() -> None:
        async with exporting() as exported, raw_peer(exported) as peer:
            await ask_for_much(exported, peer)
            for number in range(ASKED):
                assert await peer.read_reply() == (PAYLOAD, 1, number)
                assert await peer.read_bytes(MIB) == bytes(MIB)
                assert await peer.read_reply() == (FETCHED, 1, 0)

    run(story())


def test_what_was_asked_for_is_not_sent_once_it_was_fenced_off() -> None:
    async def story() -> None:
        async with exporting() as exported, raw_peer(exported) as peer:
            await ask_for_much(exported, peer)
            await exported.fence(WRITER, "r")
            buffer_of(exported)[:] = b"\x09" * len(buffer_of(exported))  # for somebody else
            kinds = []
            while kinds.count(FETCHED) + kinds.count(DROPPED) < ASKED:
                kind, _, _ = await peer.read_reply()
                kinds.append(kind)
                if kind == PAYLOAD:  # the rest of it is blank if it is dropped, not what somebody else has there
                    assert await peer.read_bytes(MIB) == bytes(MIB)
            assert kinds.count(DROPPED) >= MAX_WAITING

    run(story())


@pytest.mark.parametrize("message", [b"\xff\xff\xff\x7f", b"\x03\0\0\0abc"], ids=["long", "not understood"])
def test_a_first_message_that_is_none_is_turned_away(message: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        async with exporting() as exported:
            with await sockets.dial(exported.offer.address) as sock:
                await auth.join(sock, TOKEN, tcp_frames.PURPOSE, "d")
                await asyncio.get_running_loop().sock_sendall(sock, message)
                assert await asyncio.get_running_loop().sock_recv(sock, 100) == b""

    run(story())
    assert "its first message" in caplog.text


def test_another_incarnation_at_the_same_address_is_stale() -> None:
    async def story() -> None:
        async with exporting() as exported, writing() as writer:
            offer = msgspec.structs.replace(exported.offer, epoch=2)
            with pytest.raises(StaleEpoch, match="in epoch 2, here is d in epoch 1"):
                async with writer.transport.connect(offer, writer.source, WRITER, "r", lambda: None):
                    pytest.fail("connected to another incarnation")

    run(story())


# Owners that are not to be believed

WRITE_NUMBER, READ_NUMBER = 2, 3  # 1 is the session's
BAD_ANSWERS = {
    "placed, though not sent": REPLY.pack(PLACED, 1, 99),
    "placed, though to be read": REPLY.pack(PLACED, 1, READ_NUMBER),
    "dropped, though not sent": REPLY.pack(DROPPED, 1, 99),
    "not asked for": REPLY.pack(PAYLOAD, 1, 99) + b"\x09" * 1000,
    "asked to be written": REPLY.pack(PAYLOAD, 1, WRITE_NUMBER) + b"\x09" * 1000,
    "fetched without a payload": REPLY.pack(FETCHED, 1, 0),
    "no reason": REPLY.pack(GOODBYE, 0, 0),
    "a long reason": REPLY.pack(GOODBYE, 0, 1 << 40),
    "unknown kind": REPLY.pack(77, 1, READ_NUMBER),
}


@asynccontextmanager
async def raw_owner(answer: bytes) -> AsyncIterator[int]:
    """The port of one that lets everybody open a pipe, and answers what is sent next with this."""

    async def serve(sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        await tcp_frames.read_hello(sock)
        await tcp_frames.answer_hello(sock, None)
        await loop.sock_recv(sock, HEAD.size)
        await loop.sock_sendall(sock, REPLY.pack(OPENED, 1, 0))
        await loop.sock_recv(sock, HEAD.size)
        await loop.sock_sendall(sock, answer)
        while await loop.sock_recv(sock, MIB):
            pass

    with sockets.new_socket(socket.AF_INET) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        async with auth.admitting(listener, TOKEN, tcp_frames.PURPOSE, serve):
            yield listener.getsockname()[1]


@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_an_answer_that_makes_no_sense_ends_the_link_and_is_stored_nowhere(name: str) -> None:
    async def story() -> None:
        async with (
            exporting() as exported,
            writing(replace(QUICK, connections=1, stalled_s=5.0)) as writer,
            raw_owner(BAD_ANSWERS[name]) as port,
            writer.pipe(exported, port) as pipe,
        ):
            pipe.write(EVERYTHING[:1])
            pipe.read(EVERYTHING[:1])
            with pytest.raises(ConnectionLost, match="was not asked for, or in disorder"):
                await pipe.flush()
            assert writer.source.buffer == b"\7" * SIZE

    run(story())


# What is left


def test_nothing_is_left_behind() -> None:
    async def story() -> None:
        before = traces()
        for _ in range(3):
            async with exporting() as exported, writing(QUICK) as writer, network_to(exported) as network:
                async with writer.pipe(exported) as pipe:
                    pipe.write(EVERYTHING)
                    await pipe.flush()
                async with writer.pipe(exported) as pipe:
                    pipe.write(EVERYTHING)
                async with writer.pipe(exported, network.port) as pipe:
                    pipe.write(EVERYTHING)
                    network.cut()
                with pytest.raises(ZeroDivisionError):
                    async with writer.pipe(exported):
                        raise ZeroDivisionError
                with pytest.raises(PenstockError):
                    async with writer.pipe(exported, port=1):
                        pytest.fail("connected to nobody")
        assert traces() == before

    run(story())


def test_a_broken_link_is_not_kept() -> None:
    async def story() -> None:
        async with exporting(blocks=1) as exported, writing(blocks=1) as writer, network_to(exported) as network:
            async with writer.pipe(exported, network.port):
                pass
            network.cut()
            await until(lambda: all(peer.is_idle for peer in writer.transport._peers.values()))
            async with writer.pipe(exported):
                assert len(writer.transport._peers) == 1

    run(story())


# How much is said to have moved


class StandIn:
    """A peer, and a link of it, for a session whose frames the test takes and answers for itself."""

    def __init__(self, offer: Offer) -> None:
        self.offer = offer
        self.error = None

    async def link(self) -> StandIn:
        return self

    def register(self, session: Session) -> int:
        return 1

    def say(self, *_: object, **__: object) -> None:
        pass

    def send(self, session: Session) -> None:
        pass

    async def wait(self, event: asyncio.Event) -> None:
        pass


def test_blocks_count_from_the_first_on_whichever_frame_is_answered_for_first() -> None:
    async def story() -> None:
        told: list[int] = []
        stand_in = StandIn(Offer("tcp", "d", 1, "", LAYOUT, BLOCKS))
        session = Session(stand_in, memoryview(bytearray(SIZE)), "r", lambda: told.append(session.moved.blocks))  # type: ignore[arg-type]
        await session.open()
        session.move(EVERYTHING[:4], is_read=False)
        session.move(EVERYTHING[20:22], is_read=True)
        session.move(EVERYTHING[4:9], is_read=False)
        frames = []
        while session.has_more:
            frames.append(session.next_frame(len(frames), 2 * LAYOUT.block_bytes))
        assert [(frame.is_read, frame.size // LAYOUT.block_bytes) for frame in frames] == [
            *[(False, 2), (False, 2), (True, 2), (False, 2), (False, 2), (False, 1)]
        ]
        for number in (3, 2, 0, 1, 5, 4):
            session.on_placed(frames[number])
        assert told == [0, 0, 2, 6, 6, 9]
        assert session.moved.size_bytes == 11 * LAYOUT.block_bytes

    run(story())


def test_blocks_larger_than_frames_count_when_they_are_whole() -> None:
    async def story() -> None:
        stand_in = StandIn(Offer("tcp", "d", 1, "", LAYOUT, BLOCKS))
        session = Session(stand_in, memoryview(bytearray(SIZE)), "r", lambda: None)  # type: ignore[arg-type]
        await session.open()
        session.move(EVERYTHING[:2], is_read=False)
        counts = []
        while session.has_more:
            session.on_placed(session.next_frame(len(counts), LAYOUT.block_bytes // 3))
            counts.append(session.moved.blocks)
        assert counts == [0, 0, 0, 1, 1, 1, 1, 2]

    run(story())


def test_of_calls_on_the_loop_no_more_than_one_is_due() -> None:
    async def story() -> None:
        told: list[None] = []
        ask = on_loop(lambda: told.append(None))
        for calls in (1, 2):
            asking = threading.Thread(target=lambda: [ask() for _ in range(5)])
            asking.start()
            asking.join()
            await until(lambda calls=calls: len(told) == calls)
        await asyncio.sleep(0)
        assert len(told) == 2

    run(story())


# How blocks are cut into runs


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=30),
    st.integers(1, 7),
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 4)), min_size=1),
)
def test_runs_cover_all_blocks_in_order(
    blocks: list[tuple[int, int]], block_bytes: int, limits: list[tuple[int, int]]
) -> None:
    backlog = Backlog(block_bytes)
    backlog.add([(BlockId(here), BlockId(there)) for here, there in blocks])
    taken: list[Run] = []
    turn = 0
    while backlog:
        limit_bytes, max_runs = limits[turn % len(limits)]
        runs = backlog.take(limit_bytes, max_runs)
        assert 0 < len(runs) <= max_runs
        assert 0 < sum(run.size for run in runs) <= limit_bytes
        taken += runs
        turn += 1
    moved = [(run.here + at, run.there + at) for run in taken for at in range(run.size)]
    assert moved == [
        (here * block_bytes + at, there * block_bytes + at) for here, there in blocks for at in range(block_bytes)
    ]


def test_neighbours_are_one_run() -> None:
    backlog = Backlog(10)
    backlog.add([(BlockId(here), BlockId(there)) for here, there in ((1, 5), (2, 6), (3, 7), (4, 9), (0, 0))])
    assert backlog.take(1000, 10) == [Run(10, 50, 30), Run(40, 90, 10), Run(0, 0, 10)]
    assert not backlog and backlog.take(1000, 10) == []
