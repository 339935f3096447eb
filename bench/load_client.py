"""What an event costs the load generator: CPU of `penstock.load` beside aiohttp and httpx reading the same streams.

A server of a few lines, in another process, sends an event of one token to each of 32 streams every 8 ms, so that each
comes by itself. Each client splits and decodes them; CPU is user and system time of the client's process, the least of
several rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import aiohttp
import httpx
import msgspec
import uvloop
from report import Row, emit

from penstock.load.answer import Answer
from penstock.load.http import Http

STREAMS, EVENTS, PACE_S = 32, 250, 0.008
TOKEN = b'data: {"id":"cmpl-1","object":"text_completion","created":1,"model":"m","choices":[{"index":0,"text":" word",'
TOKEN += b'"logprobs":null,"finish_reason":null}],"usage":null}\n\n'
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
DONE = b"data: [DONE]\n\n"

Client = Callable[[str], Awaitable[int]]  # reads STREAMS answers at once; how many events there were


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    parser.add_argument("--quick", action="store_true", help="one round")
    arguments = parser.parse_args()
    clients = {"penstock": with_penstock, "aiohttp": with_aiohttp, "httpx": with_httpx}
    least: dict[str, float] = {}
    with serving() as url:
        for _ in range(1 if arguments.quick else 5):
            for name, client in clients.items():
                least[name] = min(least.get(name, float("inf")), cost_s(client, url))
    own = least.pop("penstock")
    emit([Row("CPU per event", own * 1e6, "us", name, cost * 1e6) for name, cost in least.items()], arguments.json)


def cost_s(client: Client, url: str) -> float:
    """CPU seconds of an event."""
    begun_s = time.process_time()
    events = uvloop.run(client(url))
    assert events == STREAMS * EVENTS, f"{events} events came"
    return (time.process_time() - begun_s) / events


async def with_penstock(url: str) -> int:
    times: list[float] = []
    async with Http(url, {}) as http:
        answers = [Answer(times.append) for _ in range(STREAMS)]
        await asyncio.gather(*(http.ask("POST", "/", b"{}", answer.feed) for answer in answers))
    return len(times)


async def with_aiohttp(url: str) -> int:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def ask() -> int:
            async with session.post(url, data=b"{}") as response:
                return sum([decoded(line) async for line in response.content])

        return sum(await asyncio.gather(*(ask() for _ in range(STREAMS))))


async def with_httpx(url: str) -> int:
    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=None), timeout=60) as session:

        async def ask() -> int:
            async with session.stream("POST", url, content=b"{}") as response:
                return sum([decoded(line.encode()) async for line in response.aiter_lines()])

        return sum(await asyncio.gather(*(ask() for _ in range(STREAMS))))


def decoded(line: bytes) -> int:
    """1 for a line that is an event with a token."""
    data = line.removeprefix(b"data:").strip()
    if not data or data == b"[DONE]":
        return 0
    msgspec.json.decode(data)
    return 1


@contextmanager
def serving() -> Iterator[str]:
    near, far = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(far,), daemon=True)
    process.start()
    try:
        yield near.recv()
    finally:
        process.kill()
        process.join()


def serve(pipe: Connection) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.readuntil(b"{}"):
                writer.write(HEAD)
                for _ in range(EVENTS):
                    writer.write(b"%x\r\n%b\r\n" % (len(TOKEN), TOKEN))
                    await asyncio.sleep(PACE_S)
                writer.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(DONE), DONE))
        except (asyncio.IncompleteReadError, ConnectionError):  # the client has what it wanted
            writer.close()

    async def listen() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        pipe.send(f"http://{host}:{port}/")
        await server.serve_forever()

    uvloop.run(listen())


if __name__ == "__main__":
    main()
