"""Calls: every message once and in order, or ConnectionLost; and whoever leaves is noticed."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from random import Random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock import clock
from penstock.errors import BadRequest, ConnectionLost, Overloaded, PenstockError, WireError
from penstock.serve.rpc import Call, Endpoint, Handler, Peer, RpcOptions
from penstock.sim.loop import run_virtual
from penstock.wire.memory import MemoryNetwork

decode_int = msgspec.msgpack.Decoder(int).decode


@asynccontextmanager
async def pair(
    methods: Mapping[str, Handler], network: MemoryNetwork, options: RpcOptions = RpcOptions()
) -> AsyncIterator[Peer]:
    """A client's peer to a server with these methods."""
    server = Endpoint({"memory": network.wire("server")}, "t", methods, options)
    client = Endpoint({"memory": network.wire("client")}, "t", {}, options)
    async with server, server.listen("memory:server"), client:
        yield await client.peer(["memory:server"])


async def count(call: Call) -> None:
    for number in range(decode_int(call.body)):
        call.send(number)
        await asyncio.sleep(0.01)


async def echo(call: Call) -> None:
    while (number := await call.receive(decode_int)) is not None:
        call.send(number)


async def read_all(call: Call) -> list[int]:
    numbers = []
    while (number := await call.receive(decode_int)) is not None:
        numbers.append(number)
    return numbers


def test_many_calls_share_a_connection() -> None:
    async def story() -> None:
        async with pair({"count": count}, MemoryNetwork()) as peer:

            async def one(n: int) -> list[int]:
                async with peer.call("count", n) as call:
                    return await read_all(call)

            assert await asyncio.gather(*(one(n) for n in range(20))) == [list(range(n)) for n in range(20)]

    run_virtual(story())


def test_messages_of_one_turn_travel_in_one_frame() -> None:
    async def story() -> None:
        frames: list[bytes] = []

        def weather(source: str, to: str, frame: bytes) -> list[float]:
            if source == "server":
                frames.append(frame)
            return [0.0]

        async def burst(call: Call) -> None:
            for number in range(100):
                call.send(number)

        async with pair({"burst": burst}, MemoryNetwork(weather)) as peer, peer.call("burst", None) as call:
            assert await read_all(call) == list(range(100))
        assert len(frames) == 1

    run_virtual(story())


def test_errors_arrive_as_they_were_raised() -> None:
    async def refuse(call: Call) -> None:
        raise Overloaded("too much", retry_after_s=7)

    async def bug(call: Call) -> None:
        raise ZeroDivisionError("oops")

    async def story() -> None:
        async with pair({"refuse": refuse, "bug": bug}, MemoryNetwork()) as peer:
            async with peer.call("refuse", None) as call:
                with pytest.raises(Overloaded, match="too much") as caught:
                    await call.receive(decode_int)
            assert caught.value.retry_after_s == 7
            async with peer.call("bug", None) as call:
                with pytest.raises(PenstockError, match="ZeroDivisionError: oops"):
                    await call.receive(decode_int)
            async with peer.call("nonsense", None) as call:
                with pytest.raises(BadRequest, match="no method 'nonsense' here; this process serves refuse, bug"):
                    await call.receive(decode_int)

    run_virtual(story())


def test_a_caller_that_leaves_cancels_the_handler_and_the_connection_lives_on() -> None:
    async def story() -> None:
        cancelled = asyncio.Event()

        async def endless(call: Call) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()

        async with pair({"endless": endless, "count": count}, MemoryNetwork()) as peer:
            async with peer.call("endless", None):
                await asyncio.sleep(1)
            await asyncio.wait_for(cancelled.wait(), 1)
            async with peer.call("count", 3) as call:
                assert await read_all(call) == [0, 1, 2]

    run_virtual(story())


def test_a_crash_ends_calls_on_both_sides() -> None:
    async def story() -> None:
        network = MemoryNetwork()
        async with pair({"echo": echo}, network) as peer, peer.call("echo", None) as call:
            call.send(1)
            assert await call.receive(decode_int) == 1
            network.crash("server")
            with pytest.raises(ConnectionLost):
                await call.receive(decode_int)
            assert not peer.is_open
            with pytest.raises(ConnectionLost):
                peer.call("echo", None)

    run_virtual(story())


def test_a_frozen_peer_is_noticed_and_an_idle_connection_is_not_beaten() -> None:
    async def story() -> None:
        frames: list[bytes] = []

        def weather(source: str, to: str, frame: bytes) -> list[float]:
            frames.append(frame)
            return [0.0]

        network = MemoryNetwork(weather)
        async with pair({"echo": echo}, network, RpcOptions(silence_s=5)) as peer:
            await asyncio.sleep(1000)
            assert not frames
            async with peer.call("echo", None) as call:
                network.freeze("server")
                started_s = clock.now()
                with pytest.raises(ConnectionLost, match="said nothing"):
                    await call.receive(decode_int)
                assert 5 <= clock.now() - started_s <= 7
            network.thaw("server")

    run_virtual(story())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_repeats_and_reordering_are_invisible(seed: int) -> None:
    async def story() -> None:
        rng = Random(seed)

        def weather(source: str, to: str, frame: bytes) -> list[float]:
            return [rng.random() * 0.2 for _ in range(1 + (rng.random() < 0.3))]

        async with pair({"count": count}, MemoryNetwork(weather)) as peer, peer.call("count", 30) as call:
            assert await read_all(call) == list(range(30))

    run_virtual(story())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_a_lost_frame_is_a_lost_connection_and_never_a_lost_message(seed: int) -> None:
    async def story() -> None:
        rng = Random(seed)

        def weather(source: str, to: str, frame: bytes) -> list[float]:
            return [] if rng.random() < 0.03 else [0.0]

        received: list[int] = []
        async with pair({"count": count}, MemoryNetwork(weather), RpcOptions(silence_s=3)) as peer:
            try:
                async with peer.call("count", 30) as call:
                    while (number := await call.receive(decode_int)) is not None:
                        received.append(number)
                assert len(received) == 30
            except ConnectionLost:
                pass
            assert received == list(range(len(received)))

    run_virtual(story())


def test_nobody_there_says_who_was_asked_for() -> None:
    async def story() -> None:
        client = Endpoint({"memory": MemoryNetwork().wire("client")}, "t", {})
        async with client:
            with pytest.raises(ConnectionLost, match="cannot reach memory:nobody or pigeon:x"):
                await client.peer(["memory:nobody", "pigeon:x"])

    run_virtual(story())


def test_a_call_left_in_the_turn_that_opened_it_is_forgotten() -> None:
    async def story() -> None:
        async with pair({"echo": echo}, MemoryNetwork()) as peer:
            async with peer.call("echo", None):
                pass
            await asyncio.sleep(100)  # were the call still served, the silence of its caller would end the connection
            assert peer.is_open

    run_virtual(story())


def test_all_who_want_a_peer_that_does_not_answer_wait_for_one_attempt() -> None:
    async def story() -> None:
        network = MemoryNetwork()
        async with pair({}, network), Endpoint({"memory": network.wire("other")}, "t", {}) as other:
            network.freeze("server")
            started_s = clock.now()
            outcomes = await asyncio.gather(*(other.peer(["memory:server"]) for _ in range(10)), return_exceptions=True)
            assert all(isinstance(outcome, ConnectionLost) for outcome in outcomes)
            assert clock.now() - started_s < 6

    run_virtual(story())


def test_one_who_stops_waiting_for_a_peer_takes_it_from_nobody_else() -> None:
    async def story() -> None:
        network = MemoryNetwork()
        async with pair({}, network), Endpoint({"memory": network.wire("other")}, "t", {}) as other:
            network.freeze("server")
            first, second = (asyncio.create_task(other.peer(["memory:server"])) for _ in range(2))
            await asyncio.sleep(1)
            first.cancel()
            network.thaw("server")
            assert (await second).is_open

    run_virtual(story())


def test_a_lost_peer_is_not_remembered() -> None:
    async def story() -> None:
        network = MemoryNetwork()
        server = Endpoint({"memory": network.wire("server")}, "t", {})
        async with Endpoint({"memory": network.wire("client")}, "t", {}) as client:
            async with server, server.listen("memory:server"):
                remembered = weakref.ref(await client.peer(["memory:server"]))
            await asyncio.sleep(1)
            gc.collect()
            assert remembered() is None

    run_virtual(story())


def test_what_handlers_start_while_an_endpoint_closes_ends_as_well() -> None:
    async def story() -> None:
        async def leaves_work(call: Call) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                server.spawn(asyncio.sleep(1_000))

        network = MemoryNetwork()
        server = Endpoint({"memory": network.wire("server")}, "t", {"leaves_work": leaves_work})
        async with Endpoint({"memory": network.wire("client")}, "t", {}) as client:
            async with server, server.listen("memory:server"):
                peer = await client.peer(["memory:server"])
                peer.call("leaves_work", None)
                await asyncio.sleep(1)
            assert asyncio.all_tasks() == {asyncio.current_task()}

    run_virtual(story())


def test_an_item_that_cannot_be_read_is_an_error_of_the_peer() -> None:
    async def babble(call: Call) -> None:
        call.send("no number")

    async def story() -> None:
        async with pair({"babble": babble}, MemoryNetwork()) as peer, peer.call("babble", None) as call:
            with pytest.raises(WireError, match="memory:server"):
                await call.receive(decode_int)

    run_virtual(story())
