"""Which way a transfer takes, and what becomes of it when that fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest

from penstock.blocks import BlockId, KvLayout, Region
from penstock.errors import ConnectionLost, PenstockError, Refused
from penstock.policy.latency.transfers import over
from penstock.serve.paths import Conduit, PathOptions, Paths
from penstock.sim.loop import run_virtual
from penstock.transport.api import Attached, Exported, Limits, Moved, Offer, Pipe
from penstock.transport.memory import MemoryHub, MemoryTransport, heap_region

LAYOUT = KvLayout(1, 1, 1, 16, "uint64")
REGION = Region("p", 1, LAYOUT, 64, None)
BLOCK_S = 0.01


class Way:
    """A transport that moves a block in `BLOCK_S` and breaks after `lasts` blocks. Remembers what it was asked."""

    memory = ""

    def __init__(self, name: str, log: list[object], lasts: int = 10_000, bytes_per_s: float = 1e9) -> None:
        self.name = name
        self.limits = Limits(is_fenced=True, prior=over(1e-4, 1e-6, bytes_per_s))
        self.lasts = lasts
        self.log = log

    def export(self, region: Region) -> AbstractAsyncContextManager[Exported]:
        raise NotImplementedError

    def attach(self, offer: Offer, writer: str) -> AbstractAsyncContextManager[Attached]:
        raise NotImplementedError

    @asynccontextmanager
    async def connect(
        self, offer: Offer, source: Region, writer: str, request: str, on_moved: Callable[[], None]
    ) -> AsyncIterator[Pipe]:
        if self.lasts <= 0:
            raise Refused(f"{self.name} is not there")
        self.log.append(f"{self.name} opened for {request}")
        yield Moving(self)
        self.log.append(f"{self.name} left")


class Moving:
    def __init__(self, way: Way) -> None:
        self.moved = Moved()
        self._way = way
        self._waiting: list[tuple[str, BlockId]] = []

    def write(self, blocks: Sequence[tuple[BlockId, BlockId]]) -> None:
        self._waiting += [("write", here) for here, _ in blocks]

    def read(self, blocks: Sequence[tuple[BlockId, BlockId]]) -> None:
        self._waiting += [("read", here) for here, _ in blocks]

    async def flush(self) -> None:
        while self._waiting:
            await asyncio.sleep(BLOCK_S)
            if self._way.lasts <= 0:
                raise ConnectionLost(f"{self._way.name} broke")
            self._way.lasts -= 1
            kind, block = self._waiting.pop(0)
            self._way.log.append((self._way.name, kind, block))
            moved = self.moved
            blocks = moved.blocks + (kind == "write")
            self.moved = Moved(
                blocks, moved.size_bytes + LAYOUT.block_bytes, moved.seconds + BLOCK_S, moved.descriptors + 1
            )


def offers(*ways: Way) -> list[Offer]:
    return [Offer(way.name, "d", 1, "", LAYOUT, 64) for way in ways]


def pairs(*blocks: int) -> list[tuple[BlockId, BlockId]]:
    return [(BlockId(block), BlockId(block)) for block in blocks]


def conduit(paths: Paths, ways: Sequence[Way], log: list[object]) -> AbstractAsyncContextManager[Conduit]:
    async def agree(left: str, transfer: str) -> None:
        await asyncio.sleep(BLOCK_S)
        log.append(f"agreed to {transfer} after {left}")

    return paths.connect(offers(*ways), REGION, "p:1", "r", 8, agree, lambda: None)


def test_the_way_that_should_be_quickest_is_taken_and_what_is_measured_counts() -> None:
    async def story() -> None:
        log: list[object] = []
        slow, fast = Way("slow", log, bytes_per_s=1e5), Way("fast", log, bytes_per_s=1e9)
        paths = Paths([slow, fast])
        for _ in range(30):
            async with conduit(paths, [slow, fast], log) as pipe:
                pipe.write(pairs(1, 2, 3))
                await pipe.flush()
        assert log[0] == "fast opened for r#1"  # by what was believed of it
        assert "slow opened for r#1" in log  # 12.8 kB/s is what both do

    run_virtual(story())


def test_a_way_that_breaks_is_replaced_from_the_block_that_failed_once_the_owner_agreed() -> None:
    async def story() -> None:
        log: list[object] = []
        first, second = Way("first", log, lasts=2), Way("second", log, bytes_per_s=1e8)
        async with conduit(Paths([first, second]), [first, second], log) as pipe:
            pipe.write(pairs(1, 2, 3))
            pipe.write(pairs(4))
            await asyncio.sleep(3.5 * BLOCK_S)
            pipe.write(pairs(5))  # while the owner is asked
            assert not pipe.is_at_rest
            await pipe.flush()
            assert (pipe.transport, pipe.moved.blocks, pipe.is_at_rest) == ("second", 5, True)
        written = [("first", "write", 1), ("first", "write", 2)] + [("second", "write", block) for block in (3, 4, 5)]
        assert log == [
            "first opened for r#1",
            *written[:2],
            "first left",
            "second opened for r#2",
            "agreed to r#2 after r#1",
            *written[2:],
            "second left",
        ]

    run_virtual(story())


def test_reads_that_may_not_be_in_place_are_asked_for_again() -> None:
    async def story() -> None:
        log: list[object] = []
        first, second = Way("first", log, lasts=1), Way("second", log, bytes_per_s=1e8)
        async with conduit(Paths([first, second]), [first, second], log) as pipe:
            pipe.read(pairs(1, 2))
            await pipe.flush()
        assert [each for each in log if each[1] == "read"] == [
            ("first", "read", 1),
            ("second", "read", 1),
            ("second", "read", 2),
        ]

    run_virtual(story())


def test_without_a_way_that_works_flush_says_what_failed() -> None:
    async def story() -> None:
        log: list[object] = []
        first, second = Way("first", log, lasts=1), Way("second", log, lasts=0)
        async with conduit(Paths([first, second]), [first, second], log) as pipe:
            pipe.write(pairs(1, 2))
            with pytest.raises(ConnectionLost, match=r"first: first broke; second: second is not there"):
                await pipe.flush()
            with pytest.raises(ConnectionLost):
                pipe.check()

    run_virtual(story())


def test_a_way_that_failed_cools_down_longer_each_time_and_comes_back() -> None:
    async def story() -> None:
        log: list[object] = []
        first, second = Way("first", log, lasts=0), Way("second", log, bytes_per_s=1e8)
        paths = Paths([first, second], PathOptions(cool_down_s=2.0))

        async def way_taken() -> str:
            async with conduit(paths, [first, second], log) as pipe:
                return pipe.transport

        assert await way_taken() == "second"  # fails, cools for 2 s
        await asyncio.sleep(2.1)
        assert await way_taken() == "second"  # fails again, cools for 4 s
        first.lasts = 100
        await asyncio.sleep(2.1)
        assert await way_taken() == "second"
        await asyncio.sleep(2.1)
        assert await way_taken() == "first"

    run_virtual(story())


def test_a_lone_way_that_cools_is_tried_all_the_same() -> None:
    async def story() -> None:
        log: list[object] = []
        way = Way("only", log, lasts=0)
        paths = Paths([way])
        for lasts in (0, 10):
            way.lasts = lasts
            try:
                async with conduit(paths, [way], log) as pipe:
                    assert pipe.transport == "only" and lasts
            except PenstockError:
                assert not lasts

    run_virtual(story())


def test_what_nobody_here_can_reach_is_refused_by_name() -> None:
    paths = Paths([Way("tcp", [])])
    with pytest.raises(Refused, match="offered over rdma, here is tcp"):
        paths.expect_s(offers(Way("rdma", [])), 1)


def test_a_region_in_the_same_memory_is_found_unless_attaching_failed_a_moment_ago() -> None:
    async def story() -> None:
        hub, elsewhere = MemoryHub(), MemoryHub("h1")
        paths = Paths([MemoryTransport(hub)])
        async with heap_region("d", 1, LAYOUT, 4) as region:
            async with MemoryTransport(elsewhere).export(region) as exported:
                assert paths.find_in_place([exported.offer]) is None
            async with MemoryTransport(hub).export(region) as exported:
                assert paths.find_in_place([exported.offer]) == exported.offer
                async with paths.attach(exported.offer, "p:1"):
                    pass
            with pytest.raises(Refused):
                async with paths.attach(exported.offer, "p:1"):
                    pass
            assert paths.find_in_place([exported.offer]) is None
            await asyncio.sleep(3)
            assert paths.find_in_place([exported.offer]) is not None

    run_virtual(story())
