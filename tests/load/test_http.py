"""The HTTP client: connections are kept and given up, pieces come with their times, failures have short names."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from penstock.errors import SetupError
from penstock.load.http import Http, NoReply, Reply
from tests.load.scripted import END, HEAD, Step, chunk, scripted, whole
from tests.support import run


async def ask(http: Http, path: str = "/x", body: bytes = b"{}") -> tuple[Reply, list[tuple[bytes, float]]]:
    pieces: list[tuple[bytes, float]] = []
    reply = await http.ask("POST", path, body, lambda piece, at_s: pieces.append((piece, at_s)))
    return reply, pieces


def asked(steps: Sequence[Step]) -> tuple[Reply, bytes]:
    """What one request to a server with this script comes to."""

    async def main() -> tuple[Reply, bytes]:
        async with scripted(lambda path, body: steps) as server, Http(server.url, {}) as http:
            reply, pieces = await ask(http)
            return reply, b"".join(piece for piece, _ in pieces)

    return run(main())


def test_a_stream_comes_in_pieces_with_their_times() -> None:
    async def main() -> None:
        has_one = asyncio.Event()
        pieces: list[tuple[bytes, float]] = []

        def sink(piece: bytes, at_s: float) -> None:
            pieces.append((piece, at_s))
            has_one.set()

        script = [HEAD, chunk(b"one"), has_one, 0.02, chunk(b"two"), END]
        async with scripted(lambda path, body: script) as server, Http(server.url, {"X-Key": "k"}) as http:
            assert await http.ask("POST", "/path", b'{"a": 1}', sink) == Reply(200, b"")
            assert [piece for piece, _ in pieces] == [b"one", b"two"]
            assert pieces[1][1] - pieces[0][1] >= 0.019
            assert server.bodies == [{"a": 1}]
            assert server.headers[0]["x-key"] == "k"
            assert server.headers[0]["host"] == server.url.removeprefix("http://")

    run(main())


def test_an_answer_may_be_cut_anywhere() -> None:
    stream = HEAD + chunk(b"one") + chunk(b"two") + END
    assert asked([part for byte in stream for part in (bytes([byte]), 0.0)]) == (Reply(200, b""), b"onetwo")


def test_a_connection_is_used_again() -> None:
    async def main() -> None:
        async with scripted(lambda path, body: [whole(200, "x")]) as server, Http(server.url, {}) as http:
            for _ in range(5):
                await ask(http)
            assert server.connections == 1
            await asyncio.gather(*(ask(http) for _ in range(3)))
            assert server.connections == 3
            assert len(server.bodies) == 8

    run(main())


def test_a_connection_that_the_server_ends_is_not_used_again() -> None:
    closing = whole(200, "x").replace(b"Content-Type", b"Connection: close\r\nContent-Type")

    async def main() -> None:
        async with scripted(lambda path, body: [closing]) as server, Http(server.url, {}) as http:
            for _ in range(3):
                await ask(http)
            assert server.connections == 3

    run(main())


def test_a_refusal_is_a_reply_and_nothing_for_the_sink() -> None:
    assert asked([whole(503, {"error": "full"})]) == (Reply(503, b'{"error": "full"}'), b"")


def test_an_answer_without_a_length_ends_with_its_connection() -> None:
    assert asked([b"HTTP/1.1 200 OK\r\n\r\n", b"some", b"thing", None]) == (Reply(200, b""), b"something")


@pytest.mark.parametrize(
    ("steps", "why"),
    [
        ([None], "connection lost"),
        ([HEAD, chunk(b"one"), None], "connection lost"),
        ([b"SSH-2.0-OpenSSH\r\n\r\n"], "answer is no HTTP"),
    ],
)
def test_what_is_no_answer(steps: Sequence[Step], why: str) -> None:
    with pytest.raises(NoReply, match=why):
        asked(steps)


def test_nobody_there() -> None:
    async def main() -> None:
        async with scripted(lambda path, body: []) as server:
            url = server.url
        async with Http(url, {}) as http:
            with pytest.raises(NoReply, match="no connection: "):
                await ask(http)

    run(main())


def test_who_is_cancelled_hangs_up() -> None:
    async def main() -> None:
        script = [HEAD, *([0.005, chunk(b"x")] * 1000)]
        async with scripted(lambda path, body: script) as server, Http(server.url, {}) as http:
            task = asyncio.ensure_future(ask(http))
            await server.asked.wait()
            task.cancel()
            await asyncio.wait([task])
            await server.left.wait()

    run(main())


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", "http://host:port", "http://host:99999"])
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(SetupError, match="write http://HOST:PORT"):
        Http(url, {})


@pytest.mark.parametrize(
    ("path", "base"), [("", ""), ("/", ""), ("/v1", ""), ("/v1/", ""), ("/some/where/", "/some/where"), ("/a/v1", "/a")]
)
def test_paths_begin_with_that_of_the_url(path: str, base: str) -> None:
    assert Http(f"https://host{path}", {}).base == base
