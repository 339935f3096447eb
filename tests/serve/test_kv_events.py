"""The call that tells what a cache holds: whole, bounded towards slow readers, and in small bites for the router."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import reduce
from itertools import pairwise
from operator import xor

import msgspec
import numpy as np
import pytest

from penstock.blocks import BlockId, KvLayout
from penstock.cluster import Member
from penstock.kv.journal import Journal
from penstock.policy.prefix_index import Incarnation, PrefixIndex
from penstock.serve.kv_events import WINDOW, Change, Part, Teller, TellOptions
from penstock.serve.kv_watch import CallFeed, FollowOptions, KvWatch, Update
from penstock.serve.rpc import Call, Endpoint
from penstock.sim.loop import run_virtual
from penstock.wire.memory import MemoryNetwork
from tests.support import run

MEMBER = Member("w", 1, "any", "m", ("memory:w",), KvLayout(1, 1, 1, 16, "float32"), 8, 8, kv_events="call")
WHO: Incarnation = ("w", 1)

decode_update = msgspec.msgpack.Decoder(Part | Change).decode


def unpacked(hashes: bytes) -> list[int]:
    found: list[int] = np.frombuffer(hashes, "<u8").tolist()
    return found


@asynccontextmanager
async def router_to(journal: Journal, options: TellOptions = TellOptions()) -> AsyncIterator[Endpoint]:
    """The endpoint of a router, beside that of a worker with this journal."""
    network = MemoryNetwork()
    methods = {"kv_events": Teller(journal, options).tell}
    async with (
        Endpoint({"memory": network.wire("w")}, "", methods) as worker,
        worker.listen("memory:w"),
        Endpoint({"memory": network.wire("router")}, "", {}) as router,
    ):
        yield router


def fill(journal: Journal, blocks: range) -> None:
    for block in blocks:
        journal.stored(BlockId(block), block + 1)


async def next_update(call: Call) -> Update:
    update = await call.receive(decode_update)
    assert update is not None
    return update


def test_a_snapshot_comes_in_parts_and_then_what_changed_meanwhile() -> None:
    async def story() -> None:
        journal = Journal(100)
        fill(journal, range(10))
        async with router_to(journal, TellOptions(part_blocks=4)) as router:
            peer = await router.peer(MEMBER.addresses)
            async with peer.call("kv_events", None) as call:
                parts = [await next_update(call) for _ in range(3)]
                digest = reduce(xor, range(1, 11))
                assert parts == [
                    Part(
                        number, 3, np.arange(4 * number + 1, min(4 * number + 5, 11), dtype="<u8").tobytes(), 10, digest
                    )
                    for number in range(3)
                ]
                journal.evicted(BlockId(3))
                fill(journal, range(20, 22))
                change = await next_update(call)
                assert isinstance(change, Change)
                assert (unpacked(change.stored), unpacked(change.removed)) == ([21, 22], [4])
                assert (change.sequence, change.count, change.digest) == (1, 11, digest ^ 4 ^ 21 ^ 22)
                assert change.age_s == pytest.approx(0.02)
                audit = await next_update(call)
                assert audit == Change(2, b"", b"", change.count, change.digest)

    run_virtual(story())


def test_who_reads_nothing_is_sent_a_window_and_later_all_again() -> None:
    async def story() -> None:
        journal = Journal(1000, most_pending=50)
        async with router_to(journal) as router:
            peer = await router.peer(MEMBER.addresses)
            async with peer.call("kv_events", None) as call:
                for block in range(200):
                    fill(journal, range(block, block + 1))
                    await asyncio.sleep(0.05)
                updates = await call.receive_all(decode_update)
                assert len(updates) == WINDOW
                call.send(WINDOW)
                part = await next_update(call)
                assert isinstance(part, Part) and unpacked(part.hashes) == list(range(1, 201))

    run_virtual(story())


def test_a_large_snapshot_is_entered_in_small_bites_between_which_others_have_their_turn() -> None:
    async def story() -> None:
        journal, index = Journal(30_000), PrefixIndex()
        fill(journal, range(30_000))
        index.seat([WHO], [30_000])
        options = FollowOptions(turn_blocks=512)
        async with router_to(journal) as router:
            watch = KvWatch(router, {"call": lambda *found: CallFeed(*found, options)})
            watch.update({WHO: (MEMBER, index)})
            counts = [0]
            while counts[-1] < 30_000:
                await asyncio.sleep(0)
                counts.append(index.digest(WHO)[0])
            assert max(later - earlier for earlier, later in pairwise(counts)) == 512
            assert watch.metrics.snapshots == 1
            await watch.close()

    run(story())  # in virtual time nothing else happens while somebody has something to do


def test_who_left_is_followed_no_more_and_schemes_that_nobody_knows_are_left_alone() -> None:
    async def story() -> None:
        journal, index = Journal(100), PrefixIndex()
        other = msgspec.structs.replace(MEMBER, worker="o", kv_events="tcp://127.0.0.1:5557")
        index.seat([WHO, ("o", 1)], [100, 100])
        async with router_to(journal) as router:
            watch = KvWatch(router, {"call": CallFeed})
            watch.update({WHO: (MEMBER, index), ("o", 1): (other, index)})
            fill(journal, range(10))
            await asyncio.sleep(0.1)
            assert index.digest(WHO)[0] == 10
            index.seat([("o", 1)], [100])
            watch.update({("o", 1): (other, index)})
            fill(journal, range(10, 20))
            await asyncio.sleep(10.0)
            await watch.close()

    run_virtual(story())
