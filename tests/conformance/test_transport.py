"""What every transport promises. Each test runs on every backend, and on every event loop that the backend works on.

Three parts: what holds for all, for those whose peers compute in place, and for those whose peers write from afar.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import pytest
import uvloop

from penstock import transport
from penstock.blocks import BlockId, KvLayout, Region
from penstock.errors import ConnectionLost, Refused, StaleEpoch
from penstock.sim.loop import run_virtual
from penstock.sim.network import Network
from penstock.sim.transport import FabricHub, FabricTransport
from penstock.sim.wiring import Wiring
from penstock.topology.build import PRESETS, build
from penstock.transport.api import Exported, Offer, Pipe, Transport
from penstock.transport.host_memory import new_region
from penstock.transport.memory import MemoryHub, MemoryTransport
from penstock.transport.nixl import NixlTransport
from penstock.transport.shm import ShmTransport
from penstock.transport.tcp import TcpTransport
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

    runner: Callable[[Story], object]
    here: Transport
    there: Transport

    def run(self, story: Story) -> None:
        async def inside() -> None:
            async with AsyncExitStack() as stack:
                for transport in (self.here, self.there):
                    if isinstance(transport, AbstractAsyncContextManager):
                        await stack.enter_async_context(transport)
                await story

        self.runner(inside())

    @asynccontextmanager
    async def reached(self, offer: Offer, writer: str = WRITER) -> AsyncIterator[None]:
        """`writer` may write into the region on offer, in the backend's way."""
        if self.there.limits.is_in_place:
            async with self.there.attach(offer, writer):
                yield
        else:
            async with self.piped(offer, writer):
                yield

    @asynccontextmanager
    async def piped(
        self, offer: Offer, writer: str = WRITER, request: str = "r", on_moved: Callable[[], None] = lambda: None
    ) -> AsyncIterator[tuple[Pipe, memoryview]]:
        """A pipe into the region on offer, and the memory that it writes from: block n is full of n + 1."""
        async with exporting(self.there, "p", 7) as source:
            buffer = buffer_of(source.region)
            for number in range(BLOCKS):
                set_block(buffer, number, number + 1)
            async with self.there.connect(offer, source.region, writer, request, on_moved) as pipe:
                yield pipe, buffer


@asynccontextmanager
async def exporting(transport: Transport, owner: str, epoch: int) -> AsyncIterator[Exported]:
    """A region of zeroes on offer."""
    async with new_region(owner, epoch, LAYOUT, BLOCKS) as region, transport.export(region) as exported:
        yield exported


def buffer_of(region: Region) -> memoryview:
    assert region.buffer is not None
    return region.buffer


def set_block(buffer: memoryview, number: int, byte: int) -> None:
    size = LAYOUT.block_bytes
    buffer[number * size : (number + 1) * size] = bytes([byte]) * size


def found(buffer: memoryview) -> list[int]:
    """What each block is full of; -1 for one of several bytes."""
    size = LAYOUT.block_bytes
    blocks = [bytes(buffer[start : start + size]) for start in range(0, len(buffer), size)]
    return [block[0] if block == block[:1] * size else -1 for block in blocks]


def filled(**blocks: int) -> list[int]:
    """As `found`: `_3=7` is a block 3 that is full of 7, and all others are empty."""
    return [blocks.get(f"_{number}", 0) for number in range(BLOCKS)]


def pairs(*blocks: tuple[int, int]) -> list[tuple[BlockId, BlockId]]:
    return [(BlockId(here), BlockId(there)) for here, there in blocks]


def memory() -> tuple[Transport, Transport]:
    hub = MemoryHub()
    return MemoryTransport(hub), MemoryTransport(hub)


def shm() -> tuple[Transport, Transport]:
    return ShmTransport("token"), ShmTransport("token")


def tcp() -> tuple[Transport, Transport]:
    return TcpTransport("token"), TcpTransport("token")


def nixl() -> tuple[Transport, Transport]:
    return NixlTransport("token"), NixlTransport("token")


def fabric(is_fenced: bool = False) -> tuple[Transport, Transport]:
    """The simulated network; its workers need places in a host."""
    links = Network()
    wiring = Wiring(build([PRESETS["hgx-h100"]]), links)
    for number, worker in enumerate(("d", "e", "p")):
        wiring.place(worker, (f"node0/gpu{number}",))
    hub = FabricHub(links, wiring, is_fenced=is_fenced, on_kill=lambda writer: hub.died(writer))
    return FabricTransport(hub), FabricTransport(hub)


IN_PLACE = {
    "memory": (memory, run),
    "memory-virtual": (memory, run_virtual),
    "shm": (shm, run),
    "shm-uvloop": (shm, run_uvloop),
}
WRITING = {
    "tcp": (tcp, run),
    "tcp-uvloop": (tcp, run_uvloop),
    "fabric-virtual": (fabric, run_virtual),
    "fenced-fabric-virtual": (partial(fabric, is_fenced=True), run_virtual),
}
if find_spec("nixl") is not None:  # `make test-nixl` installs it
    WRITING["nixl"] = (nixl, run)
PLACES = IN_PLACE | WRITING
NO_BACKENDS = {"api", "offers", "host_memory", "io_thread", "sockets"}


def test_every_backend_is_here() -> None:
    modules = {path.stem for path in Path(transport.__file__).parent.glob("[a-z]*.py")}
    backends = {module for module in modules - NO_BACKENDS if not module.startswith(("tcp_", "nixl_"))}
    assert backends == {"memory", "nixl", "shm", "tcp"}


def place_of(name: str) -> Place:
    make, runner = PLACES[name]
    return Place(runner, *make())


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Place:
    return place_of(request.param)


@pytest.fixture(params=[name for name in PLACES if not place_of(name).here.limits.is_fenced])
def unfenced(request: pytest.FixtureRequest) -> Place:
    return place_of(request.param)


@pytest.fixture(params=[name for name in PLACES if place_of(name).here.limits.is_fenced])
def fenced(request: pytest.FixtureRequest) -> Place:
    return place_of(request.param)


@pytest.fixture(params=IN_PLACE)
def shared(request: pytest.FixtureRequest) -> Place:
    return place_of(request.param)


@pytest.fixture(params=[name for name in WRITING if name != "nixl"])
def revocable(request: pytest.FixtureRequest) -> Place:
    """Whose writers can be taken back from without the end of their process, which is this one."""
    return place_of(request.param)


@pytest.fixture(params=WRITING)
def remote(request: pytest.FixtureRequest) -> Place:
    return place_of(request.param)


async def is_pending(task: asyncio.Task[None]) -> bool:
    """Whether it still waits after the loop had time to tell it everything that has happened."""
    await asyncio.wait((task,), timeout=0.05)
    return not task.done()


# All


def test_a_region_is_zeroed_and_of_the_size_asked_for(place: Place) -> None:
    async def story() -> None:
        async with exporting(place.here, "d", 3) as exported:
            region = exported.region
            assert (region.owner, region.epoch, region.layout, region.blocks) == ("d", 3, LAYOUT, BLOCKS)
            assert region.buffer is not None
            assert region.buffer == bytes(BLOCKS * LAYOUT.block_bytes)
            assert not region.buffer.readonly
            assert exported.offer.transport == place.here.name

    place.run(story())


def test_another_incarnation_is_stale(place: Place) -> None:
    async def story() -> None:
        async with exporting(place.here, "d", 2) as exported:
            for epoch in (1, 3):
                with pytest.raises(StaleEpoch, match=f"epoch {epoch},"):
                    async with place.reached(msgspec.structs.replace(exported.offer, epoch=epoch)):
                        pytest.fail("let in to another incarnation")
            await exported.fence(WRITER, "r")

    place.run(story())


def test_another_shape_is_refused(place: Place) -> None:
    async def story() -> None:
        async with exporting(place.here, "d", 1) as exported:
            other = msgspec.structs.replace(LAYOUT, packing="shuffled")
            changes: list[dict[str, Any]] = [{"layout": other}, {"blocks": BLOCKS + 1}, {"blocks": BLOCKS - 1}]
            for change in changes:
                with pytest.raises(Refused, match=r"blocks of.* has 40 of"):
                    async with place.reached(msgspec.structs.replace(exported.offer, **change)):
                        pytest.fail("let in to another shape")
            await exported.fence(WRITER, "r")

    place.run(story())


def test_a_region_that_is_gone_is_refused(place: Place) -> None:
    async def story() -> None:
        async with exporting(place.here, "d", 1) as exported:
            offer = exported.offer
        with pytest.raises(Refused, match="any more"):
            async with place.reached(offer):
                pytest.fail("let in to nothing")

    place.run(story())


def test_who_never_came_is_gone(place: Place) -> None:
    async def story() -> None:
        async with exporting(place.here, "d", 1) as exported:
            await exported.fence("nobody:1", "r")
            exported.kill("nobody:1")

    place.run(story())


def test_a_writer_is_gone_once_it_left(unfenced: Place) -> None:
    async def story() -> None:
        async with exporting(unfenced.here, "d", 1) as exported:
            async with unfenced.reached(exported.offer):
                waiting = asyncio.create_task(exported.fence(WRITER, "r"))
                assert await is_pending(waiting)
            await waiting
            await exported.fence(WRITER, "r")

    unfenced.run(story())


def test_a_writer_is_gone_once_it_failed(place: Place) -> None:
    async def story() -> None:
        async with exporting(place.here, "d", 1) as exported:
            with pytest.raises(ZeroDivisionError):
                async with place.reached(exported.offer):
                    raise ZeroDivisionError
            await exported.fence(WRITER, "r")

    place.run(story())


def test_writers_are_told_apart(unfenced: Place) -> None:
    async def story() -> None:
        async with (
            exporting(unfenced.here, "d", 1) as exported,
            unfenced.reached(exported.offer, "p:1"),
        ):
            waiting = asyncio.create_task(exported.fence("p:1", "r"))
            async with unfenced.reached(exported.offer, "p:2"):
                await exported.fence("q:1", "r")
                assert await is_pending(waiting)
            await exported.fence("p:2", "r")
            assert await is_pending(waiting)
            waiting.cancel()

    unfenced.run(story())


def test_a_writer_may_come_back(unfenced: Place) -> None:
    async def story() -> None:
        async with exporting(unfenced.here, "d", 1) as exported:
            async with unfenced.reached(exported.offer):
                pass
            await exported.fence(WRITER, "r")
            async with unfenced.reached(exported.offer):
                waiting = asyncio.create_task(exported.fence(WRITER, "r"))
                assert await is_pending(waiting)
            await waiting

    unfenced.run(story())


def test_what_the_block_raises_passes_unchanged(place: Place) -> None:
    async def story() -> None:
        with pytest.raises(ZeroDivisionError):
            async with exporting(place.here, "d", 1):
                raise ZeroDivisionError

    place.run(story())


# In place


def test_an_offer_survives_the_wire(shared: Place) -> None:
    async def story() -> None:
        async with exporting(shared.here, "d", 3) as exported:
            offer = msgspec.msgpack.decode(msgspec.msgpack.encode(exported.offer), type=Offer)
            async with shared.there.attach(offer, WRITER) as attached:
                assert attached.region.key == exported.region.key
                assert (attached.region.layout, attached.region.blocks) == (LAYOUT, BLOCKS)

    shared.run(story())


def test_owner_and_writers_see_one_memory(shared: Place) -> None:
    async def story() -> None:
        async with (
            exporting(shared.here, "d", 1) as exported,
            shared.there.attach(exported.offer, "p:1") as first,
            shared.there.attach(exported.offer, "q:1") as second,
        ):
            mine, one, two = exported.region.buffer, first.region.buffer, second.region.buffer
            assert mine is not None and one is not None and two is not None
            one[0:4] = b"near"
            two[-3:] = b"far"
            mine[100:103] = b"own"
            for view in (mine, one, two):
                assert (view[0:4], view[-3:], view[100:103]) == (b"near", b"far", b"own")

    shared.run(story())


def test_regions_do_not_mix(shared: Place) -> None:
    async def story() -> None:
        async with (
            exporting(shared.here, "d", 1) as first,
            exporting(shared.there, "e", 1) as second,
            shared.here.attach(second.offer, "d:1") as attached,
        ):
            assert attached.region.buffer is not None
            attached.region.buffer[0] = 9
            assert first.region.buffer is not None and first.region.buffer[0] == 0
            assert second.region.buffer is not None and second.region.buffer[0] == 9

    shared.run(story())


def test_an_owner_may_leave_before_its_writers(shared: Place) -> None:
    async def story() -> None:
        async with new_region("d", 1, LAYOUT, BLOCKS) as region, AsyncExitStack() as stack:
            async with shared.here.export(region) as exported:
                attached = await stack.enter_async_context(shared.there.attach(exported.offer, WRITER))
                assert not attached.is_owner_gone
            assert attached.is_owner_gone
            assert attached.region.buffer is not None
            attached.region.buffer[0] = 1  # harmless: the memory is still there

    shared.run(story())


def test_memory_is_named_alike_where_it_is_shared(shared: Place) -> None:
    assert shared.here.memory == shared.there.memory != ""


def test_nobody_connects_where_all_attach(shared: Place) -> None:
    async def story() -> None:
        async with exporting(shared.here, "d", 1) as exported:
            with pytest.raises(Refused, match="must attach"):
                shared.there.connect(exported.offer, exported.region, WRITER, "r", lambda: None)

    shared.run(story())


# From afar


def test_an_offer_to_writers_survives_the_wire(remote: Place) -> None:
    async def story() -> None:
        async with exporting(remote.here, "d", 3) as exported:
            offer = msgspec.msgpack.decode(msgspec.msgpack.encode(exported.offer), type=Offer)
            async with remote.piped(offer) as (pipe, _):
                pipe.write(pairs((0, 0)))
                await pipe.flush()
            assert found(buffer_of(exported.region)) == filled(_0=1)

    remote.run(story())


def test_blocks_are_in_place_after_a_flush_and_no_others(remote: Place) -> None:
    async def story() -> None:
        async with exporting(remote.here, "d", 1) as exported, remote.piped(exported.offer) as (pipe, _):
            pipe.write(pairs((0, 5), (1, 6), (2, 7), (9, 1), (39, 0), (3, 39)))
            await pipe.flush()
            assert found(buffer_of(exported.region)) == filled(_5=1, _6=2, _7=3, _1=10, _0=40, _39=4)

    remote.run(story())


def test_a_flush_with_nothing_to_wait_for_returns(remote: Place) -> None:
    async def story() -> None:
        async with exporting(remote.here, "d", 1) as exported, remote.piped(exported.offer) as (pipe, _):
            await pipe.flush()
            pipe.write([])
            await pipe.flush()
            pipe.write(pairs((4, 4)))
            await pipe.flush()
            await pipe.flush()
            assert found(buffer_of(exported.region)) == filled(_4=5)

    remote.run(story())


def test_a_block_may_change_once_it_was_flushed(remote: Place) -> None:
    async def story() -> None:
        async with (
            exporting(remote.here, "d", 1) as exported,
            remote.piped(exported.offer) as (pipe, source),
        ):
            for byte in range(100, 110):
                set_block(source, 0, byte)
                pipe.write(pairs((0, byte - 100)))
                await pipe.flush()
            assert found(buffer_of(exported.region))[:11] == [*range(100, 110), 0]

    remote.run(story())


def test_pipes_do_not_mix(remote: Place) -> None:
    async def story() -> None:
        async with (
            exporting(remote.here, "d", 1) as first,
            exporting(remote.here, "e", 1) as second,
            remote.piped(first.offer) as (one, _),
            remote.piped(first.offer) as (two, _),
            remote.piped(second.offer) as (three, _),
        ):
            one.write(pairs((1, 1)))
            two.write(pairs((2, 2)))
            three.write(pairs((3, 3)))
            for pipe in (three, two, one):
                await pipe.flush()
            assert found(buffer_of(first.region)) == filled(_1=2, _2=3)
            assert found(buffer_of(second.region)) == filled(_3=4)

    remote.run(story())


def test_a_pipe_that_was_left_writes_no_more(remote: Place) -> None:
    async def story() -> None:
        async with exporting(remote.here, "d", 1) as exported:
            buffer = buffer_of(exported.region)
            async with remote.piped(exported.offer) as (pipe, _):
                pipe.write(pairs(*((number, number) for number in range(BLOCKS))))
            await exported.fence(WRITER, "r")
            buffer[:] = bytes(len(buffer))
            async with remote.piped(exported.offer) as (pipe, _):  # all that was sent before would come before this
                pipe.write(pairs((0, 3)))
                await pipe.flush()
            assert found(buffer) == filled(_3=1)

    remote.run(story())


def test_a_writer_whose_pipe_was_taken_back_is_told_and_writes_no_more(revocable: Place) -> None:
    async def story() -> None:
        async with exporting(revocable.here, "d", 1) as exported, revocable.piped(exported.offer) as (pipe, _):
            exported.kill(WRITER)
            await exported.fence(WRITER, "r")
            pipe.write(pairs((0, 0)))
            with pytest.raises(ConnectionLost):
                await pipe.flush()
            assert found(buffer_of(exported.region)) == filled()

    revocable.run(story())


def test_what_was_moved_is_counted_and_told(remote: Place) -> None:
    async def story() -> None:
        told: list[None] = []
        async with (
            exporting(remote.here, "d", 1) as exported,
            remote.piped(exported.offer, on_moved=lambda: told.append(None)) as (pipe, _),
        ):
            assert pipe.moved.blocks == pipe.moved.size_bytes == 0
            for blocks in (pairs((0, 0), (1, 1), (5, 9)), pairs((7, 2))):
                pipe.write(blocks)
                await pipe.flush()
            await asyncio.sleep(0.01)
            moved = pipe.moved
            assert (moved.blocks, moved.size_bytes) == (4, 4 * LAYOUT.block_bytes)
            assert moved.seconds > 0 and 3 <= moved.descriptors <= 4 and told

    remote.run(story())


def test_blocks_of_the_owner_are_read(remote: Place) -> None:
    async def story() -> None:
        async with (
            exporting(remote.here, "d", 1) as exported,
            remote.piped(exported.offer) as (pipe, own),
        ):
            theirs = buffer_of(exported.region)
            for number in range(BLOCKS):
                set_block(theirs, number, 100 + number)
            before = found(own)
            pipe.read(pairs((3, 30), (4, 31), (5, 2)))
            pipe.write(pairs((0, 0)))
            await pipe.flush()
            assert [found(own)[number] for number in (3, 4, 5)] == [130, 131, 102]
            assert [each for number, each in enumerate(found(own)) if number not in (3, 4, 5)] == [
                each for number, each in enumerate(before) if number not in (3, 4, 5)
            ]
            assert found(theirs) == [1, *range(101, 100 + BLOCKS)]

    remote.run(story())


def test_one_transfer_is_fenced_off_at_once_and_no_other(fenced: Place) -> None:
    async def story() -> None:
        async with (
            exporting(fenced.here, "d", 1) as exported,
            fenced.piped(exported.offer, request="a") as (one, _),
            fenced.piped(exported.offer, request="b") as (two, _),
        ):
            await exported.fence(WRITER, "a")
            one.write(pairs((1, 1)))
            with pytest.raises(ConnectionLost, match="took its memory back"):
                await one.flush()
            two.write(pairs((2, 2)))
            await two.flush()
            assert found(buffer_of(exported.region)) == filled(_2=3)
            async with fenced.piped(exported.offer, request="a") as (again, _):  # by the next who is of that name
                again.write(pairs((3, 3)))
                await again.flush()
            assert found(buffer_of(exported.region)) == filled(_2=3, _3=4)

    fenced.run(story())


def test_the_end_of_an_owner_is_told(remote: Place) -> None:
    async def story() -> None:
        export = exporting(remote.here, "d", 1)
        exported = await export.__aenter__()
        async with remote.piped(exported.offer) as (pipe, _):
            await export.__aexit__(None, None, None)
            pipe.write(pairs((0, 0)))
            with pytest.raises(ConnectionLost):
                await pipe.flush()

    remote.run(story())


def test_nobody_attaches_where_all_connect(remote: Place) -> None:
    async def story() -> None:
        async with exporting(remote.here, "d", 1) as exported:
            with pytest.raises(Refused, match="cannot compute in the memory of d"):
                remote.there.attach(exported.offer, WRITER)

    remote.run(story())


def test_there_is_no_shared_memory_to_name(remote: Place) -> None:
    assert remote.here.memory == remote.there.memory == ""
