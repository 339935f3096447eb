"""What is particular to NIXL: other processes and their deaths. `make test-nixl` installs it and runs this."""

from __future__ import annotations

import asyncio
import gc
import signal
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

from penstock.blocks import BlockId, KvLayout
from penstock.errors import MissingExtra, Refused
from penstock.transport.api import Exported
from penstock.transport.host_memory import new_region
from penstock.transport.nixl import NixlTransport
from tests.support import run
from tests.transport.peers import TOKEN, WRITER, peer_of

LAYOUT = KvLayout(layers=4, kv_heads=2, head_dim=32, block_tokens=16, dtype="float32")
BLOCKS = 1024  # 32 MiB
EVERYTHING = [(BlockId(number), BlockId(number)) for number in range(BLOCKS)]
BACKWARDS = [(BlockId(number), BlockId(BLOCKS - 1 - number)) for number in range(BLOCKS)]

is_installed = find_spec("nixl") is not None
needs_nixl = pytest.mark.skipif(not is_installed, reason="NIXL is not installed: make test-nixl")


@asynccontextmanager
async def exporting() -> AsyncIterator[Exported]:
    async with (
        NixlTransport(TOKEN) as transport,
        new_region("d", 1, LAYOUT, BLOCKS) as region,
        transport.export(region) as exported,
    ):
        yield exported


def buffer_of(exported: Exported) -> memoryview:
    assert exported.region.buffer is not None
    return exported.region.buffer


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


@pytest.mark.skipif(is_installed, reason="NIXL is installed")
def test_without_the_package_it_says_what_to_install() -> None:
    async def story() -> None:
        with pytest.raises(MissingExtra, match="pip install --no-deps nixl"):
            async with NixlTransport(TOKEN):
                pytest.fail("opened")

    run(story())


@needs_nixl
def test_another_process_writes_everything() -> None:
    async def story() -> None:
        async with exporting() as exported, peer_of(exported) as peer:
            assert await peer.ask("write") == "done"
            assert await peer.ask("flush") == "done"
            assert buffer_of(exported) == b"\7" * len(buffer_of(exported))
            waiting = asyncio.create_task(exported.fence(WRITER, "r"))
            await asyncio.wait((waiting,), timeout=0.05)
            assert not waiting.done()
            assert await peer.ask("leave") == "left"
            await waiting

    run(story())


@needs_nixl
@pytest.mark.parametrize("pairs", [EVERYTHING, BACKWARDS], ids=["runs", "blocks"])
def test_writes_and_reads_of_runs_and_of_single_blocks(pairs: list[tuple[BlockId, BlockId]]) -> None:
    async def story() -> None:
        async with (
            exporting() as exported,
            NixlTransport(TOKEN) as transport,
            new_region("p", 1, LAYOUT, BLOCKS) as source,
            transport.connect(exported.offer, source, WRITER, "r", lambda: None) as pipe,
        ):
            size, there, here = LAYOUT.block_bytes, buffer_of(exported), source.buffer
            assert here is not None
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
def test_a_killed_writer_is_gone() -> None:
    async def story() -> None:
        async with exporting() as exported, peer_of(exported) as peer:
            peer.tell("stream")
            await until(lambda: buffer_of(exported)[0] == 7)
            waiting = asyncio.create_task(exported.fence(WRITER, "r"))
            peer.process.kill()
            await waiting
            buffer_of(exported)[:] = bytes(len(buffer_of(exported)))
            await peer.process.wait()
            assert buffer_of(exported) == bytes(len(buffer_of(exported)))

    run(story())


@needs_nixl
def test_a_stopped_writer_is_waited_for_until_it_is_killed() -> None:
    async def story() -> None:
        async with exporting() as exported, peer_of(exported) as peer:
            peer.tell("stream")
            await until(lambda: buffer_of(exported)[0] == 7)
            peer.process.send_signal(signal.SIGSTOP)
            waiting = asyncio.create_task(exported.fence(WRITER, "r"))
            await asyncio.wait((waiting,), timeout=0.2)
            assert not waiting.done()
            exported.kill(WRITER)
            await waiting
            assert await peer.process.wait() == -signal.SIGKILL

    run(story())


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
def test_threads_and_descriptors_are_gone_with_the_transport() -> None:
    def traces() -> tuple[int, list[str]]:
        gc.collect()
        return len(list(Path("/proc/self/fd").iterdir())), sorted(thread.name for thread in threading.enumerate())

    async def story() -> None:
        async with (
            exporting() as exported,
            NixlTransport(TOKEN) as transport,
            new_region("p", 1, LAYOUT, BLOCKS) as source,
            transport.connect(exported.offer, source, WRITER, "r", lambda: None) as pipe,
        ):
            pipe.write(EVERYTHING)
            await pipe.flush()

    run(story())  # what UCX keeps for the process is made now
    before = traces()
    run(story())
    assert traces() == before
