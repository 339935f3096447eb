"""What is particular to shared memory: other processes, their deaths, and what is left behind."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import uvloop

from penstock import auth
from penstock.blocks import KvLayout
from penstock.errors import ConnectionLost, KvError, Refused, SetupError
from penstock.transport import host_memory, shm
from penstock.transport.api import Exported
from penstock.transport.host_memory import new_region
from penstock.transport.shm import ShmTransport
from tests.support import errors_of_loop, run

TOKEN = "token"
WRITER = "p:1"
LAYOUT = KvLayout(layers=4, kv_heads=2, head_dim=32, block_tokens=16, dtype="float32")
BLOCKS = 1024  # 32 MiB
PAGES = BLOCKS * LAYOUT.block_bytes // 4096

LoopFactory = Callable[[], asyncio.AbstractEventLoop] | None
LOOPS = pytest.mark.parametrize("loop_factory", [None, uvloop.new_event_loop], ids=["asyncio", "uvloop"])


class PeerProcess:
    """tests.transport.peer, and how to tell it what to do."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def ask(self, command: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(command.encode() + b"\n")
        return await self.read()

    async def read(self) -> str:
        assert self.process.stdout is not None
        return (await self.process.stdout.readline()).decode().strip()


@asynccontextmanager
async def exporting(blocks: int = BLOCKS) -> AsyncIterator[Exported]:
    async with new_region("d", 1, LAYOUT, blocks) as region, ShmTransport(TOKEN).export(region) as exported:
        yield exported


@asynccontextmanager
async def peer_of(exported: Exported, writer: str = WRITER) -> AsyncIterator[PeerProcess]:
    """A child process that has attached; killed at the end."""
    offer = msgspec.msgpack.encode(exported.offer).hex()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.transport.peer", offer, TOKEN, writer),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        peer = PeerProcess(process)
        assert await peer.read() == "attached"
        yield peer
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


def buffer_of(exported: Exported) -> memoryview:
    assert exported.region.buffer is not None
    return exported.region.buffer


async def assert_pending(task: asyncio.Task[None]) -> None:
    """It still waits, after the loop had time to tell it everything that has happened."""
    await asyncio.wait((task,), timeout=0.05)
    assert not task.done()


def traces() -> list[list[str]]:
    """What this process, and the host as far as it is visible, has of regions."""
    gc.collect()
    descriptors = [str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return [
        sorted(path.name for path in Path("/dev/shm").iterdir()),
        [line for line in Path("/proc/net/unix").read_text().splitlines() if "@penstock-kv" in line],
        [line for line in Path("/proc/self/maps").read_text().splitlines() if "penstock-kv" in line],
        sorted(name for name in descriptors if "penstock-kv" in name or "pidfd" in name),
    ]


# One memory


def test_another_process_computes_in_place() -> None:
    async def story() -> None:
        async with exporting() as exported, peer_of(exported) as peer:
            buffer = buffer_of(exported)
            assert await peer.ask("write 12345 77") == "wrote"
            assert buffer[12345] == 77
            buffer[len(buffer) - 1] = 78
            assert await peer.ask(f"read {len(buffer) - 1}") == "78"

    run(story())


def test_the_first_touch_has_happened_on_both_sides() -> None:
    async def story() -> None:
        async with exporting() as exported, peer_of(exported) as peer:
            buffer = buffer_of(exported)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            buffer[::4096] = bytes(PAGES)
            assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < PAGES / 50
            assert int(await peer.ask("faults")) < PAGES / 50

    run(story())


def test_it_is_faulted_in_on_older_kernels_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "_MADV_POPULATE_READ", 9999)

    async def story() -> None:
        async with exporting() as exported:
            buffer = buffer_of(exported)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            buffer[::4096] = bytes(PAGES)
            assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < PAGES / 50

    run(story())


def test_the_loop_turns_while_memory_is_faulted_in() -> None:
    async def story() -> None:
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        counting = asyncio.create_task(count())
        async with exporting(2 * BLOCKS):
            counting.cancel()
        assert turns >= 2 * BLOCKS * LAYOUT.block_bytes // host_memory.FAULT_IN_BYTES

    run(story())


def test_nobody_can_shrink_a_region() -> None:
    async def story() -> None:
        async with exporting() as exported:
            descriptor = exported._descriptor  # type: ignore[attr-defined]
            for size in (0, 2 * len(buffer_of(exported))):
                with pytest.raises(PermissionError):
                    os.ftruncate(descriptor, size)

    run(story())


def test_a_child_of_a_writer_is_no_writer() -> None:
    async def story() -> None:
        async with exporting() as exported, peer_of(exported) as peer:
            assert await peer.ask("maps") == "1"
            assert await peer.ask("maps-of-a-child") == "0"

    run(story())


def test_more_memory_than_there_is_is_a_setup_error() -> None:
    async def story() -> None:
        with pytest.raises(SetupError, match="GiB of KV"):
            async with exporting(blocks=1 << 32):
                pytest.fail("mapped")

    run(story())


def test_a_region_in_use_is_not_unmapped_and_its_writer_not_gone() -> None:
    async def story() -> None:
        async with exporting() as exported:
            with pytest.raises(KvError, match="still in use"):
                async with ShmTransport(TOKEN).attach(exported.offer, WRITER) as attached:
                    assert attached.region.buffer is not None
                    kept = attached.region.buffer[:10]
            kept[0] = 1
            assert buffer_of(exported)[0] == 1
            waiting = asyncio.create_task(exported.fence(WRITER, "r"))
            await assert_pending(waiting)
            waiting.cancel()
            kept.release()

    run(story())


def test_an_owner_that_still_uses_its_region_is_told() -> None:
    async def story() -> None:
        with pytest.raises(KvError, match="still in use"):
            async with exporting() as exported:
                kept = buffer_of(exported)[:10]
        kept.release()

    run(story())


# Who is gone


@LOOPS
def test_a_detached_process_is_gone_though_it_lives(loop_factory: LoopFactory) -> None:
    async def story() -> None:
        async with exporting() as exported, peer_of(exported) as peer:
            assert await peer.ask("detach") == "detached"
            await exported.fence(WRITER, "r")
            assert peer.process.returncode is None

    run(story(), loop_factory=loop_factory)


@LOOPS
def test_a_killed_process_is_gone(loop_factory: LoopFactory) -> None:
    async def story() -> None:
        async with exporting() as exported, peer_of(exported) as peer:
            waiting = asyncio.create_task(exported.fence(WRITER, "r"))
            await assert_pending(waiting)
            peer.process.kill()
            await waiting

    run(story(), loop_factory=loop_factory)


@LOOPS
def test_a_process_that_only_closed_its_socket_is_not_gone_until_it_dies(loop_factory: LoopFactory) -> None:
    async def story() -> None:
        async with exporting() as exported, peer_of(exported) as peer:
            assert await peer.ask("close-socket") == "closed"
            waiting = asyncio.create_task(exported.fence(WRITER, "r"))
            await assert_pending(waiting)
            assert await peer.ask("write 5 6") == "wrote"  # it can still do that, which is why
            assert buffer_of(exported)[5] == 6
            peer.process.kill()
            await waiting

    run(story(), loop_factory=loop_factory)


@LOOPS
def test_a_stopped_process_can_be_killed(loop_factory: LoopFactory) -> None:
    async def story() -> None:
        async with exporting() as exported, peer_of(exported) as peer, peer_of(exported, "q:1") as other:
            assert await peer.ask("stop") == "stopping"
            exported.kill(WRITER)
            await exported.fence(WRITER, "r")
            assert await peer.process.wait() == -signal.SIGKILL
            exported.kill(WRITER)
            assert await other.ask("read 0") == "0"

    run(story(), loop_factory=loop_factory)


@LOOPS
def test_an_attach_given_up_halfway_leaves_no_writer(loop_factory: LoopFactory) -> None:
    async def story() -> None:
        async with exporting() as exported:
            # As ShmTransport.attach does when it is cancelled between the question and the answer.
            with shm._packet_socket() as sock:
                await ShmTransport(TOKEN)._join(sock, exported.offer)
                sock.send(shm._encode(shm._Ask(exported.offer, WRITER)))
                await auth.wait_readable(sock)
                waiting = asyncio.create_task(exported.fence(WRITER, "r"))
                await assert_pending(waiting)
                shm._say_unmapped(sock)
            await waiting

    run(story(), loop_factory=loop_factory)


@LOOPS
def test_an_attach_cancelled_anywhere_leaves_no_writer(loop_factory: LoopFactory) -> None:
    async def story() -> None:
        async def attach() -> None:
            async with ShmTransport(TOKEN).attach(exported.offer, WRITER):
                await asyncio.Event().wait()

        with errors_of_loop() as errors:
            async with exporting(blocks=16) as exported:
                for turns in range(40):
                    attaching = asyncio.create_task(attach())
                    for _ in range(turns):
                        await asyncio.sleep(0)
                    attaching.cancel()
                    await asyncio.wait((attaching,))
                    await exported.fence(WRITER, "r")
        assert errors == []

    run(story(), loop_factory=loop_factory)


# Who is let in


def test_a_wrong_token_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        async with exporting() as exported:
            with pytest.raises(Refused, match="token"):
                async with ShmTransport("wrong").attach(exported.offer, WRITER):
                    pytest.fail("attached with a wrong token")
            await exported.fence(WRITER, "r")

    run(story())
    assert "another token" in caplog.text


def test_another_user_is_refused(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(auth, "process_of", lambda _: (1, os.geteuid() + 1))

    async def story() -> None:
        async with exporting() as exported:
            with pytest.raises(ConnectionLost):
                async with ShmTransport(TOKEN).attach(exported.offer, WRITER):
                    pytest.fail("attached as another user")

    run(story())
    assert f"of user {os.geteuid() + 1}" in caplog.text


def test_a_process_that_cannot_be_watched_is_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(auth, "process_of", lambda _: (0, os.geteuid()))

    async def story() -> None:
        async with exporting() as exported:
            with pytest.raises(ConnectionLost):
                async with ShmTransport(TOKEN).attach(exported.offer, WRITER):
                    pytest.fail("attached from elsewhere")

    run(story())
    assert "another PID namespace" in caplog.text


def test_an_owner_that_hangs_is_given_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shm, "ATTACH_S", 0.02)

    async def story() -> None:
        async with exporting() as exported:
            offer = msgspec.structs.replace(exported.offer, address=f"@penstock-test-{os.getpid()}")
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as hung:
                hung.bind("\0" + offer.address[1:])
                hung.listen()
                with pytest.raises(ConnectionLost, match=r"no answer within 0\.02 s"):
                    async with ShmTransport(TOKEN).attach(offer, WRITER):
                        pytest.fail("attached to nobody")

    run(story())


# What is left


def test_nothing_is_left_behind() -> None:
    async def story() -> None:
        before = traces()
        async with (
            exporting() as exported,
            peer_of(exported, "p:1") as killed,
            peer_of(exported, "q:1") as detached,
        ):
            assert await killed.ask("descriptors") == "1"  # that of the mapping, which mmap duplicates
            killed.process.kill()
            await exported.fence("p:1", "r")
            assert await detached.ask("detach") == "detached"
            await exported.fence("q:1", "r")
        assert traces() == before

    run(story())


def test_the_pidfd_is_found_on_older_kernels_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shm, "_SO_PEERPIDFD", 9999)

    async def story() -> None:
        async with exporting() as exported, peer_of(exported) as peer:
            peer.process.kill()
            await exported.fence(WRITER, "r")

    run(story())
