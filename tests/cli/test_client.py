"""The little HTTP client of `serve`, against answers cut at every place."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from penstock.cli.client import Client, NoAnswer
from tests.support import run

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"content-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def whole(status: str, body: bytes) -> bytes:
    return f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


def chunks(*pieces: bytes) -> bytes:
    return CHUNKED + b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in (*pieces, b""))


@asynccontextmanager
async def answering(answer: bytes, requests: list[bytes] | None = None) -> AsyncIterator[Client]:
    """A server that reads one request and says `answer`."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        if requests is not None:
            requests.append(head + await reader.readexactly(length))
        writer.write(answer)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield Client("127.0.0.1", server.sockets[0].getsockname()[1], "sesame")


async def events(client: Client) -> list[dict[str, object]]:
    return [event async for event in client.stream("/v1/completions", {"prompt": "x"})]


def stream(answer: bytes) -> list[dict[str, object]]:
    async def scenario() -> list[dict[str, object]]:
        async with answering(answer) as client:
            return await events(client)

    return run(scenario())


def test_get_returns_the_json() -> None:
    async def scenario() -> None:
        requests: list[bytes] = []
        async with answering(whole("200 OK", b'{"status": "ready"}'), requests) as client:
            assert await client.get("/health") == {"status": "ready"}
        assert requests[0].startswith(b"GET /health HTTP/1.1\r\n")
        assert b"Authorization: Bearer sesame\r\n" in requests[0]

    run(scenario())


BODY = b'data: {"n": 1}\n\ndata: {"n": 2}\n\ndata: [DONE]\n\n'


@pytest.mark.parametrize("cut", range(1, len(BODY), 3))
def test_events_are_whole_however_they_are_cut(cut: int) -> None:
    assert stream(chunks(BODY[:cut], BODY[cut:])) == [{"n": 1}, {"n": 2}]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (whole("401 Unauthorized", b'{"error": {"message": "wrong key"}}'), "wrong key"),
        (whole("502 Bad Gateway", b"<html>"), "HTTP 502"),
        (whole("404 Not Found", b'{"detail": "no"}'), "HTTP 404"),
        (chunks(b'data: {"n": 1}\n\n', b'data: {"error": {"message": "worker lost"}}\n\n'), "worker lost"),
        (chunks(b'data: {"n": 1}\n\n'), "ended too early"),
        (chunks(b"data: {\n\n"), "Expecting"),
        (CHUNKED + b"5\r\nda", "incomplete|bytes read"),
        (b"", "bytes read"),
        (b"SSH-2.0\r\n\r\n", "."),
    ],
)
def test_what_is_no_answer_says_why(answer: bytes, message: str) -> None:
    with pytest.raises(NoAnswer, match=message):
        stream(answer)


def test_nobody_there() -> None:
    async def scenario() -> None:
        async with answering(b"") as client:
            pass
        with pytest.raises(NoAnswer):
            await client.get("/health")

    run(scenario())


def hosts() -> Sequence[tuple[str, str]]:
    return [("127.0.0.1", "http://127.0.0.1:80"), ("::1", "http://[::1]:80")]


@pytest.mark.parametrize(("host", "url"), hosts())
def test_url(host: str, url: str) -> None:
    assert Client(host, 80).url == url
    assert "sesame" not in repr(Client(host, 80, "sesame"))
