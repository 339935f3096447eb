"""The frontend's sockets against clients that dawdle, flood, shut half of the connection, or speak no HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any

import httptools
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from penstock.request import Request
from penstock.serve import http, http_server
from tests.serve.fake_backend import FakeBackend, News, chat_body, finish, saying, stuck, tokens_of
from tests.serve.test_http_server import Address, connected, play, post, read_response, serving
from tests.support import run

__all__ = ["play"]  # a fixture

OPEN_HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"


@dataclass
class Response:
    """One final response, as a client reads it; interim ones are counted."""

    status: int = 0
    body: bytes = b""
    headers: dict[bytes, bytes] = field(default_factory=dict)
    is_whole: bool = False

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Reader:
    """Reads all responses of a connection; what is no HTTP raises."""

    def __init__(self) -> None:
        self.responses: list[Response] = []
        self.interim = 0
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> Reader:
        self._parser.feed_data(data)
        return self

    def on_message_begin(self) -> None:
        self.responses.append(Response())

    def on_header(self, name: bytes, value: bytes) -> None:
        self.responses[-1].headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        self.responses[-1].status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self.responses[-1].body += body

    def on_message_complete(self) -> None:
        if self.responses[-1].status == 100:
            self.interim += 1
            self.responses.pop()
        else:
            self.responses[-1].is_whole = True


async def exchange(address: Address, *pieces: bytes) -> Reader:
    """Sends `pieces` one by one and an end-of-file, and reads until the server closes."""
    async with connected(address) as (reader, writer):
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(0)
        writer.write_eof()
        return Reader().feed(await reader.read())


def is_openai_error(response: Response) -> bool:
    error = response.json["error"]
    return set(error) == {"message", "type", "param", "code"} and bool(error["message"]) and bool(error["type"])


# Too much, too slow


@pytest.mark.parametrize("count", [http_server.MAX_HEADERS + 1, 10 * http_server.MAX_HEADERS])
def test_too_many_headers_are_refused(play: Any, count: int) -> None:
    async def story() -> None:
        async with serving(FakeBackend()) as address:
            flood = OPEN_HEAD + b"".join(b"x-%d: y\r\n" % number for number in range(count)) + b"\r\n"
            (refusal,) = (await exchange(address, flood)).responses
            assert refusal.status == 431
            assert refusal.headers[b"connection"] == b"close"
            assert is_openai_error(refusal)

    play(story())


@pytest.mark.parametrize("end", [b"\r\n\r\n", b""])
@pytest.mark.parametrize("start", [OPEN_HEAD + b"x: ", b"GET /"])
def test_large_heads_are_refused(play: Any, start: bytes, end: bytes) -> None:
    async def story() -> None:
        flood = start + b"y" * (8 * http_server.MAX_HEAD_BYTES) + end  # takes more than one read
        async with serving(FakeBackend()) as address:
            (refusal,) = (await exchange(address, flood)).responses
            assert refusal.status == 431
            assert is_openai_error(refusal)

    play(story())


def test_a_head_that_does_not_come_is_not_waited_for(play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "HEAD_S", 0.05)

    async def story() -> None:
        async with serving(FakeBackend()) as address, connected(address) as (reader, writer):
            writer.write(post(chat_body()))
            assert (await read_response(reader))[0].startswith(b"http/1.1 200 ")
            async with asyncio.TaskGroup() as group:
                trickling = group.create_task(trickle(writer, b"GET / HTTP/1.1\r\nx: " + b"y" * 10_000))
                head, body = await read_response(reader)
                trickling.cancel()
            assert head.startswith(b"http/1.1 408 ")
            assert json.loads(body)["error"]["code"] == "request_timeout"
            assert await reader.read() == b""

    play(story())


async def trickle(writer: asyncio.StreamWriter, data: bytes) -> None:
    for byte in data:
        writer.write(bytes([byte]))
        await asyncio.sleep(0.005)


def test_a_body_that_does_not_come_is_not_waited_for(play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "BODY_S", 0.05)
    monkeypatch.setattr(http_server, "LINGER_S", 0.05)

    async def story() -> None:
        async with serving(FakeBackend()) as address, connected(address) as (reader, writer):
            writer.write(post(chat_body())[:-5])
            head, body = await read_response(reader)
            assert head.startswith(b"http/1.1 408 ")
            assert json.loads(body)["error"]["code"] == "request_timeout"
            with pytest.raises(ConnectionError):
                await reader.read()  # the rest did not come either
                raise ConnectionResetError("closed in good order")

    play(story())


def test_a_body_without_end_that_nobody_reads_is_cut(play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "LINGER_S", 0.05)

    async def story() -> None:
        async with serving(FakeBackend()) as address, connected(address) as (reader, writer):
            writer.write(b"POST /nowhere HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
            assert (await read_response(reader))[0].startswith(b"http/1.1 404 ")
            with pytest.raises(ConnectionError):
                while True:
                    writer.write(b"5\r\nwater\r\n")
                    await writer.drain()

    play(story())


def test_others_go_on_while_one_does_not_read(play: Any) -> None:
    flood = asyncio.Event()

    async def script(request: Request) -> AsyncGenerator[News, None]:
        flood.set()
        while True:
            yield tokens_of("water and power " * 100), None

    async def story() -> None:
        backend = FakeBackend(script)
        async with serving(backend, slow_client_s=0.2) as address, connected(address) as (_, writer):
            writer.transport.pause_reading()
            writer.write(post(chat_body(stream=True)))
            await flood.wait()
            backend.script = saying("water and power")
            while backend.live:  # until the first one is cut
                (answer,) = (await exchange(address, post(chat_body(stream=True)))).responses
                assert answer.body.endswith(b"data: [DONE]\n\n")

    play(story())


# Half of the connection


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_client_that_shuts_its_sending_side_gets_its_answers(play: Any, is_stream: bool) -> None:
    may_start, may_end = asyncio.Event(), asyncio.Event()

    async def script(request: Request) -> AsyncGenerator[News, None]:
        await may_start.wait()
        yield tokens_of("water"), None
        await may_end.wait()
        yield [], finish()

    async def story() -> None:
        async with serving(FakeBackend(script)) as address, connected(address) as (reader, writer):
            writer.write(post(chat_body(stream=is_stream)))
            writer.write_eof()
            seen = await reader.readuntil(b"100 Continue\r\n\r\n")
            may_start.set()
            seen += await reader.readuntil(b":\n\n" if is_stream else b"100 Continue\r\n\r\n")
            may_end.set()
            client = Reader().feed(seen + await reader.read())
            (answer,) = client.responses
            assert client.interim >= 1
            assert answer.is_whole
            assert answer.headers[b"connection"] == b"close"
            if is_stream:
                assert answer.body.count(b"data: ") == len(tokens_of("water")) + 3
            else:
                assert answer.json["choices"][0]["message"]["content"] == "water"

    play(story())


def test_requests_that_wait_behind_one_end_with_it(play: Any) -> None:
    async def story() -> None:
        backend = FakeBackend(stuck())
        async with serving(backend) as address:
            async with connected(address) as (_, writer):
                writer.write(post(chat_body()) * 3)
                await backend.entered.wait()
            await backend.left.wait()
            assert len(backend.requests) == 1

    play(story())


def test_requests_in_a_row_are_all_answered_after_an_end_of_file(play: Any) -> None:
    async def story() -> None:
        async with serving(FakeBackend()) as address:
            seen = await exchange(address, post(chat_body()) + post(chat_body(n=0)) + post(chat_body(stream=True)))
            assert [one.status for one in seen.responses] == [200, 400, 200]
            assert all(one.is_whole for one in seen.responses)

    play(story())


@pytest.mark.parametrize("sent", [b"", b"\r\n\r\n", b"POST /v1", post(chat_body())[:-1]])
def test_a_request_that_was_not_whole_ends_with_the_connection(play: Any, sent: bytes) -> None:
    async def story() -> None:
        async with serving(FakeBackend()) as address:
            assert (await exchange(address, sent)).responses == []

    play(story())


# No HTTP


def test_garbage_after_a_request_does_not_spoil_its_answer(play: Any) -> None:
    gate = asyncio.Event()

    async def script(request: Request) -> AsyncGenerator[News, None]:
        yield tokens_of("water"), None
        await gate.wait()
        yield tokens_of(" and power"), finish()

    async def story() -> None:
        async with serving(FakeBackend(script)) as address, connected(address) as (reader, writer):
            writer.write(post(chat_body(stream=True)))
            start = await reader.readuntil(b"data: ")
            writer.write(b"\x16\x03\x01 hello\r\n\r\n")
            gate.set()
            answer, *refusals = Reader().feed(start + await reader.read()).responses
            assert answer.is_whole
            assert answer.body.endswith(b"data: [DONE]\n\n")
            assert [one.status for one in refusals] in ([], [400])  # none if it came before the end of the answer

    play(story())


def test_garbage_in_a_body_ends_its_request(play: Any) -> None:
    async def story() -> None:
        backend = FakeBackend(stuck())
        chunked = OPEN_HEAD + b"transfer-encoding: chunked\r\n\r\n"
        async with serving(backend) as address:
            (refusal,) = (await exchange(address, chunked, b"not a size\r\n")).responses
            assert refusal.status == 400
            assert is_openai_error(refusal)
            with pytest.raises(ConnectionError):  # with the answer to the request before, which is still under way
                await exchange(address, post(chat_body()) + chunked + b"not a size\r\n")
                raise ConnectionResetError("closed before it was read")

    play(story())


def test_an_offer_of_another_protocol_is_passed_over(play: Any) -> None:
    offer = b"HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEA\r\n"

    async def story() -> None:
        async with serving(FakeBackend()) as address:
            sent = post(chat_body()).replace(b"HTTP/1.1\r\n", offer, 1)
            (answer,) = (await exchange(address, sent)).responses
            assert answer.status == 200

    play(story())


TEXT = st.text(st.characters(max_codepoint=255), max_size=20).map(lambda text: text.encode("latin-1"))
TOKEN = st.text("abcXYZ-_019", min_size=1, max_size=12).map(str.encode)
NAMES = st.sampled_from(
    b"content-length transfer-encoding connection upgrade expect host content-type x-request-id authorization".split()
)
VALUES = st.sampled_from(
    b"chunked identity close keep-alive upgrade h2c websocket 100-continue 0 5 -1 18446744073709551616 "
    b"application/json gzip,chunked".split()
)
METHODS = st.sampled_from(b"GET GET POST POST POST POST HEAD PUT OPTIONS CONNECT get".split())
PATHS = st.sampled_from(
    [
        b"/",
        b"/v1/chat/completions",
        b"/v1/chat/completions",
        b"/v1/completions",
        b"/v1/models/demo",
        b"/health",
        b"*",
        b"http://x/live",
        b"x:80",
        b"/%ff%00",
        b"//",
    ]
) | TEXT.map(lambda text: b"/" + text)
USUAL = b"connection: close|upgrade: h2c|connection: upgrade|expect: 100-continue|x-request-id: 1|accept: */*".split(
    b"|"
)
HEADER = (
    st.sampled_from(USUAL)
    | st.sampled_from(USUAL)
    | st.builds(lambda *pair: b": ".join(pair), NAMES | TOKEN, VALUES | TEXT)
)
HEADERS = st.lists(HEADER, max_size=4).map(lambda lines: b"".join(line + b"\r\n" for line in lines))
BODIES = st.sampled_from([b"", b"{}", b"[]", json.dumps(chat_body()).encode(), b"\xff{"]) | st.binary(max_size=40)
CHUNK = st.builds(lambda size, body: b"%s\r\n%s\r\n" % (size, body), TOKEN, BODIES) | BODIES.map(
    lambda body: b"%x\r\n%s\r\n" % (len(body), body)
)


@st.composite
def requests(draw: Callable[[st.SearchStrategy[Any]], Any]) -> bytes:
    """Bytes from a whole request to noise."""
    head: bytes = (
        draw(METHODS) + b" " + draw(PATHS) + b" HTTP/1." + draw(st.sampled_from([b"1", b"1", b"1", b"0", b"9"]))
    )
    fields: bytes = draw(HEADERS)
    kind = draw(st.sampled_from(["sized", "sized", "chunked", "none", "noise"]))
    if kind == "sized":
        body: bytes = draw(BODIES)
        return head + b"\r\ncontent-length: %d\r\n" % len(body) + fields + b"\r\n" + body
    if kind == "chunked":
        chunks = b"".join(draw(st.lists(CHUNK, max_size=3))) + draw(st.sampled_from([b"0\r\n\r\n", b"0\r\n", b""]))
        return head + b"\r\ntransfer-encoding: chunked\r\n" + fields + b"\r\n" + chunks
    return head + b"\r\n" + fields + b"\r\n" if kind == "none" else draw(st.binary(max_size=200))


@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow],
)
@given(st.lists(requests(), min_size=1, max_size=3), st.integers(1, 400))
def test_whatever_is_sent_is_answered_as_openai_does_or_not_at_all(sent: list[bytes], piece_bytes: int) -> None:
    async def story() -> None:
        async with serving(FakeBackend()) as address:
            wire = b"".join(sent)
            pieces = [wire[at : at + piece_bytes] for at in range(0, len(wire), piece_bytes)]
            try:
                seen = await exchange(address, *pieces)
            except OSError:
                return  # refused and cut while more came
            for response in seen.responses:
                assert 200 <= response.status < 500 or response.status == 503
                if response.status >= 400 and response.is_whole and response.body:
                    assert is_openai_error(response)
            (alive,) = (await exchange(address, b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n")).responses
            assert alive.status == 200

    run(story(), timeout_s=5)
