"""What every wire promises. Each test runs on every backend, and on every event loop that the backend works on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
import uvloop

from penstock import wire
from penstock.errors import AddressInUse, ConnectionLost, FrameTooLarge, Refused
from penstock.sim.loop import run_virtual
from penstock.wire.api import MAX_BACKLOG_BYTES, MAX_FRAME_BYTES, Connection, Wire
from penstock.wire.memory import MemoryNetwork
from penstock.wire.stream import StreamWire
from tests.support import errors_of_loop, run
from tests.wire.tap import Tap, connected

TOKEN = "the right token"


def run_uvloop(coroutine: Coroutine[Any, Any, None]) -> None:
    run(coroutine, loop_factory=uvloop.new_event_loop)


@dataclass(frozen=True)
class Place:
    """A backend: two processes' wires, addresses to listen at, and a loop to run on."""

    run: Callable[[Coroutine[Any, Any, None]], None]
    here: Wire
    there: Wire
    addresses: tuple[str, str]


def memory(_: Path) -> tuple[Wire, Wire, tuple[str, str]]:
    network = MemoryNetwork()
    return network.wire("here"), network.wire("there"), ("memory:one", "memory:two")


def tcp(_: Path) -> tuple[Wire, Wire, tuple[str, str]]:
    return StreamWire(), StreamWire(), ("tcp:127.0.0.1:0", "tcp:localhost:0")


def unix(folder: Path) -> tuple[Wire, Wire, tuple[str, str]]:
    return StreamWire(), StreamWire(), (f"unix:{folder}/one", f"unix:{folder}/two")


def abstract(folder: Path) -> tuple[Wire, Wire, tuple[str, str]]:
    return StreamWire(), StreamWire(), (f"unix:@{folder}/one", f"unix:@{folder}/two")


PLACES = {
    "memory": (memory, run),
    "memory-virtual": (memory, run_virtual),
    "tcp": (tcp, run),
    "tcp-uvloop": (tcp, run_uvloop),
    "unix": (unix, run),
    "unix-uvloop": (unix, run_uvloop),
    "abstract": (abstract, run),
    "abstract-uvloop": (abstract, run_uvloop),
}


def test_every_backend_is_here() -> None:
    modules = {path.stem for path in Path(wire.__file__).parent.glob("[a-z]*.py")}
    assert modules - {"api", "inbox", "sockets", "zmq_events", "zmq_publisher"} == {"memory", "stream"}


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    make, runner = PLACES[request.param]
    return Place(runner, *make(tmp_path))


def test_frames_arrive_in_order_both_ways_at_once(place: Place) -> None:
    async def story() -> None:
        async with connected(place.here, place.there, place.addresses[0], TOKEN) as (near, far):
            at_near, at_far = Tap(near), Tap(far)
            for number in range(10_000):
                near.send_nowait(b"to far %d" % number)
                far.send_nowait(b"to near %d" % number)
                if number % 100 == 0:
                    await asyncio.sleep(0)
            assert await at_far.wait_frames(10_000) == [b"to far %d" % number for number in range(10_000)]
            assert await at_near.wait_frames(10_000) == [b"to near %d" % number for number in range(10_000)]

    place.run(story())


def test_frames_of_any_size_arrive_whole(place: Place) -> None:
    async def story() -> None:
        rng = Random(1)
        sizes = [0, 1, 2, 3, 4, 5, 255, 65_535, 65_536, 300_000, 8 << 20, 1, 0]
        frames = [rng.randbytes(size) for size in sizes]
        async with connected(place.here, place.there, place.addresses[0], TOKEN) as (near, far):
            at_far = Tap(far)
            for frame in frames:
                near.send_nowait(frame)
            assert await at_far.wait_frames(len(frames)) == frames

    place.run(story())


def test_frames_wait_for_their_receiver(place: Place) -> None:
    async def story() -> None:
        async with connected(place.here, place.there, place.addresses[0], TOKEN) as (near, far):
            echo = Tap(near)
            for number in range(5):
                near.send_nowait(b"early %d" % number)
            far.send_nowait(b"go")
            await echo.wait_frames(1)
            late = Tap(far)
            assert late.frames == []  # nothing is handed over inside on_frame
            near.send_nowait(b"late")
            assert await late.wait_frames(6) == [b"early %d" % number for number in range(5)] + [b"late"]

    place.run(story())


def test_the_end_waits_for_its_receiver_too(place: Place) -> None:
    async def story() -> None:
        async with connected(place.here, place.there, place.addresses[0], TOKEN) as (near, far):
            at_near = Tap(near)
            near.send_nowait(b"last words")
            near.close()
            await at_near.wait_end()
            at_far = Tap(far)
            await at_far.wait_end()
            assert at_far.frames == [b"last words"]

    place.run(story())


def test_a_wrong_token_is_refused_and_disturbs_nobody(place: Place) -> None:
    async def story() -> None:
        accepted: asyncio.Queue[Connection] = asyncio.Queue()
        async with place.there.listen(place.addresses[0], TOKEN, accepted.put_nowait) as address:
            for wrong in ("a wrong token", "", TOKEN + " "):
                with pytest.raises(Refused, match=r"token.*PENSTOCK_TOKEN"):
                    await place.here.connect(address, wrong)
            assert accepted.empty()
            await place.here.connect(address, TOKEN)
            await accepted.get()

    place.run(story())


def test_nobody_listening_is_refused(place: Place) -> None:
    async def story() -> None:
        async with place.there.listen(place.addresses[0], TOKEN, lambda _: None) as address:
            pass
        with pytest.raises(Refused, match="nobody listens"):
            await place.here.connect(address, TOKEN)

    place.run(story())


def test_what_is_no_address_is_refused(place: Place) -> None:
    async def story() -> None:
        for address in ("", "nowhere", "tcp:", "tcp:host", "tcp:127.0.0.1:http", "tcp:127.0.0.1:65536", "unix:"):
            with pytest.raises(Refused):
                await place.here.connect(address, TOKEN)

    place.run(story())


def test_an_oversized_frame_is_refused_and_the_connection_goes_on(place: Place) -> None:
    async def story() -> None:
        async with connected(place.here, place.there, place.addresses[0], TOKEN) as (near, far):
            at_far = Tap(far)
            with pytest.raises(FrameTooLarge, match=str(MAX_FRAME_BYTES)):
                near.send_nowait(bytes(MAX_FRAME_BYTES + 1))
            near.send_nowait(b"small")
            assert await at_far.wait_frames(1) == [b"small"]

    place.run(story())


def test_close_delivers_what_was_sent_and_then_ends_both_sides_once(place: Place) -> None:
    async def story() -> None:
        async with connected(place.here, place.there, place.addresses[0], TOKEN) as (near, far):
            at_near, at_far = Tap(near), Tap(far)
            frames = [bytes([number]) * 100_000 for number in range(100)]
            for frame in frames:
                far.send_nowait(b"unread by the one who closes")
                near.send_nowait(frame)
            near.close()
            near.close()
            assert at_near.reasons == []  # nobody is called inside close
            await at_near.wait_end()
            await at_far.wait_end()
            assert at_far.frames == frames
            far.close()
        assert len(at_near.reasons) == len(at_far.reasons) == 1

    place.run(story())


def test_nothing_is_handed_over_after_close(place: Place) -> None:
    async def story() -> None:
        async with connected(place.here, place.there, place.addresses[0], TOKEN) as (near, far):
            at_far = Tap(far, on_frame=lambda _: far.close())
            for number in range(100):
                near.send_nowait(b"%d" % number)
            await at_far.wait_end()
            assert at_far.frames == [b"0"]

    place.run(story())


def test_sending_after_the_end_raises(place: Place) -> None:
    async def story() -> None:
        async with connected(place.here, place.there, place.addresses[0], TOKEN) as (near, far):
            at_far = Tap(far)
            near.close()
            with pytest.raises(ConnectionLost, match="closed here"):
                near.send_nowait(b"too late")
            await at_far.wait_end()
            with pytest.raises(ConnectionLost, match="closed"):
                far.send_nowait(b"too late")

    place.run(story())


def test_both_sides_may_close_at_once(place: Place) -> None:
    async def story() -> None:
        async with connected(place.here, place.there, place.addresses[0], TOKEN) as (near, far):
            at_near, at_far = Tap(near), Tap(far)
            near.close()
            far.close()
            await at_near.wait_end()
            await at_far.wait_end()

    place.run(story())


def test_a_peer_that_takes_nothing_is_cut(place: Place) -> None:
    async def story() -> None:
        async with connected(place.here, place.there, place.addresses[0], TOKEN) as (near, far):
            at_near = Tap(near)
            frame = bytes(1 << 20)
            limit = 2 * MAX_BACKLOG_BYTES // len(frame)
            with pytest.raises(ConnectionLost, match="to read"):
                for _ in range(limit):
                    near.send_nowait(frame)
                    await asyncio.sleep(0)
            await at_near.wait_end()
            await Tap(far).wait_end()

    place.run(story())


def test_the_largest_frame_fits_the_backlog(place: Place) -> None:
    async def story() -> None:
        async with connected(place.here, place.there, place.addresses[0], TOKEN) as (near, far):
            at_far = Tap(far)
            near.send_nowait(bytes(MAX_FRAME_BYTES))
            near.send_nowait(b"next")
            assert [len(frame) for frame in await at_far.wait_frames(2)] == [MAX_FRAME_BYTES, 4]

    place.run(story())


def test_listeners_do_not_mix(place: Place) -> None:
    async def story() -> None:
        first, second = place.addresses
        async with (
            connected(place.here, place.there, first, TOKEN) as (near_1, far_1),
            connected(place.here, place.there, second, "another token") as (near_2, far_2),
        ):
            at_far_1, at_far_2 = Tap(far_1), Tap(far_2)
            near_1.send_nowait(b"first")
            near_2.send_nowait(b"second")
            assert await at_far_1.wait_frames(1) == [b"first"]
            assert await at_far_2.wait_frames(1) == [b"second"]

    place.run(story())


def test_an_address_is_taken_once_and_free_again_afterwards(place: Place) -> None:
    async def story() -> None:
        async with place.there.listen(place.addresses[0], TOKEN, lambda _: None) as address:
            with pytest.raises(AddressInUse):
                async with place.here.listen(address, TOKEN, lambda _: None):
                    pytest.fail("two listeners at one address")
            await place.here.connect(address, TOKEN)
        async with place.here.listen(address, TOKEN, lambda _: None) as again:
            assert again == address

    place.run(story())


def test_connections_end_with_their_listener(place: Place) -> None:
    async def story() -> None:
        async with connected(place.here, place.there, place.addresses[0], TOKEN) as (near, far):
            at_near, at_far = Tap(near), Tap(far)
            far.send_nowait(b"last words")
        await at_near.wait_end()
        await at_far.wait_end()
        assert at_near.frames == [b"last words"]

    place.run(story())


def test_what_the_block_raises_passes_unchanged(place: Place) -> None:
    async def story() -> None:
        with pytest.raises(ZeroDivisionError):
            async with place.there.listen(place.addresses[0], TOKEN, lambda _: None) as address:
                await place.here.connect(address, TOKEN)
                raise ZeroDivisionError

    place.run(story())


def test_a_failing_receiver_ends_its_connection_and_is_reported(place: Place) -> None:
    async def story() -> None:
        def fail(_: bytes) -> None:
            raise ValueError("cannot read this")

        accepted: asyncio.Queue[Connection] = asyncio.Queue()
        async with place.there.listen(place.addresses[0], TOKEN, accepted.put_nowait) as address:
            bad = await place.here.connect(address, TOKEN)
            at_bad, failing = Tap(bad), Tap(await accepted.get(), on_frame=fail)
            good = await place.here.connect(address, TOKEN)
            at_good, working = Tap(good), Tap(await accepted.get())
            with errors_of_loop() as errors:
                bad.send_nowait(b"x")
                bad.send_nowait(b"y")
                await failing.wait_end()
                await at_bad.wait_end()
            assert [str(error) for error in errors] == ["cannot read this"]
            assert "cannot read this" in failing.reasons[0]
            good.send_nowait(b"z")
            assert await working.wait_frames(1) == [b"z"]
            assert at_good.reasons == []

    place.run(story())


def test_a_failing_listener_ends_the_connection_and_is_reported(place: Place) -> None:
    async def story() -> None:
        def fail(_: Connection) -> None:
            raise ValueError("no room")

        async with place.there.listen(place.addresses[0], TOKEN, fail) as address:
            with errors_of_loop() as errors:
                for _ in range(2):
                    await Tap(await place.here.connect(address, TOKEN)).wait_end()
            assert [str(error) for error in errors] == ["no room", "no room"]

    place.run(story())
