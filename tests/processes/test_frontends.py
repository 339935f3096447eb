"""Several frontend processes that share a port: killed, asked about each other's requests, and drained."""

from __future__ import annotations

import asyncio
import json
import signal
from collections import Counter
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.processes.server import Server, serving, until
from tests.support import run

TOKENS = 300


async def ask(server: Server, tokens: int = TOKENS) -> str:
    """A stream on a connection of its own: "done", or what became of it."""
    body = {"model": "demo", "prompt": "water", "max_tokens": tokens, "ignore_eos": True, "stream": True}
    try:
        async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
            answer = await client.post("/v1/completions", json=body)
    except httpx.TransportError as error:
        return type(error).__name__
    events = answer.text.count("data: ")
    return (
        "done" if answer.status_code == 200 and events == tokens + 2 else f"{answer.status_code}: {answer.text[-200:]}"
    )


async def inflight(server: Server) -> dict[str, float]:
    """Requests that run, by process."""
    async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
        page = (await client.get("/metrics")).text
    families = {family.name: family for family in text_string_to_metric_families(page)}
    return {one.labels["process"]: one.value for one in families["penstock_num_requests_inflight"].samples}


async def answering(server: Server, count: int) -> bool:
    return len(await inflight(server)) == count


def test_one_that_is_killed_takes_only_its_own_streams_along() -> None:
    async def story() -> None:
        async with serving("--frontends=2", "--workers=1") as server:
            await until(lambda: answering(server, 2))
            async with asyncio.TaskGroup() as group:
                streams = [group.create_task(ask(server)) for _ in range(24)]

                async def spread() -> bool:
                    running = await inflight(server)
                    return sum(running.values()) == len(streams) and all(running.values())

                await until(spread)
                killed = (await inflight(server))["frontend-0"]
                server.kill("frontend-0")
                meanwhile = [group.create_task(ask(server, 4)) for _ in range(24)]
            assert [one.result() for one in meanwhile] == ["done"] * len(meanwhile)
            ends = Counter(one.result() for one in streams)
            assert ends["done"] == len(streams) - killed, ends
            await until(lambda: answering(server, 2))
            assert Counter([await ask(server, 4) for _ in range(24)]) == {"done": 24}
            await server.wait_at_rest()

    run(story(), timeout_s=60)


def test_each_knows_what_the_others_did() -> None:
    async def story() -> None:
        async with serving("--frontends=3", "--workers=1") as server:
            await until(lambda: answering(server, 3))
            ids = [await ask_id(server) for _ in range(9)]
            for name in ids:
                async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
                    record = (await client.get(f"/debug/requests/{name}")).json()
                    listed = [one["id"] for one in (await client.get("/debug/requests")).json()["requests"]]
                assert (record["id"], record["state"], len(record["decisions"])) == (name, "finished", 1)
                assert sorted(listed) == sorted(ids)
            assert await server.metric("penstock_generation_tokens_total") == 4 * len(ids)

    run(story(), timeout_s=60)


async def ask_id(server: Server) -> str:
    body = {"model": "demo", "prompt": "water", "max_tokens": 4, "ignore_eos": True}
    async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
        answer: dict[str, Any] = json.loads((await client.post("/v1/completions", json=body)).text)
    return str(answer["id"])


def test_all_let_their_streams_end() -> None:
    async def story() -> None:
        async with serving("--frontends=2", "--workers=1") as server:
            await until(lambda: answering(server, 2))
            async with asyncio.TaskGroup() as group:
                streams = [group.create_task(ask(server)) for _ in range(8)]

                async def under_way() -> bool:
                    return sum((await inflight(server)).values()) == len(streams)

                await until(under_way)
                server.process.send_signal(signal.SIGTERM)
            assert [one.result() for one in streams] == ["done"] * len(streams)

    run(story(), timeout_s=60)
