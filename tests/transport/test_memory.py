"""What is particular to the memory transport: what the world can do to workers. On virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from penstock.blocks import KvLayout
from penstock.errors import KvError, Refused, StaleEpoch
from penstock.sim.loop import run_virtual
from penstock.transport.api import Exported
from penstock.transport.memory import MemoryHub, MemoryTransport, heap_region

LAYOUT = KvLayout(layers=1, kv_heads=1, head_dim=1, block_tokens=16, dtype="uint64")


@asynccontextmanager
async def exporting(transport: MemoryTransport, epoch: int) -> AsyncIterator[Exported]:
    async with heap_region("d", epoch, LAYOUT, 4) as region, transport.export(region) as exported:
        yield exported


def test_the_dead_are_gone_though_they_never_detached() -> None:
    async def story() -> None:
        hub = MemoryHub()
        transport = MemoryTransport(hub)
        async with (
            exporting(transport, 1) as exported,
            transport.attach(exported.offer, "p:1"),
            transport.attach(exported.offer, "p:2"),
        ):
            first = asyncio.create_task(exported.fence("p:1", "r"))
            second = asyncio.create_task(exported.fence("p:2", "r"))
            hub.died("p:1")
            await first
            await asyncio.sleep(100.0)
            assert not second.done()
            second.cancel()

    run_virtual(story())


def test_a_dead_owner_is_gone_for_who_is_attached_and_who_would() -> None:
    async def story() -> None:
        hub = MemoryHub()
        transport = MemoryTransport(hub)
        async with (
            exporting(transport, 1) as exported,
            transport.attach(exported.offer, "p:1") as attached,
        ):
            hub.died("d:1")
            assert attached.is_owner_gone
            with pytest.raises(Refused):
                async with transport.attach(exported.offer, "q:1"):
                    pytest.fail("attached to the dead")

    run_virtual(story())


def test_a_new_incarnation_takes_the_old_ones_place() -> None:
    async def story() -> None:
        transport = MemoryTransport(MemoryHub())
        async with exporting(transport, 1) as old:
            async with exporting(transport, 2) as new:
                with pytest.raises(StaleEpoch):
                    async with transport.attach(old.offer, "p:1"):
                        pytest.fail("attached to an earlier incarnation")
                async with transport.attach(new.offer, "p:1") as attached:
                    assert attached.region is new.region
            with pytest.raises(Refused):
                async with transport.attach(new.offer, "p:1"):
                    pytest.fail("attached to what is gone")

    run_virtual(story())


def test_a_stuck_writer_is_killed_through_the_hub() -> None:
    async def story() -> None:
        killed: list[str] = []
        hub = MemoryHub(on_kill=killed.append)
        transport = MemoryTransport(hub)
        async with exporting(transport, 1) as exported, transport.attach(exported.offer, "p:1"):
            exported.kill("p:2")
            assert killed == []
            exported.kill("p:1")
            assert killed == ["p:1"]

    run_virtual(story())


def test_a_hub_that_cannot_kill_says_so() -> None:
    async def story() -> None:
        transport = MemoryTransport(MemoryHub())
        async with exporting(transport, 1) as exported, transport.attach(exported.offer, "p:1"):
            with pytest.raises(KvError, match="how to kill"):
                exported.kill("p:1")

    run_virtual(story())


def test_hosts_do_not_reach_each_other() -> None:
    async def story() -> None:
        here, there = MemoryTransport(MemoryHub("h0")), MemoryTransport(MemoryHub("h1"))
        assert here.memory != there.memory
        async with exporting(here, 1) as exported:
            with pytest.raises(Refused, match="h1"):
                async with there.attach(exported.offer, "p:1"):
                    pytest.fail("attached across hosts")

    run_virtual(story())
