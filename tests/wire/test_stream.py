"""What is particular to sockets: hostile, half and dead peers, files, and the shape of the byte stream."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import struct
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock import auth
from penstock.errors import AddressInUse, ConnectionLost, FrameTooLarge, Refused, SetupError
from penstock.wire import stream
from penstock.wire.api import MAX_FRAME_BYTES, Connection
from penstock.wire.stream import FrameSplitter, StreamWire
from tests.support import run
from tests.wire.tap import Tap, connected

TOKEN = "token"
GREETING_BYTES = 42


def framed(*frames: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(frame)) + frame for frame in frames)


@contextmanager
def stranger(address: str) -> Iterator[socket.socket]:
    """A bare socket connected to a listener of this process."""
    host, port = address.removeprefix("tcp:").rsplit(":", 1)
    with socket.create_connection((host, int(port))) as sock:
        sock.setblocking(False)
        yield sock


async def read_to_end(sock: socket.socket) -> bytes:
    """All that comes until the other side ends the connection, in whatever way."""
    data = b""
    try:
        while piece := await asyncio.get_running_loop().sock_recv(sock, 1 << 16):
            data += piece
    except ConnectionResetError:
        pass
    return data


@asynccontextmanager
async def listening(address: str = "tcp:127.0.0.1:0") -> AsyncIterator[tuple[str, asyncio.Queue[Connection]]]:
    """The address bound, and the connections accepted there."""
    accepted: asyncio.Queue[Connection] = asyncio.Queue()
    async with StreamWire().listen(address, TOKEN, accepted.put_nowait) as address:
        yield address, accepted


@asynccontextmanager
async def raw_peer() -> AsyncIterator[tuple[socket.socket, Tap]]:
    """A connection of which one end is a bare socket that has done its handshake."""
    async with listening() as (address, accepted):
        with stranger(address) as sock:
            await auth.join(sock, TOKEN, b"wire", address)
            yield sock, Tap(await accepted.get())


@asynccontextmanager
async def impostor(says: bytes) -> AsyncIterator[str]:
    """The address of something else that listens, and says this to the first who comes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)

        async def answer() -> None:
            sock, _ = await asyncio.get_running_loop().sock_accept(listener)
            with sock:
                await asyncio.get_running_loop().sock_sendall(sock, says)
                await read_to_end(sock)

        answering = asyncio.create_task(answer())
        yield f"tcp:127.0.0.1:{listener.getsockname()[1]}"
        await answering


# The byte stream


@given(st.lists(st.binary(max_size=40), max_size=12), st.data())
def test_frames_survive_any_chopping(frames: list[bytes], data: st.DataObject) -> None:
    whole = framed(*frames)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    splitter = FrameSplitter()
    found: list[bytes] = []
    for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True):
        found += splitter.feed(whole[start:end])
    assert found == frames
    assert not splitter.is_inside_frame


@given(st.lists(st.binary(max_size=5), min_size=1, max_size=4))
def test_frames_survive_a_cut_at_every_byte(frames: list[bytes]) -> None:
    whole = framed(*frames)
    for cut in range(len(whole) + 1):
        splitter = FrameSplitter()
        assert splitter.feed(whole[:cut]) + splitter.feed(whole[cut:]) == frames
    splitter = FrameSplitter()
    assert [frame for at in range(len(whole)) for frame in splitter.feed(whole[at : at + 1])] == frames


def test_the_largest_length_passes_and_the_next_does_not() -> None:
    assert FrameSplitter().feed(struct.pack("<I", MAX_FRAME_BYTES)) == []
    with pytest.raises(FrameTooLarge, match=str(MAX_FRAME_BYTES)):
        FrameSplitter().feed(struct.pack("<I", MAX_FRAME_BYTES + 1))


def test_a_peer_that_announces_too_much_is_cut() -> None:
    async def story() -> None:
        async with raw_peer() as (sock, tap):
            sock.send(framed(b"good") + struct.pack("<I", 1 << 31))
            assert "broke the protocol" in await tap.wait_end()
            assert await read_to_end(sock) == b""

    run(story())


def test_bytes_that_come_one_by_one_make_frames() -> None:
    async def story() -> None:
        async with raw_peer() as (sock, tap):
            for byte in framed(b"one", b"", b"three"):
                sock.send(bytes([byte]))
                await asyncio.sleep(0)
            assert await tap.wait_frames(3) == [b"one", b"", b"three"]

    run(story())


# Ends


@pytest.mark.parametrize("address", ["tcp:127.0.0.1:0", "unix:@penstock-test-{pid}"])
def test_a_killed_process_ends_its_connection(address: str) -> None:
    async def story() -> None:
        async with listening(address.format(pid=os.getpid())) as (bound, accepted):
            peer = await asyncio.create_subprocess_exec(sys.executable, "-m", "tests.wire.peer", bound, TOKEN)
            tap = Tap(await accepted.get())
            assert await tap.wait_frames(1) == [b"%d" % peer.pid]
            peer.send_signal(signal.SIGKILL)
            assert "closed" in await tap.wait_end()
            await peer.wait()

    run(story())


def test_an_end_within_a_frame_is_told_apart() -> None:
    async def story() -> None:
        async with raw_peer() as (sock, tap):
            sock.send(framed(b"whole") + framed(b"half")[:-1])
            sock.shutdown(socket.SHUT_RDWR)
            assert "in the middle of a frame" in await tap.wait_end()
            assert tap.frames == [b"whole"]

    run(story())


def test_a_reset_is_an_end() -> None:
    async def story() -> None:
        async with raw_peer() as (sock, tap):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
            assert "reset" in await tap.wait_end()

    run(story())


def test_a_peer_that_never_reads_delays_a_close_for_a_limited_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "CLOSE_S", 0.01)

    async def story() -> None:
        async with listening() as (address, accepted):
            with stranger(address) as sock:
                await auth.join(sock, TOKEN, b"wire", address)
                far = await accepted.get()
                tap = Tap(far)
                far.send_nowait(bytes(32 << 20))
                far.close()
                assert await tap.wait_end() == "closed here"

    run(story())


# Strangers


@pytest.mark.parametrize("bytes_sent", [b"GET / HTTP/1.1\r\nHost: penstock.example\r\n\r\n", bytes(10_000)])
def test_garbage_is_turned_away(bytes_sent: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        async with listening() as (address, accepted):
            with stranger(address) as sock:
                sock.send(bytes_sent)
                assert len(await read_to_end(sock)) <= GREETING_BYTES
            assert accepted.empty()
            await StreamWire().connect(address, TOKEN)

    run(story())
    assert "not penstock" in caplog.text


@pytest.mark.parametrize("sent", [0, 1, GREETING_BYTES - 1])
def test_half_a_handshake_is_turned_away(sent: int, caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        async with listening() as (address, accepted):
            with stranger(address) as sock:
                sock.send(b"penstock\x01\x00".ljust(GREETING_BYTES)[:sent])
            await StreamWire().connect(address, TOKEN)
            await accepted.get()
            assert accepted.empty()

    run(story())
    assert "in its handshake" in caplog.text


def test_a_slow_handshake_is_turned_away(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(auth, "HANDSHAKE_S", 0.01)

    async def story() -> None:
        async with listening() as (address, accepted):
            with stranger(address) as sock:
                assert len(await read_to_end(sock)) == GREETING_BYTES
            assert accepted.empty()

    run(story())
    assert "too slow" in caplog.text


def test_few_strangers_are_let_in_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "MAX_STRANGERS", 2)

    async def story() -> None:
        receive = asyncio.get_running_loop().sock_recv
        async with listening() as (address, _):
            with stranger(address) as first, stranger(address) as second, stranger(address) as third:
                await receive(first, GREETING_BYTES)
                await receive(second, GREETING_BYTES)
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.02):
                        await receive(third, 1)
                first.close()
                assert len(await receive(third, GREETING_BYTES)) == GREETING_BYTES
            await StreamWire().connect(address, TOKEN)

    run(story())


def test_the_token_does_not_cross_the_wire() -> None:
    secret = "a very particular token"

    async def story() -> None:
        heard = b""

        async def relay(source: socket.socket, sink: socket.socket) -> None:
            nonlocal heard
            while piece := await asyncio.get_running_loop().sock_recv(source, 1 << 16):
                heard += piece
                await asyncio.get_running_loop().sock_sendall(sink, piece)
            sink.shutdown(socket.SHUT_WR)

        async with StreamWire().listen("tcp:127.0.0.1:0", secret, Tap) as address:
            with socket.create_server(("127.0.0.1", 0)) as middle, stranger(address) as onward:
                middle.setblocking(False)
                port = middle.getsockname()[1]
                connecting = asyncio.create_task(StreamWire().connect(f"tcp:127.0.0.1:{port}", secret))
                inward, _ = await asyncio.get_running_loop().sock_accept(middle)
                relaying = asyncio.gather(relay(inward, onward), relay(onward, inward))
                near = await connecting
                tap = Tap(near)
                near.close()
                await tap.wait_end()
                await relaying
                inward.close()
        assert heard
        assert secret.encode() not in heard

    run(story())


# Whom one connects to


def test_a_listener_that_says_nothing_is_given_up_on() -> None:
    async def story() -> None:
        async with impostor(b"") as address:
            with pytest.raises(ConnectionLost, match=r"no answer within 0\.02 s"):
                await StreamWire().connect(address, TOKEN, timeout_s=0.02)

    run(story())


@pytest.mark.parametrize(
    ("says", "complaint"),
    [
        (b"220 mail.example ESMTP ready".ljust(GREETING_BYTES), "is not penstock"),
        (b"penstock\x09\x00".ljust(GREETING_BYTES), "version 9"),
        (b"penstock\x01\x00".ljust(GREETING_BYTES) + bytes(33), "could not prove.*PENSTOCK_TOKEN"),
    ],
)
def test_an_impostor_is_refused(says: bytes, complaint: str) -> None:
    async def story() -> None:
        async with impostor(says) as address:
            with pytest.raises(Refused, match=complaint):
                await StreamWire().connect(address, TOKEN)

    run(story())


# Addresses


def test_the_file_of_a_socket_goes_with_its_listener(tmp_path: Path) -> None:
    async def story() -> None:
        async with connected(StreamWire(), StreamWire(), f"unix:{tmp_path}/socket", TOKEN):
            assert (tmp_path / "socket").is_socket()

    run(story())
    assert list(tmp_path.iterdir()) == []


def test_the_file_of_a_dead_process_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))

    async def story() -> None:
        async with connected(StreamWire(), StreamWire(), f"unix:{path}", TOKEN) as (near, far):
            tap = Tap(far)
            near.send_nowait(b"alive")
            assert await tap.wait_frames(1) == [b"alive"]

    run(story())


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")

    async def story() -> None:
        with pytest.raises(AddressInUse):
            async with StreamWire().listen(f"unix:{path}", TOKEN, lambda _: None):
                pytest.fail("bound over a file")

    run(story())
    assert path.read_text() == "data"


def test_a_removed_file_does_not_disturb_the_end(tmp_path: Path) -> None:
    path = tmp_path / "socket"

    async def story() -> None:
        async with StreamWire().listen(f"unix:{path}", TOKEN, lambda _: None):
            path.unlink()
            path.write_text("somebody else's")

    run(story())
    assert path.read_text() == "somebody else's"


@pytest.mark.parametrize("address", ["tcp:192.0.2.1:0", "unix:/nowhere/at/all", "unix:" + "x" * 200, "tcp:nothing"])
def test_what_cannot_be_bound_is_a_setup_error(address: str) -> None:
    async def story() -> None:
        with pytest.raises(SetupError, match="cannot listen"):
            async with StreamWire().listen(address, TOKEN, lambda _: None):
                pytest.fail("bound")

    run(story())


def test_the_address_bound_has_the_real_port() -> None:
    async def story() -> None:
        async with StreamWire().listen("tcp:localhost:0", TOKEN, lambda _: None) as address:
            scheme, host, port = address.split(":")
            assert (scheme, host) == ("tcp", "localhost")
            assert int(port) > 0

    run(story())


@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="no IPv6 here")
def test_ipv6() -> None:
    async def story() -> None:
        async with connected(StreamWire(), StreamWire(), "tcp:[::1]:0", TOKEN) as (near, _):
            assert near.peer.startswith("tcp:[::1]:")

    run(story())


def test_small_frames_are_not_held_back_for_larger_ones() -> None:
    async def story() -> None:
        async with connected(StreamWire(), StreamWire(), "tcp:127.0.0.1:0", TOKEN) as ends:
            for end in ends:
                assert isinstance(end, stream._Stream)
                sock = end._transport.get_extra_info("socket")
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)

    run(story())
