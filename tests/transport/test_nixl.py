"""What is particular to NIXL: other processes, their deaths, and what they have on its way. `make test-nixl` installs
it and runs this. Each way that UCX has on one host is tried: CMA copies between processes, TCP goes by their kernel.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from importlib.util import find_spec
from pathlib import Path

import msgspec
import pytest

from penstock import auth
from penstock.blocks import BlockId, KvLayout, Region
from penstock.errors import ConnectionLost, KvError, MissingExtra, Refused
from penstock.transport import nixl, nixl_owner, sockets
from penstock.transport.api import Exported, Pipe
from penstock.transport.host_memory import new_region
from penstock.transport.nixl import NixlTransport, Options
from tests.support import run
from tests.transport.peers import TOKEN, WRITER, peer_of

LAYOUT = KvLayout(layers=4, kv_heads=2, head_dim=32, block_tokens=16, dtype="float32")
BLOCKS = 1024  # 32 MiB
EVERYTHING = [(BlockId(number), BlockId(number)) for number in range(BLOCKS)]
BACKWARDS = [(BlockId(number), BlockId(BLOCKS - 1 - number)) for number in range(BLOCKS)]
RARELY = Options(progress_s=0.02)  # an owner so busy that much is waiting in its kernel

is_installed = find_spec("nixl") is not None
needs_nixl = pytest.mark.skipif(not is_installed, reason="NIXL is not installed: make test-nixl")


@pytest.fixture(params=["all", "tcp"], ids=["cma", "tcp"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of UCX, here and in child processes."""
    way: str = request.param
    monkeypatch.setenv("UCX_TLS", way)
    return way


@pytest.fixture
def over_tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp")


@asynccontextmanager
async def exporting(options: Options = Options()) -> AsyncIterator[Exported]:
    async with (
        NixlTransport(TOKEN, options) as transport,
        new_region("d", 1, LAYOUT, BLOCKS) as region,
        transport.export(region) as exported,
    ):
        yield exported


@asynccontextmanager
async def piped(exported: Exported, options: Options = Options()) -> AsyncIterator[tuple[Pipe, memoryview]]:
    """A pipe of this process, and the memory that it moves from and to."""
    async with (
        NixlTransport(TOKEN, options) as transport,
        new_region("p", 1, LAYOUT, BLOCKS) as source,
        transport.connect(exported.offer, source, WRITER, "r", lambda: None) as pipe,
    ):
        yield pipe, memory_of(source)


def memory_of(region: Region) -> memoryview:
    assert region.buffer is not None
    return region.buffer


def buffer_of(exported: Exported) -> memoryview:
    return memory_of(exported.region)


def is_full_of(buffer: memoryview, byte: int) -> bool:
    return buffer == bytes([byte]) * len(buffer)


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


async def assert_pending(waiting: asyncio.Task[None]) -> None:
    await asyncio.wait((waiting,), timeout=0.2)
    assert not waiting.done()


async def assert_nothing_arrives(exported: Exported) -> None:
    """The owner looks after what arrives meanwhile, many times."""
    buffer = buffer_of(exported)
    buffer[:] = bytes(len(buffer))
    async with piped(exported):  # so that it has a writer
        await asyncio.sleep(0.2)
    assert is_full_of(buffer, 0)


@contextmanager
def frozen(exported: Exported) -> Iterator[None]:
    """The owner's thread does nothing inside the block, as if its process were stopped."""
    is_over = threading.Event()
    exported._io.call(is_over.wait)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        is_over.set()


@pytest.mark.skipif(is_installed, reason="NIXL is installed")
def test_without_the_package_it_says_what_to_install() -> None:
    async def story() -> None:
        with pytest.raises(MissingExtra, match="pip install --no-deps nixl"):
            async with NixlTransport(TOKEN):
                pytest.fail("opened")

    run(story())


# Moving


@needs_nixl
def test_another_process_writes_everything(way: str) -> None:
    async def story() -> None:
        async with exporting() as exported, peer_of(exported) as peer:
            assert await peer.ask("write") == "done"
            assert await peer.ask("flush") == "done"
            assert is_full_of(buffer_of(exported), 7)
            waiting = asyncio.create_task(exported.fence(WRITER, "r"))
            await assert_pending(waiting)
            assert await peer.ask("leave") == "left"
            await waiting

    run(story())


@needs_nixl
@pytest.mark.parametrize("pairs", [EVERYTHING, BACKWARDS], ids=["runs", "blocks"])
def test_writes_and_reads_of_runs_and_of_single_blocks(way: str, pairs: list[tuple[BlockId, BlockId]]) -> None:
    async def story() -> None:
        async with exporting() as exported, piped(exported) as (pipe, here):
            size, there = LAYOUT.block_bytes, buffer_of(exported)
            for number in range(BLOCKS):
                here[number * size : (number + 1) * size] = bytes([number % 251]) * size
            pipe.write(pairs)
            await pipe.flush()
            for mine, theirs in pairs:
                assert there[theirs * size : (theirs + 1) * size] == here[mine * size : (mine + 1) * size]
            written = bytes(here)
            here[:] = bytes(len(here))
            pipe.read(pairs)
            await pipe.flush()
            assert here == written
            assert (pipe.moved.blocks, pipe.moved.size_bytes) == (BLOCKS, 2 * len(here))

    run(story())


@needs_nixl
def test_a_block_longer_than_an_operation_goes_in_parts(way: str) -> None:
    layout = msgspec.structs.replace(LAYOUT, layers=2304)  # 18 MiB

    async def story() -> None:
        async with (
            NixlTransport(TOKEN) as transport,
            new_region("d", 1, layout, 2) as region,
            transport.export(region) as exported,
            new_region("p", 1, layout, 2) as source,
            transport.connect(exported.offer, source, WRITER, "r", lambda: None) as pipe,
        ):
            memory_of(source)[:] = bytes(range(256)) * (len(memory_of(source)) // 256)
            pipe.write([(BlockId(0), BlockId(1)), (BlockId(1), BlockId(0))])
            await pipe.flush()
            size = layout.block_bytes
            assert memory_of(region)[size:] == memory_of(source)[:size]
            assert memory_of(region)[:size] == memory_of(source)[size:]
            assert pipe.moved.blocks == 2

    run(story())


@needs_nixl
def test_blocks_that_do_not_exist_are_refused() -> None:
    async def story() -> None:
        async with exporting() as exported, piped(exported) as (pipe, _):
            for pair in ((BLOCKS, 0), (0, BLOCKS), (-1, 0), (0, -1)):
                with pytest.raises(KvError, match="there is no block"):
                    pipe.write([(BlockId(0), BlockId(0)), (BlockId(pair[0]), BlockId(pair[1]))])
                with pytest.raises(KvError, match="there is no block"):
                    pipe.read([(BlockId(pair[0]), BlockId(pair[1]))])
            await pipe.flush()
            assert pipe.moved.blocks == 0

    run(story())


@needs_nixl
def test_a_pipe_outlives_another_region_of_its_owner() -> None:
    async def story() -> None:
        async with (
            NixlTransport(TOKEN) as transport,
            new_region("d", 1, LAYOUT, BLOCKS) as first,
            new_region("e", 1, LAYOUT, BLOCKS) as second,
            new_region("p", 1, LAYOUT, BLOCKS) as source,
            transport.export(first) as one,
            transport.connect(one.offer, source, WRITER, "r", lambda: None) as pipe,
        ):
            memory_of(source)[:] = b"\5" * len(memory_of(source))
            async with (
                transport.export(second) as other,
                transport.connect(other.offer, source, WRITER, "s", lambda: None) as briefly,
                transport.connect(one.offer, source, WRITER, "t", lambda: None),
            ):
                briefly.write(EVERYTHING)
                await briefly.flush()
            pipe.write(EVERYTHING)
            await pipe.flush()
            assert is_full_of(memory_of(first), 5) and is_full_of(memory_of(second), 5)

    run(story())


# Who is gone


@needs_nixl
def test_nothing_of_a_killed_writer_arrives_after_the_fence(way: str) -> None:
    async def story() -> None:
        async with exporting(RARELY) as exported, peer_of(exported) as peer:
            peer.tell("stream")
            await until(lambda: buffer_of(exported)[0] == 7)
            waiting = asyncio.create_task(exported.fence(WRITER, "r"))
            peer.process.kill()
            await waiting
            await assert_nothing_arrives(exported)

    run(story())


@needs_nixl
def test_a_stopped_writer_is_waited_for_until_it_is_killed(way: str) -> None:
    async def story() -> None:
        async with exporting(RARELY) as exported, peer_of(exported) as peer:
            peer.tell("stream")
            await until(lambda: buffer_of(exported)[0] == 7)
            peer.process.send_signal(signal.SIGSTOP)
            waiting = asyncio.create_task(exported.fence(WRITER, "r"))
            await assert_pending(waiting)
            exported.kill(WRITER)
            await waiting
            assert await peer.process.wait() == -signal.SIGKILL
            await assert_nothing_arrives(exported)

    run(story())


@needs_nixl
def test_a_frozen_writer_of_another_host_is_cut_off_alive(over_tcp: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl_owner, "_this_host", lambda: f"not that of {os.getpid()}")

    async def story() -> None:
        async with exporting(RARELY) as exported:
            async with peer_of(exported) as peer, peer_of(exported, "q:1") as other:
                peer.tell("stream")
                await until(lambda: buffer_of(exported)[0] == 7)
                peer.process.send_signal(signal.SIGSTOP)
                waiting = asyncio.create_task(exported.fence(WRITER, "r"))
                await assert_pending(waiting)
                exported.kill(WRITER)
                await waiting
                monkeypatch.undo()
                await assert_nothing_arrives(exported)
                peer.process.send_signal(signal.SIGCONT)
                assert await peer.read() == "ConnectionLost"
                assert await other.ask("stream") == "ConnectionLost"  # all writers lose that way
                await assert_nothing_arrives(exported)
            async with peer_of(exported) as peer:  # it is let in again
                assert [await peer.ask("write"), await peer.ask("flush")] == ["done", "done"]
                assert is_full_of(buffer_of(exported), 7)

    run(story())


@needs_nixl
def test_who_closes_its_connection_without_a_word_is_gone_when_it_dies() -> None:
    async def story() -> None:
        async with exporting() as exported:
            child = await asyncio.create_subprocess_exec("sleep", "60")
            process = nixl_owner.Process(nixl_owner._this_host(), child.pid, nixl_owner._started(child.pid))
            with await sockets.dial(exported.offer.address) as sock:
                await auth.join(sock, TOKEN, nixl_owner.PURPOSE, "d")
                hello = nixl_owner.Hello(exported.offer, WRITER, "r", process)
                await sockets.send_message(sock, nixl_owner.encode(hello))
                await sockets.read_message(sock)
            waiting = asyncio.create_task(exported.fence(WRITER, "r"))
            await assert_pending(waiting)
            child.kill()
            await waiting
            await child.wait()

    run(story())


@needs_nixl
def test_an_owner_that_leaves_stops_its_writers_first(way: str) -> None:
    async def story() -> None:
        async with (
            NixlTransport(TOKEN) as transport,
            new_region("d", 1, LAYOUT, BLOCKS) as region,
            AsyncExitStack() as stack,
        ):
            async with transport.export(region) as exported:
                peer = await stack.enter_async_context(peer_of(exported))
                peer.tell("stream")
                await until(lambda: buffer_of(exported)[0] == 7)
            memory_of(region)[:] = bytes(len(memory_of(region)))
            assert await peer.read() == "ConnectionLost"
            assert is_full_of(memory_of(region), 0)

    run(story())


@needs_nixl
def test_an_owner_that_leaves_does_not_wait_long_for_a_frozen_writer(caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        async with AsyncExitStack() as stack:
            async with exporting(Options(hello_s=2)) as exported:
                peer = await stack.enter_async_context(peer_of(exported))
                peer.process.send_signal(signal.SIGSTOP)
                waiting = asyncio.create_task(exported.fence(WRITER, "r"))
                await assert_pending(waiting)
            with pytest.raises(asyncio.CancelledError):  # that is no answer
                await waiting

    run(story())
    assert "a writer did not stop as d withdrew its region" in caplog.text


# Who is stuck


@needs_nixl
@pytest.mark.parametrize("is_read", [False, True], ids=["write", "read"])
def test_a_transfer_that_stalls_is_given_up_and_touches_nothing_more(over_tcp: None, is_read: bool) -> None:
    async def story() -> None:
        async with exporting() as exported:
            async with piped(exported, Options(stalled_s=0.1)) as (pipe, here):
                buffer_of(exported)[:] = b"\3" * len(here)
                with frozen(exported):
                    (pipe.read if is_read else pipe.write)(EVERYTHING)
                    with pytest.raises(ConnectionLost, match="came to a halt"):
                        await pipe.flush()
                    here[:] = b"\4" * len(here)
                await exported.fence(WRITER, "r")  # it said that it lost the transfer
                assert is_full_of(here, 4)
            await assert_nothing_arrives(exported)

    run(story())


@needs_nixl
def test_the_agent_of_a_transfer_that_stalled_has_a_successor(over_tcp: None) -> None:
    async def story() -> None:
        async with (
            exporting() as exported,
            exporting() as other,
            NixlTransport(TOKEN, Options(stalled_s=0.1)) as transport,
            new_region("p", 1, LAYOUT, BLOCKS) as source,
        ):
            memory_of(source)[:] = b"\6" * len(memory_of(source))
            async with transport.connect(exported.offer, source, WRITER, "r", lambda: None) as pipe:
                with frozen(exported):
                    pipe.write(EVERYTHING)
                    with pytest.raises(ConnectionLost):
                        await pipe.flush()
                    async with transport.connect(other.offer, source, WRITER, "s", lambda: None) as second:
                        second.write(EVERYTHING)
                        await second.flush()
                        assert is_full_of(buffer_of(other), 6)
            async with transport.connect(exported.offer, source, WRITER, "t", lambda: None) as pipe:
                pipe.write(BACKWARDS)
                await pipe.flush()
                assert is_full_of(buffer_of(exported), 6)

    run(story())


# Who is let in


@needs_nixl
def test_a_wrong_token_is_refused() -> None:
    async def story() -> None:
        async with (
            exporting() as exported,
            NixlTransport("a guess") as transport,
            new_region("p", 1, LAYOUT, BLOCKS) as source,
        ):
            with pytest.raises(Refused, match="another token"):
                async with transport.connect(exported.offer, source, WRITER, "r", lambda: None):
                    pytest.fail("connected")

    run(story())


@needs_nixl
def test_a_process_id_that_was_used_again_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    earlier = msgspec.structs.replace(nixl_owner.this_process(), started=1)
    monkeypatch.setattr(nixl, "this_process", lambda: earlier)

    async def story() -> None:
        async with exporting() as exported:
            with pytest.raises(Refused, match="is not the one that asks"):
                async with piped(exported):
                    pytest.fail("connected")
            await exported.fence(WRITER, "r")

    run(story())


@needs_nixl
def test_a_process_that_could_not_be_killed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_ours(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(signal, "pidfd_send_signal", not_ours)

    async def story() -> None:
        async with exporting() as exported:
            with pytest.raises(Refused, match="another user's"):
                async with piped(exported):
                    pytest.fail("connected")

    run(story())


@needs_nixl
def test_an_owner_that_hangs_is_given_up_on() -> None:
    async def story() -> None:
        async with exporting() as exported:
            with frozen(exported), pytest.raises(ConnectionLost, match=r"no answer within 0\.1 s"):
                async with piped(exported, Options(hello_s=0.1)):
                    pytest.fail("connected")

    run(story())


# What is left


@needs_nixl
def test_threads_and_descriptors_are_gone_with_the_transport(way: str) -> None:
    def traces() -> tuple[int, list[str]]:
        gc.collect()
        return len(list(Path("/proc/self/fd").iterdir())), sorted(thread.name for thread in threading.enumerate())

    async def story() -> None:
        async with exporting() as exported, piped(exported) as (pipe, _):
            pipe.write(EVERYTHING)
            await pipe.flush()

    async def revoked() -> None:
        async with exporting() as exported, peer_of(exported) as peer:
            peer.tell("stream")
            await until(lambda: buffer_of(exported)[0] == 7)
            peer.process.kill()
            await exported.fence(WRITER, "r")

    run(story())  # what UCX keeps for the process is made now
    before = traces()
    run(story())
    run(revoked())
    assert traces() == before
