"""What is particular to the memory wire: weather, and the misfortunes of endpoints. On virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from contextvars import copy_context
from random import Random

import pytest

from penstock import clock
from penstock.errors import AddressInUse, ConnectionLost, Refused
from penstock.sim.loop import run_virtual, skew_s
from penstock.wire.api import MAX_BACKLOG_BYTES, Connection, Wire
from penstock.wire.memory import MemoryNetwork
from tests.wire.tap import Tap, connected

TOKEN = "token"


@asynccontextmanager
async def pair(network: MemoryNetwork) -> AsyncIterator[tuple[Connection, Connection]]:
    async with connected(network.wire("a"), network.wire("b"), "memory:b", TOKEN) as ends:
        yield ends


def numbered(*numbers: int) -> list[bytes]:
    return [b"%d" % number for number in numbers]


def test_the_weather_sees_source_destination_and_frame_and_nothing_else() -> None:
    seen = []

    def weather(source: str, destination: str, frame: bytes) -> Sequence[float]:
        seen.append((source, destination, frame))
        return (0.0,)

    async def story() -> None:
        async with pair(MemoryNetwork(weather)) as (near, far):
            at_near, at_far = Tap(near), Tap(far)
            near.send_nowait(b"there")
            far.send_nowait(b"and back")
            await at_far.wait_frames(1)
            await at_near.wait_frames(1)

    run_virtual(story())
    assert seen == [("a", "b", b"there"), ("b", "a", b"and back")]


def test_what_arrives_is_dealt_with_by_the_clock_of_who_receives_it() -> None:
    skews_s = {"a": 1_000.0, "b": -500.0}
    network = MemoryNetwork(lambda *_: (1.0,))

    def wire(name: str) -> Wire:
        context = copy_context()
        context.run(skew_s.set, skews_s[name])
        return context.run(network.wire, name)

    async def story() -> None:
        read_s: dict[str, float] = {}
        async with connected(wire("a"), wire("b"), "memory:b", TOKEN) as (near, far):
            at_near = Tap(near, on_frame=lambda _: read_s.update(a=clock.now()))
            at_far = Tap(far, on_frame=lambda _: read_s.update(b=clock.now()))
            near.send_nowait(b"there")
            await at_far.wait_frames(1)
            network.freeze("a")  # what waits for the thaw is no different
            far.send_nowait(b"and back")
            await asyncio.sleep(2.0)
            network.thaw("a")
            await at_near.wait_frames(1)
            assert read_s == {"a": clock.now() + 1_000.0, "b": 1.0 - 500.0}

    run_virtual(story())


def test_frames_are_delayed() -> None:
    async def story() -> None:
        async with pair(MemoryNetwork(lambda *_: (2.5,))) as (near, far):
            arrivals: list[float] = []
            tap = Tap(far, on_frame=lambda _: arrivals.append(clock.now()))
            start_s = clock.now()
            near.send_nowait(b"0")
            await asyncio.sleep(1.0)
            near.send_nowait(b"1")
            await tap.wait_frames(2)
            assert [at_s - start_s for at_s in arrivals] == [2.5, 3.5]

    run_virtual(story())


def test_frames_are_dropped_duplicated_and_reordered() -> None:
    delays = {b"0": (3.0,), b"1": (), b"2": (1.0, 4.0), b"3": (2.0,)}

    async def story() -> None:
        async with pair(MemoryNetwork(lambda _, __, frame: delays[frame])) as (near, far):
            tap = Tap(far)
            for frame in delays:
                near.send_nowait(frame)
            near.close()
            await tap.wait_end()
            assert tap.frames == numbered(2, 3, 0, 2)  # and the end after the last copy

    run_virtual(story())


def test_frames_that_land_together_keep_their_order() -> None:
    async def story() -> None:
        async with pair(MemoryNetwork(lambda *_: (1.0,))) as (near, far):
            tap = Tap(far)
            for number in range(100):
                near.send_nowait(b"%d" % number)
            assert await tap.wait_frames(100) == numbered(*range(100))

    run_virtual(story())


def test_one_seed_gives_one_history() -> None:
    async def story(seed: int) -> list[bytes]:
        rng = Random(seed)

        def weather(*_: object) -> Sequence[float]:
            return [rng.random() for _ in range(rng.randrange(3))]

        async with pair(MemoryNetwork(weather)) as (near, far):
            tap = Tap(far)
            for number in range(200):
                near.send_nowait(b"%d" % number)
            near.close()
            await tap.wait_end()
            return tap.frames

    assert run_virtual(story(1)) == run_virtual(story(1)) != run_virtual(story(2))


def test_the_weather_may_change() -> None:
    async def story() -> None:
        network = MemoryNetwork()
        async with pair(network) as (near, far):
            tap = Tap(far)
            network.weather = lambda *_: ()
            near.send_nowait(b"lost")
            network.weather = lambda *_: (0.0,)
            near.send_nowait(b"found")
            assert await tap.wait_frames(1) == [b"found"]

    run_virtual(story())


def test_a_chain_of_instant_answers_lets_others_run() -> None:
    async def story() -> None:
        async with pair(MemoryNetwork()) as (near, far):
            Tap(near, on_frame=near.send_nowait)
            Tap(far, on_frame=far.send_nowait)
            near.send_nowait(b"for ever")
            for _ in range(10):
                await asyncio.sleep(0)

    run_virtual(story())


# Crash


def test_a_crash_ends_the_peers_connection_after_what_was_sent() -> None:
    async def story() -> None:
        network = MemoryNetwork(lambda *_: (1.0,))
        async with pair(network) as (near, far):
            at_near, at_far = Tap(near), Tap(far)
            near.send_nowait(b"never heard")
            far.send_nowait(b"last words")
            network.crash("b")
            assert "died" in await at_near.wait_end()
            assert at_near.frames == [b"last words"]
            await asyncio.sleep(10.0)
            assert at_far.frames == at_far.reasons == []  # the dead are told nothing
            with pytest.raises(ConnectionLost, match="crashed"):
                far.send_nowait(b"from beyond")

    run_virtual(story())


def test_a_crashed_endpoint_listens_no_more_and_its_successor_may() -> None:
    async def story() -> None:
        network = MemoryNetwork()
        async with network.wire("b").listen("memory:b", TOKEN, lambda _: None):
            network.crash("b")
            network.crash("b")  # as idempotent as death
            with pytest.raises(Refused, match="nobody listens"):
                await network.wire("a").connect("memory:b", TOKEN)
            async with network.wire("b").listen("memory:b", TOKEN, lambda _: None):
                await network.wire("a").connect("memory:b", TOKEN)
        with pytest.raises(Refused):
            await network.wire("a").connect("memory:b", TOKEN)

    run_virtual(story())


def test_the_end_of_a_dead_listener_leaves_its_successor_alone() -> None:
    async def story() -> None:
        network = MemoryNetwork()
        old = network.wire("b").listen("memory:b", TOKEN, lambda _: None)
        await old.__aenter__()
        network.crash("b")
        async with network.wire("b").listen("memory:b", TOKEN, lambda _: None):
            await old.__aexit__(None, None, None)
            await network.wire("a").connect("memory:b", TOKEN)
            with pytest.raises(AddressInUse, match="in use by b"):
                async with network.wire("c").listen("memory:b", TOKEN, lambda _: None):
                    pytest.fail("two listeners at one address")

    run_virtual(story())


def test_the_dead_connect_to_nobody() -> None:
    async def story() -> None:
        network = MemoryNetwork()
        accepted: list[Connection] = []
        wire = network.wire("a")
        async with network.wire("b").listen("memory:b", TOKEN, accepted.append):
            network.crash("a")
            with pytest.raises(ConnectionLost):
                await wire.connect("memory:b", TOKEN)
        assert accepted == []

    run_virtual(story())


# Cut


def test_a_cut_ends_both_sides_and_spares_the_endpoint() -> None:
    async def story() -> None:
        network = MemoryNetwork(lambda *_: (1.0,))
        async with pair(network) as (near, far):
            at_near, at_far = Tap(near), Tap(far)
            near.send_nowait(b"lost on the way")
            network.cut("b")
            assert "cut" in await at_near.wait_end()
            assert "cut" in await at_far.wait_end()
            again = await network.wire("a").connect("memory:b", TOKEN)
            again.send_nowait(b"x")
            await asyncio.sleep(10.0)
            assert at_far.frames == []

    run_virtual(story())


# Freeze


def test_a_frozen_endpoint_receives_and_sends_after_its_thaw() -> None:
    async def story() -> None:
        network = MemoryNetwork()
        async with pair(network) as (near, far):
            at_near, at_far = Tap(near), Tap(far)
            network.freeze("b")
            for number in range(3):
                near.send_nowait(b"%d" % number)
                far.send_nowait(b"%d" % number)
            await asyncio.sleep(100.0)
            assert at_near.frames == at_far.frames == []
            network.thaw("b")
            near.send_nowait(b"3")
            far.send_nowait(b"3")
            assert await at_near.wait_frames(4) == numbered(0, 1, 2, 3)
            assert await at_far.wait_frames(4) == numbered(0, 1, 2, 3)

    run_virtual(story())


def test_a_thaw_may_be_followed_by_a_freeze_at_once() -> None:
    async def story() -> None:
        network = MemoryNetwork()
        async with pair(network) as (near, far):
            tap = Tap(far)
            network.freeze("b")
            near.send_nowait(b"0")
            network.thaw("b")
            network.freeze("b")
            await asyncio.sleep(1.0)
            assert tap.frames == []
            network.thaw("b")
            await tap.wait_frames(1)

    run_virtual(story())


def test_the_end_of_a_connection_waits_for_the_thaw_too() -> None:
    async def story() -> None:
        network = MemoryNetwork()
        async with pair(network) as (near, far):
            tap = Tap(far)
            network.freeze("b")
            near.send_nowait(b"last words")
            near.close()
            await asyncio.sleep(100.0)
            assert tap.reasons == []
            far.send_nowait(b"into the void")  # the frozen one knows nothing yet
            network.thaw("b")
            assert "a closed" in await tap.wait_end()
            assert tap.frames == [b"last words"]

    run_virtual(story())


def test_connecting_to_a_frozen_endpoint_takes_until_its_thaw() -> None:
    async def story() -> None:
        network = MemoryNetwork()
        accepted: list[Connection] = []
        async with network.wire("b").listen("memory:b", TOKEN, accepted.append):
            network.freeze("b")
            with pytest.raises(ConnectionLost, match="no answer within 5 s"):
                await network.wire("a").connect("memory:b", TOKEN)
            assert accepted == []
            connecting = asyncio.create_task(network.wire("a").connect("memory:b", TOKEN))
            await asyncio.sleep(1.0)
            network.thaw("b")
            tap = Tap(await connecting)
            given_up, taken = (Tap(connection) for connection in accepted)
            await given_up.wait_end()
            assert taken.reasons == tap.reasons == []

    run_virtual(story())


def test_a_frozen_endpoint_is_cut_when_too_much_waits_for_it() -> None:
    async def story() -> None:
        network = MemoryNetwork()
        async with pair(network) as (near, far):
            tap = Tap(far)
            network.freeze("b")
            for _ in range(MAX_BACKLOG_BYTES // (1 << 20) + 1):
                near.send_nowait(bytes(1 << 20))
            with pytest.raises(ConnectionLost):
                near.send_nowait(b"")
            network.thaw("b")
            await tap.wait_end()

    run_virtual(story())


def test_a_dropped_frame_waits_for_nobody() -> None:
    async def story() -> None:
        async with pair(MemoryNetwork(lambda *_: ())) as (near, _):
            for _ in range(2 * MAX_BACKLOG_BYTES // (1 << 20)):
                near.send_nowait(bytes(1 << 20))

    run_virtual(story())


def test_a_frozen_endpoint_can_crash() -> None:
    async def story() -> None:
        network = MemoryNetwork()
        async with pair(network) as (near, far):
            tap = Tap(near)
            network.freeze("b")
            far.send_nowait(b"never left")
            network.crash("b")
            assert "died" in await tap.wait_end()
            assert tap.frames == []

    run_virtual(story())
