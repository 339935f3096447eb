"""Several frontend processes that share a port: killed, asked about each other's requests, and drained."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.processes.server import Server, serving, until
from tests.support import run

TOKENS = 300


@asynccontextmanager
async def sharing(*arguments: str) -> AsyncIterator[tuple[Server, httpx.AsyncClient]]:
    """A server whose frontends all answer, and a client that makes a connection for each request."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with (
        serving("--workers=1", *arguments) as server,
        httpx.AsyncClient(base_url=server.url, timeout=30, limits=limits) as client,
    ):
        count = len([name for name in server.pids if name.startswith("frontend")])
        await until(lambda: answering(client, count))
        yield server, client


async def ask(client: httpx.AsyncClient, tokens: int = TOKENS) -> str:
    """A stream: "done", or what became of it."""
    body = {"model": "demo", "prompt": "water", "max_tokens": tokens, "ignore_eos": True, "stream": True}
    try:
        answer = await client.post("/v1/completions", json=body)
    except httpx.TransportError as error:
        return type(error).__name__
    is_whole = answer.status_code == 200 and answer.text.count("data: ") == tokens + 2
    return "done" if is_whole else f"{answer.status_code}: {answer.text[-200:]}"


async def inflight(client: httpx.AsyncClient) -> dict[str, float]:
    """Requests that run, by process."""
    page = (await client.get("/metrics")).text
    families = {family.name: family for family in text_string_to_metric_families(page)}
    return {one.labels["process"]: one.value for one in families["penstock_num_requests_inflight"].samples}


async def answering(client: httpx.AsyncClient, count: int) -> bool:
    return len(await inflight(client)) == count


def test_one_that_is_killed_takes_only_its_own_streams_along() -> None:
    async def story() -> None:
        async with sharing("--frontends=2") as (server, client):
            async with asyncio.TaskGroup() as group:
                streams = [group.create_task(ask(client)) for _ in range(16)]

                async def spread() -> bool:
                    running = await inflight(client)
                    return sum(running.values()) == len(streams) and all(running.values())

                await until(spread)
                killed = (await inflight(client))["frontend-0"]
                server.kill("frontend-0")
                meanwhile = [group.create_task(ask(client, 4)) for _ in range(16)]
            assert [one.result() for one in meanwhile] == ["done"] * len(meanwhile)
            ends = Counter(one.result() for one in streams)
            assert ends["done"] == len(streams) - killed, ends
            await until(lambda: answering(client, 2))
            assert Counter([await ask(client, 4) for _ in range(16)]) == {"done": 16}
            await server.wait_at_rest()

    run(story(), timeout_s=60)


def test_each_knows_what_the_others_did_and_all_let_their_streams_end() -> None:
    async def story() -> None:
        async with sharing("--frontends=3") as (server, client):
            body = {"model": "demo", "prompt": "water", "max_tokens": 4, "ignore_eos": True}
            ids = [(await client.post("/v1/completions", json=body)).json()["id"] for _ in range(9)]
            for name in ids:
                record = (await client.get(f"/debug/requests/{name}")).json()
                listed = [one["id"] for one in (await client.get("/debug/requests")).json()["requests"]]
                assert (record["id"], record["state"], len(record["decisions"])) == (name, "finished", 1)
                assert sorted(listed) == sorted(ids)
            assert await server.metric("penstock_generation_tokens_total") == 4 * len(ids)
            async with asyncio.TaskGroup() as group:
                streams = [group.create_task(ask(client)) for _ in range(8)]

                async def under_way() -> bool:
                    return sum((await inflight(client)).values()) == len(streams)

                await until(under_way)
                server.process.send_signal(signal.SIGTERM)
            assert [one.result() for one in streams] == ["done"] * len(streams)

    run(story(), timeout_s=60)


def test_they_serve_workers_that_were_started_elsewhere() -> None:
    async def story() -> None:
        port, join = free_ports()
        async with (
            running("frontend", f"--port={port}", f"--join-port={join}", "--processes=2"),
            running("worker", f"--join=127.0.0.1:{join}", "--engine=simulated"),
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as client,
        ):
            await until(lambda: is_ready(client))
            body = {"model": "demo", "prompt": "water", "max_tokens": 4, "ignore_eos": True}
            assert (await client.post("/v1/completions", json=body)).json()["usage"]["completion_tokens"] == 4

    run(story(), timeout_s=60)


def free_ports() -> tuple[int, int]:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        return one.getsockname()[1], other.getsockname()[1]


@asynccontextmanager
async def running(*arguments: str) -> AsyncIterator[None]:
    """A command, which ends well after SIGTERM."""
    environment = {**os.environ, "PENSTOCK_TOKEN": "a token of this test"}
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "penstock", *arguments, env=environment)
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0


async def is_ready(client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get("/ready")).status_code == 200
    except httpx.TransportError:
        return False
