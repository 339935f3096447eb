"""Regions of peers: one that is slow to come holds up no other, and what fails leaves nothing mapped."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from penstock.blocks import KvLayout, Region
from penstock.engine.simulated import Options, SimulatedEngine
from penstock.errors import EngineFailed, StaleEpoch
from penstock.serve.mappings import Mappings
from penstock.serve.paths import Paths
from penstock.sim.loop import run_virtual
from penstock.transport.api import Attached, Exported, Offer
from penstock.transport.memory import MemoryHub, MemoryTransport, heap_region

LAYOUT = KvLayout(1, 1, 1, 16, "uint64", packing="fingerprints")
WRITER = "prefill-0:1"


class Slow(MemoryTransport):
    """Takes an hour to attach to `tortoise`."""

    @asynccontextmanager
    async def attach(self, offer: Offer, writer: str) -> AsyncIterator[Attached]:
        if offer.owner == "tortoise":
            await asyncio.sleep(3_600)
        async with super().attach(offer, writer) as attached:
            yield attached


class Picky(SimulatedEngine):
    """Cannot compute in any region."""

    def attach(self, region: Region) -> None:
        raise EngineFailed("not here")


def mappings(hub: MemoryHub, engine: SimulatedEngine | None = None, active: int = 2) -> Mappings:
    return Mappings(engine or SimulatedEngine(Options()), Paths([Slow(hub)]), WRITER, active)


@asynccontextmanager
async def exported(hub: MemoryHub, owner: str) -> AsyncIterator[Exported]:
    async with heap_region(owner, 1, LAYOUT, 4) as region, MemoryTransport(hub).export(region) as exported:
        yield exported


def test_an_owner_that_does_not_hand_over_its_region_holds_up_nobody_else() -> None:
    async def story() -> None:
        hub = MemoryHub()
        regions = mappings(hub)
        async with exported(hub, "tortoise") as slow, exported(hub, "hare") as quick:

            async def wait_for_tortoise() -> None:
                async with regions.mapped(slow.offer):
                    pass

            waiting = asyncio.create_task(wait_for_tortoise())
            async with asyncio.timeout(1), regions.mapped(quick.offer) as region:
                assert region.owner == "hare"
            waiting.cancel()
            await asyncio.wait([waiting])
            await regions.close()

    run_virtual(story())


def test_so_many_at_a_time_compute_in_one_region_and_others_are_independent() -> None:
    async def story() -> None:
        hub = MemoryHub()
        regions = mappings(hub, active=1)
        async with exported(hub, "a") as a, exported(hub, "b") as b:
            async with regions.mapped(a.offer), regions.mapped(b.offer):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(1), regions.mapped(a.offer):
                        pass
            async with asyncio.timeout(1), regions.mapped(a.offer):
                pass
            await regions.close()

    run_virtual(story())


def test_a_region_is_let_go_once_its_owner_is_gone_and_nobody_uses_it() -> None:
    async def story() -> None:
        hub = MemoryHub()
        regions = mappings(hub)
        async with exported(hub, "a") as a:
            async with regions.mapped(a.offer):
                pass
            await regions.release_orphans()
            gone = asyncio.create_task(a.fence(WRITER, "r"))
            await asyncio.sleep(1)
            assert not gone.done()  # kept for the next prompt
        with pytest.raises(StaleEpoch):
            async with regions.mapped(a.offer):
                pass
        await regions.release_orphans()
        await asyncio.wait_for(gone, 1)

    run_virtual(story())


def test_a_region_that_the_engine_refuses_does_not_stay_mapped() -> None:
    async def story() -> None:
        hub = MemoryHub()
        regions = mappings(hub, Picky(Options()))
        async with exported(hub, "a") as a:
            with pytest.raises(EngineFailed):
                async with regions.mapped(a.offer):
                    pass
            await asyncio.wait_for(a.fence(WRITER, "r"), 1)

    run_virtual(story())
