"""KV over a simulated network: bytes land as they arrive, and whoever leaves or dies takes his own pipes along."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest
from msgspec.structs import replace

from penstock.blocks import BlockId, KvLayout
from penstock.errors import ConnectionLost, KvError, Refused, StaleEpoch
from penstock.sim.loop import run_virtual
from penstock.sim.network import Network
from penstock.sim.transport import STALLED_S, FabricHub, FabricTransport, Software
from penstock.sim.wiring import Wiring
from penstock.topology.build import PRESETS, build
from penstock.transport.api import Exported, Pipe
from penstock.transport.memory import heap_region

LAYOUT = KvLayout(1, 1, 1, 1024, "uint64", packing="fingerprints")
BLOCKS = 8
BLOCK_S = 1.0  # that each takes on its way


class Pair:
    """A writer "p:1" and an owner "d:1" on two GPUs, joined by links on which a block takes `BLOCK_S`."""

    def __init__(self, software: Software = Software()) -> None:
        self.killed: list[str] = []
        self.links = Network()
        self.wiring = Wiring(build([PRESETS["hgx-h100"]]), self.links)
        self.wiring.place("p", ("node0/gpu0",))
        self.wiring.place("d", ("node0/gpu1",))
        self.hub = FabricHub(self.links, self.wiring, on_kill=self.killed.append, software=software)
        self.owner: Exported
        self.source: Exported

    def connect(self) -> AbstractAsyncContextManager[Pipe]:
        return FabricTransport(self.hub).connect(self.owner.offer, self.source.region, "p:1", "r", lambda: None)

    def set_rate(self, bytes_per_s: float) -> None:
        for link in self.wiring.route("p", "d").links:
            self.links.slow(link, bytes_per_s / link.nominal_bytes_per_s)

    def landed(self) -> list[int]:
        """The first byte of each block of the owner's region."""
        return [self.owner.region.buffer[number * LAYOUT.block_bytes] for number in range(BLOCKS)]  # type: ignore[index]


@asynccontextmanager
async def pair() -> AsyncIterator[tuple[Pair, Pipe]]:
    both = Pair()
    async with (
        heap_region("d", 1, LAYOUT, BLOCKS) as there,
        heap_region("p", 1, LAYOUT, BLOCKS) as here,
        FabricTransport(both.hub).export(there) as both.owner,
        FabricTransport(both.hub).export(here) as both.source,
        FabricTransport(both.hub).connect(both.owner.offer, here, "p:1", "r", lambda: None) as pipe,
    ):
        assert both.source.region.buffer is not None
        for number in range(BLOCKS):
            both.source.region.buffer[number * LAYOUT.block_bytes] = number + 1
        both.set_rate(LAYOUT.block_bytes / BLOCK_S)
        yield both, pipe


def blocks(*pairs: tuple[int, int]) -> list[tuple[BlockId, BlockId]]:
    return [(BlockId(here), BlockId(there)) for here, there in pairs]


def test_blocks_land_one_after_the_other_and_flush_waits_for_the_last() -> None:
    async def story() -> None:
        async with pair() as (both, pipe):
            pipe.write(blocks((0, 5), (1, 2)))
            await asyncio.sleep(1.5)
            assert both.landed() == [0, 0, 0, 0, 0, 1, 0, 0]
            pipe.write(blocks((7, 0)))
            await pipe.flush()
            assert both.landed() == [8, 0, 2, 0, 0, 1, 0, 0]
            assert asyncio.get_running_loop().time() == pytest.approx(3.0, abs=1e-3)

    run_virtual(story())


def test_a_pipe_that_was_left_writes_no_more_and_leaves_its_links() -> None:
    async def story() -> None:
        async with pair() as (both, pipe):
            pipe.write(blocks((0, 0), (1, 1)))
            async with FabricTransport(both.hub).connect(
                both.owner.offer, both.source.region, "p:1", "r", lambda: None
            ) as other:
                other.write(blocks((2, 2), (3, 3)))
                await asyncio.sleep(2.5)  # two pipes: each has half
            await pipe.flush()
            assert both.landed() == [1, 2, 3, 0, 0, 0, 0, 0]
            assert all(both.links.use(link).flows == 0 for link in both.wiring.route("p", "d").links)

    run_virtual(story())


@pytest.mark.parametrize("who", ["p:1", "d:1"])
def test_a_death_on_either_side_ends_the_pipe(who: str) -> None:
    async def story() -> None:
        async with pair() as (both, pipe):
            pipe.write(blocks((0, 0), (1, 1)))
            gone = asyncio.ensure_future(both.owner.fence("p:1", "r"))
            await asyncio.sleep(1.5)
            assert not gone.done()
            both.hub.died(who)
            with pytest.raises(ConnectionLost, match=f"{who} died"):
                await pipe.flush()
            pipe.write(blocks((1, 1)))  # in vain, and flush has said so
            await gone
            assert both.landed()[1] == 0

    run_virtual(story())


def test_only_a_writer_that_is_there_can_be_killed() -> None:
    async def story() -> None:
        async with pair() as (both, _):
            both.owner.kill("p:2")
            await both.owner.fence("p:2", "r")
            assert both.killed == []
            both.owner.kill("p:1")
            assert both.killed == ["p:1"]
            with pytest.raises(KvError, match="not told how to kill"):
                FabricHub(both.links, both.wiring).on_kill("p:1")

    run_virtual(story())


@pytest.mark.parametrize(("rate", "is_given_up"), [(0.0, True), (LAYOUT.block_bytes / (3 * STALLED_S), False)])
def test_only_a_transfer_of_which_nothing_arrives_is_given_up(rate: float, is_given_up: bool) -> None:
    async def story() -> None:
        async with pair() as (both, pipe):
            pipe.write(blocks((0, 0), (1, 1)))
            await asyncio.sleep(0.5)
            both.set_rate(rate)
            if is_given_up:
                with pytest.raises(ConnectionLost, match="no byte of d's has moved for 10 s"):
                    await pipe.flush()
            else:
                await pipe.flush()
                assert both.landed()[:2] == [1, 2]

    run_virtual(story())


def test_an_offer_of_an_incarnation_before_is_stale() -> None:
    async def story() -> None:
        async with pair() as (both, _):
            before = replace(both.owner.offer, epoch=0)
            with pytest.raises(StaleEpoch):
                async with FabricTransport(both.hub).connect(before, both.source.region, "p:1", "r", lambda: None):
                    pytest.fail("it was let in")

    run_virtual(story())


def test_an_owner_that_is_gone_is_refused() -> None:
    async def story() -> None:
        async with pair() as (both, _):
            both.hub.died("d:1")
            with pytest.raises(Refused, match="offers no region"):
                async with FabricTransport(both.hub).connect(
                    both.owner.offer, both.source.region, "p:1", "r", lambda: None
                ):
                    pytest.fail("it was let in")
            with pytest.raises(Refused, match="cannot compute in the memory of d"):
                FabricTransport(both.hub).attach(both.owner.offer, "p:1")

    run_virtual(story())
