"""The frontend on real sockets: the official client, and clients that misbehave."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import openai
import pytest
import uvloop
from openai import AsyncOpenAI

from penstock.errors import Overloaded, WorkerLost
from penstock.request import Request
from penstock.serve.http_server import serve_http
from tests.serve.fake_backend import FakeBackend, News, chat_body, failing, finish, frontend, saying, stuck, tokens_of
from tests.support import run

LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
Address = tuple[str, int]


@pytest.fixture(params=LOOPS)
def play(request: pytest.FixtureRequest) -> Callable[[Awaitable[None]], None]:
    """Runs a test's coroutine on each kind of loop."""
    return lambda story: run(story, loop_factory=LOOPS[request.param])


@asynccontextmanager
async def serving(backend: FakeBackend, grace_s: float = 5.0, **options: Any) -> AsyncIterator[Address]:
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    async with frontend(backend, **options) as app, serve_http(app, listener, lambda: grace_s):
        yield address
    assert backend.live == 0


@asynccontextmanager
async def client_of(address: Address, key: str = "any") -> AsyncIterator[AsyncOpenAI]:
    base = f"http://{address[0]}:{address[1]}/v1"
    async with AsyncOpenAI(base_url=base, api_key=key, max_retries=0, timeout=10) as client:
        yield client


@asynccontextmanager
async def connected(address: Address) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection(*address)
    try:
        yield reader, writer
    finally:
        writer.close()
        try:
            await writer.wait_closed()
        except ConnectionError:  # the server was faster
            pass


def post(body: object) -> bytes:
    data = json.dumps(body).encode()
    return b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(data) + data


async def read_response(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Head and body of a response that says its length."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
    return head, await reader.readexactly(length)


MESSAGES: Any = [{"role": "user", "content": "water"}]


def test_the_official_client_chats(play: Any) -> None:
    async def story() -> None:
        async with serving(FakeBackend()) as address, client_of(address) as client:
            assert [model.id async for model in client.models.list()] == ["demo"]
            answer = await client.chat.completions.create(model="demo", messages=MESSAGES, logprobs=True)
            assert answer.choices[0].message.content == "water and power"
            assert answer.usage is not None
            assert answer.usage.prompt_tokens_details is not None
            assert answer.usage.prompt_tokens_details.cached_tokens == 3
            stream = await client.chat.completions.create(
                model="demo", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
            )
            chunks = [chunk async for chunk in stream]
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            assert text == "water and power"
            assert chunks[-1].usage is not None

    play(story())


def test_the_official_client_completes(play: Any) -> None:
    async def story() -> None:
        async with serving(FakeBackend()) as address, client_of(address) as client:
            answer = await client.completions.create(model="demo", prompt=[1, 2, 3], logprobs=2)
            assert answer.choices[0].text == "water and power"
            stream = await client.completions.create(model="demo", prompt="water", stream=True)
            assert "".join([chunk.choices[0].text async for chunk in stream]) == "water and power"

    play(story())


def test_the_official_client_understands_our_errors(play: Any) -> None:
    async def story() -> None:
        backend = FakeBackend()
        async with serving(backend, api_key="secret") as address:
            async with client_of(address) as client:
                with pytest.raises(openai.AuthenticationError):
                    await client.models.list()
            async with client_of(address, "secret") as client:
                ask = client.chat.completions.create
                with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
                    await ask(model="other", messages=MESSAGES)
                with pytest.raises(openai.BadRequestError) as caught:
                    await ask(model="demo", messages=MESSAGES, store=True)
                assert (caught.value.param, caught.value.code) == ("store", "unsupported_parameter")
                backend.script = failing(Overloaded("full"))
                with pytest.raises(openai.InternalServerError) as overloaded:
                    await ask(model="demo", messages=MESSAGES)
                assert overloaded.value.response.headers["retry-after"] == "1"
                backend.script = failing(WorkerLost("decode-0 is gone"), after="water")
                stream = await ask(model="demo", messages=MESSAGES, stream=True)
                with pytest.raises(openai.APIError, match="decode-0 is gone"):
                    async for _ in stream:
                        pass

    play(story())


@pytest.mark.parametrize(("is_stream", "after"), [(False, ""), (False, "water"), (True, ""), (True, "water")])
def test_a_closed_connection_stops_the_workers(play: Any, is_stream: bool, after: str) -> None:
    async def story() -> None:
        backend = FakeBackend(stuck(after))
        async with serving(backend) as address:
            async with connected(address) as (reader, writer):
                writer.write(post(chat_body(stream=is_stream)))
                await backend.entered.wait()
                if is_stream and after:
                    await reader.readuntil(b"data: ")
            await backend.left.wait()

    play(story())


def test_a_client_that_does_not_read_is_cut(play: Any) -> None:
    async def script(request: Request) -> AsyncGenerator[News, None]:
        while True:
            yield tokens_of("water and power " * 100), None

    async def story() -> None:
        backend = FakeBackend(script)
        async with serving(backend, slow_client_s=0.2) as address, connected(address) as (reader, writer):
            writer.transport.pause_reading()
            writer.write(post(chat_body(stream=True)))
            await backend.left.wait()
            writer.transport.resume_reading()
            with pytest.raises(ConnectionError):
                while await reader.read(1 << 20):
                    pass
                raise ConnectionResetError("closed without its end")

    play(story())


def test_requests_in_a_row_and_at_once_on_one_connection(play: Any) -> None:
    async def story() -> None:
        async with serving(FakeBackend()) as address, connected(address) as (reader, writer):
            writer.write(post(chat_body()) + post(chat_body(n=0)) + post(chat_body()))
            for status in (200, 400, 200):
                head, body = await read_response(reader)
                assert head.startswith(b"http/1.1 %d " % status)
                assert json.loads(body)
            for _ in range(100):
                writer.write(post(chat_body()))
                await read_response(reader)

    play(story())


def test_an_answered_request_is_not_taken_for_a_cancelled_one(play: Any) -> None:
    async def story() -> None:
        async with serving(FakeBackend()) as address, connected(address) as (reader, writer):
            for is_stream in (False, True):
                writer.write(post(chat_body(stream=is_stream)))
                await (reader.readuntil(b"0\r\n\r\n") if is_stream else read_response(reader))
            writer.write(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n")
            _, page = await read_response(reader)
            assert b'penstock_request_success_total{finished_reason="length",model_name="demo"} 2.0' in page
            assert b'finished_reason="abort"' not in page

    play(story())


def test_large_bodies_and_heads_are_refused(play: Any) -> None:
    async def story() -> None:
        async with serving(FakeBackend(), body_bytes=1000) as address, connected(address) as (reader, writer):
            writer.write(post(chat_body(user="x" * 5000)) + post(chat_body()))
            assert (await read_response(reader))[0].startswith(b"http/1.1 413 ")
            assert (await read_response(reader))[0].startswith(b"http/1.1 200 ")

    play(story())


@pytest.mark.parametrize("filler", [b"a: " + b"b" * 995 + b"\r\n", b"a" * 1000])
def test_endless_heads_are_refused(play: Any, filler: bytes) -> None:
    async def story() -> None:
        async with serving(FakeBackend()) as address, connected(address) as (_, writer):
            writer.write(b"GET / HTTP/1.1\r\n")
            with pytest.raises(ConnectionError):
                while True:  # the server reads on for a moment, so that its refusal is not lost
                    writer.write(filler)
                    await writer.drain()

    play(story())


def test_what_is_no_http_is_refused(play: Any) -> None:
    async def story() -> None:
        async with serving(FakeBackend()) as address, connected(address) as (reader, writer):
            writer.write(b"\x16\x03\x01 hello\r\n\r\n")
            assert (await reader.readline()).startswith(b"HTTP/1.1 400 ")

    play(story())


def test_tokens_leave_at_once(play: Any) -> None:
    """Without TCP_NODELAY on every connection, a token waits for the acknowledgement of the one before: 40 ms."""

    async def story() -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        here = listener.getsockname()
        async with frontend(FakeBackend()) as app, serve_http(app, listener, lambda: 5.0), connected(here):
            assert listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

    play(story())


def test_leaving_lets_requests_end(play: Any) -> None:
    gate = asyncio.Event()

    async def script(request: Request) -> AsyncGenerator[News, None]:
        yield tokens_of("water"), None
        await gate.wait()
        yield [], finish()

    async def story() -> None:
        async with AsyncExitStack() as clients, asyncio.TaskGroup() as group:
            async with serving(FakeBackend(script)) as address:
                idle, _ = await clients.enter_async_context(connected(address))
                reader, writer = await clients.enter_async_context(connected(address))
                writer.write(post(chat_body(stream=True)))
                await reader.readuntil(b"data: ")
                group.create_task(release_when_refused(address, gate))
            assert b"[DONE]" in await reader.read()
            assert await idle.read() == b""

    play(story())


async def release_when_refused(address: Address, gate: asyncio.Event) -> None:
    while True:
        try:
            _, writer = await asyncio.open_connection(*address)
            writer.close()
        except ConnectionRefusedError:
            gate.set()
            return


def test_leaving_cuts_what_does_not_end(play: Any) -> None:
    async def story() -> None:
        async with AsyncExitStack() as clients:
            async with serving(FakeBackend(stuck("water")), grace_s=0.1) as address:
                reader, writer = await clients.enter_async_context(connected(address))
                writer.write(post(chat_body(stream=True)))
                await reader.readuntil(b"data: ")
            rest = await reader.read()
            assert b"shutting down" in rest
            assert b"[DONE]" not in rest

    play(story())


def test_a_chat_ends_with_a_stop_string(play: Any) -> None:
    async def story() -> None:
        backend = FakeBackend(saying("water and power"))
        async with serving(backend) as address, client_of(address) as client:
            answer = await client.chat.completions.create(model="demo", messages=MESSAGES, stop=[" and"])
            assert answer.choices[0].message.content == "water"
            assert answer.choices[0].finish_reason == "stop"

    play(story())
