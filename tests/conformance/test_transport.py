"""What every transport promises. Each test runs on every backend, and on every event loop that the backend works on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import uvloop

from penstock import transport
from penstock.blocks import KvLayout
from penstock.errors import Refused, StaleEpoch
from penstock.sim.loop import run_virtual
from penstock.transport.api import Offer, Transport
from penstock.transport.memory import MemoryHub, MemoryTransport
from penstock.transport.shm import ShmTransport
from tests.support import run

LAYOUT = KvLayout(layers=2, kv_heads=2, head_dim=8, block_tokens=16, dtype="float32")
BLOCKS = 40
WRITER = "prefill-0:7"

Story = Coroutine[Any, Any, None]


def run_uvloop(story: Story) -> None:
    run(story, loop_factory=uvloop.new_event_loop)


@dataclass(frozen=True)
class Place:
    """A backend: the transports of two workers, and a loop to run on."""

    run: Callable[[Story], object]
    here: Transport
    there: Transport


def memory() -> tuple[Transport, Transport]:
    hub = MemoryHub()
    return MemoryTransport(hub), MemoryTransport(hub)


def shm() -> tuple[Transport, Transport]:
    return ShmTransport("token"), ShmTransport("token")


PLACES = {
    "memory": (memory, run),
    "memory-virtual": (memory, run_virtual),
    "shm": (shm, run),
    "shm-uvloop": (shm, run_uvloop),
}


def test_every_backend_is_here() -> None:
    modules = {path.stem for path in Path(transport.__file__).parent.glob("[a-z]*.py")}
    assert modules - {"api", "host_memory", "offers", "private"} == {
        "memory",
        "shm",
    }  # private has nobody to promise anything


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Place:
    make, runner = PLACES[request.param]
    return Place(runner, *make())


async def is_pending(task: asyncio.Task[None]) -> bool:
    """Whether it still waits after the loop had time to tell it everything that has happened."""
    await asyncio.wait((task,), timeout=0.05)
    return not task.done()


def test_a_region_is_zeroed_and_of_the_size_asked_for(place: Place) -> None:
    async def story() -> None:
        async with place.here.export("d", 3, LAYOUT, BLOCKS) as exported:
            region = exported.region
            assert (region.owner, region.epoch, region.layout, region.blocks) == ("d", 3, LAYOUT, BLOCKS)
            assert region.buffer is not None
            assert region.buffer == bytes(BLOCKS * LAYOUT.block_bytes)
            assert not region.buffer.readonly
            assert exported.offer.transport == place.here.name

    place.run(story())


def test_an_offer_survives_the_wire(place: Place) -> None:
    async def story() -> None:
        async with place.here.export("d", 3, LAYOUT, BLOCKS) as exported:
            offer = msgspec.msgpack.decode(msgspec.msgpack.encode(exported.offer), type=Offer)
            async with place.there.attach(offer, WRITER) as attached:
                assert attached.region.key == exported.region.key
                assert (attached.region.layout, attached.region.blocks) == (LAYOUT, BLOCKS)

    place.run(story())


def test_owner_and_writers_see_one_memory(place: Place) -> None:
    async def story() -> None:
        async with (
            place.here.export("d", 1, LAYOUT, BLOCKS) as exported,
            place.there.attach(exported.offer, "p:1") as first,
            place.there.attach(exported.offer, "q:1") as second,
        ):
            mine, one, two = exported.region.buffer, first.region.buffer, second.region.buffer
            assert mine is not None and one is not None and two is not None
            one[0:4] = b"near"
            two[-3:] = b"far"
            mine[100:103] = b"own"
            for view in (mine, one, two):
                assert (view[0:4], view[-3:], view[100:103]) == (b"near", b"far", b"own")

    place.run(story())


def test_regions_do_not_mix(place: Place) -> None:
    async def story() -> None:
        async with (
            place.here.export("d", 1, LAYOUT, BLOCKS) as first,
            place.there.export("e", 1, LAYOUT, BLOCKS) as second,
            place.here.attach(second.offer, "d:1") as attached,
        ):
            assert attached.region.buffer is not None
            attached.region.buffer[0] = 9
            assert first.region.buffer is not None and first.region.buffer[0] == 0
            assert second.region.buffer is not None and second.region.buffer[0] == 9

    place.run(story())


def test_another_incarnation_is_stale(place: Place) -> None:
    async def story() -> None:
        async with place.here.export("d", 2, LAYOUT, BLOCKS) as exported:
            for epoch in (1, 3):
                with pytest.raises(StaleEpoch, match=f"epoch {epoch},"):
                    async with place.there.attach(msgspec.structs.replace(exported.offer, epoch=epoch), WRITER):
                        pytest.fail("attached to another incarnation")
            await exported.wait_gone(WRITER)

    place.run(story())


def test_another_shape_is_refused(place: Place) -> None:
    async def story() -> None:
        async with place.here.export("d", 1, LAYOUT, BLOCKS) as exported:
            other = msgspec.structs.replace(LAYOUT, packing="shuffled")
            changes: list[dict[str, Any]] = [{"layout": other}, {"blocks": BLOCKS + 1}, {"blocks": BLOCKS - 1}]
            for change in changes:
                with pytest.raises(Refused, match=r"blocks of.* has 40 of"):
                    async with place.there.attach(msgspec.structs.replace(exported.offer, **change), WRITER):
                        pytest.fail("attached to another shape")
            await exported.wait_gone(WRITER)

    place.run(story())


def test_a_region_that_is_gone_is_refused(place: Place) -> None:
    async def story() -> None:
        async with place.here.export("d", 1, LAYOUT, BLOCKS) as exported:
            offer = exported.offer
        with pytest.raises(Refused, match="any more"):
            async with place.there.attach(offer, WRITER):
                pytest.fail("attached to nothing")

    place.run(story())


def test_an_owner_may_leave_before_its_writers(place: Place) -> None:
    async def story() -> None:
        export = place.here.export("d", 1, LAYOUT, BLOCKS)
        exported = await export.__aenter__()
        async with place.there.attach(exported.offer, WRITER) as attached:
            assert not attached.is_owner_gone
            await export.__aexit__(None, None, None)
            assert attached.is_owner_gone
            assert attached.region.buffer is not None
            attached.region.buffer[0] = 1  # harmless: the memory is still there

    place.run(story())


def test_who_never_came_is_gone(place: Place) -> None:
    async def story() -> None:
        async with place.here.export("d", 1, LAYOUT, BLOCKS) as exported:
            await exported.wait_gone("nobody:1")
            exported.kill("nobody:1")

    place.run(story())


def test_a_writer_is_gone_once_it_detached(place: Place) -> None:
    async def story() -> None:
        async with place.here.export("d", 1, LAYOUT, BLOCKS) as exported:
            async with place.there.attach(exported.offer, WRITER):
                waiting = asyncio.create_task(exported.wait_gone(WRITER))
                assert await is_pending(waiting)
            await waiting
            await exported.wait_gone(WRITER)

    place.run(story())


def test_a_writer_is_gone_once_it_failed(place: Place) -> None:
    async def story() -> None:
        async with place.here.export("d", 1, LAYOUT, BLOCKS) as exported:
            with pytest.raises(ZeroDivisionError):
                async with place.there.attach(exported.offer, WRITER):
                    raise ZeroDivisionError
            await exported.wait_gone(WRITER)

    place.run(story())


def test_writers_are_told_apart(place: Place) -> None:
    async def story() -> None:
        async with (
            place.here.export("d", 1, LAYOUT, BLOCKS) as exported,
            place.there.attach(exported.offer, "p:1"),
        ):
            waiting = asyncio.create_task(exported.wait_gone("p:1"))
            async with place.there.attach(exported.offer, "p:2"):
                await exported.wait_gone("q:1")
                assert await is_pending(waiting)
            await exported.wait_gone("p:2")
            assert await is_pending(waiting)
            waiting.cancel()

    place.run(story())


def test_a_writer_may_come_back(place: Place) -> None:
    async def story() -> None:
        async with place.here.export("d", 1, LAYOUT, BLOCKS) as exported:
            async with place.there.attach(exported.offer, WRITER):
                pass
            await exported.wait_gone(WRITER)
            async with place.there.attach(exported.offer, WRITER):
                waiting = asyncio.create_task(exported.wait_gone(WRITER))
                assert await is_pending(waiting)
            await waiting

    place.run(story())


def test_what_the_block_raises_passes_unchanged(place: Place) -> None:
    async def story() -> None:
        with pytest.raises(ZeroDivisionError):
            async with place.here.export("d", 1, LAYOUT, BLOCKS):
                raise ZeroDivisionError

    place.run(story())


def test_memory_is_named_alike_where_it_is_shared(place: Place) -> None:
    assert place.here.memory == place.there.memory != ""
