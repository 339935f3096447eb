"""KV between two hosts, which are network namespaces, over a link that delays and loses packets or is down."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest

from penstock.blocks import Region
from penstock.transport.api import Exported
from penstock.transport.host_memory import new_region
from penstock.transport.tcp import Options, TcpTransport
from tests.processes.test_two_hosts import HERE, REASON, Link, other_host
from tests.support import run
from tests.transport.peers import TOKEN, WRITER, PeerProcess
from tests.transport.test_tcp import LAYOUT

pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)

BLOCKS = 64  # 2 MiB


@asynccontextmanager
async def far_peer() -> AsyncIterator[tuple[Exported, Region, PeerProcess, Link]]:
    """A region here, full of 5, and a process over there that has connected to it, with a region full of 7."""
    async with (
        other_host() as (namespace, link),
        TcpTransport(TOKEN, Options(host=HERE)) as transport,
        new_region("d", 1, LAYOUT, BLOCKS) as region,
        transport.export(region) as exported,
    ):
        assert region.buffer is not None
        region.buffer[:] = b"\5" * len(region.buffer)
        offer = msgspec.msgpack.encode(exported.offer).hex()
        process = await asyncio.create_subprocess_exec(
            *("ip", "netns", "exec", namespace, sys.executable),
            *("-m", "tests.transport.writing_peer", offer, TOKEN, WRITER),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            peer = PeerProcess(process)
            assert await peer.read() == "connected"
            yield exported, region, peer, link
        finally:
            if process.returncode is None:
                process.kill()
            await process.communicate()


def test_delay_and_loss_cost_time_alone() -> None:
    async def story() -> None:
        async with far_peer() as (_, region, peer, link):
            await link.set("delay_s", 0.01)
            await link.set("loss", 0.02)
            assert await peer.ask("read") == "done"
            assert await peer.ask("flush") == "done"
            assert (await peer.ask("holds 5"), await peer.ask("holds 7")) == ("True", "False")
            assert region.buffer is not None
            region.buffer[:] = bytes(len(region.buffer))
            assert await peer.ask("write") == "done"
            assert await peer.ask("flush") == "done"
            assert region.buffer == b"\5" * len(region.buffer)
            assert await peer.ask("leave") == "left"

    run(story())


def test_memory_is_taken_back_though_the_writer_cannot_be_reached() -> None:
    async def story() -> None:
        async with far_peer() as (exported, region, peer, link):
            assert region.buffer is not None
            peer.tell("stream")
            while region.buffer[0] != 7:
                await asyncio.sleep(0.002)
            await link.set("up", 0)
            await exported.fence(WRITER, "r")
            region.buffer[:] = b"\5" * len(region.buffer)
            await link.set("up", 1)
            assert await peer.read() == "ConnectionLost"  # it was told so, when it could be
            assert region.buffer == b"\5" * len(region.buffer)

    run(story())
