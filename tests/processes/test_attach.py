"""`penstock router` as its user runs it: a process, in front of servers that know nothing of it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx

from tests.serve.fake_servers import MODEL, FakeServer, publishers, up
from tests.support import run

QUESTION = {"model": MODEL, "prompt": "a prompt that is worth keeping " * 8, "stream": True}


@asynccontextmanager
async def router(*arguments: str) -> AsyncIterator[tuple[str, asyncio.subprocess.Process]]:
    """The first line that it prints, and its process; killed if it still runs."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "penstock", "router", "--port", "0", *arguments),
        env={name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")},
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        yield (await process.stdout.readline()).decode(), process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


def test_it_starts_routes_and_stops() -> None:
    async def main() -> None:
        async with publishers(1) as told:
            server = FakeServer(publisher=told[0])
            async with up(server), router("--attach", server.url) as (line, process):
                assert line.startswith(f"penstock routes {MODEL} at http://127.0.0.1:")
                assert line.rstrip().endswith(server.name)
                url = line.split(" at ")[1].split("/v1")[0]
                async with httpx.AsyncClient(base_url=url, timeout=20) as client:
                    response = await client.post("/v1/completions", json=QUESTION)
                    assert response.content == b"".join(server.answer.parts)
                    while not (await client.get("/health")).json()["servers"][server.name]["indexed_blocks"]:
                        await asyncio.sleep(0.05)
                process.send_signal(signal.SIGTERM)
                assert await process.wait() == 0

    run(main())


def test_it_waits_for_servers_that_are_not_there_yet() -> None:
    async def main() -> None:
        server = FakeServer()
        async with up(server):
            pass
        async with asyncio.TaskGroup() as group:
            group.create_task(serve_until_asked(server))
            async with router("--attach", server.url) as (line, process):
                assert server.name in line
                process.send_signal(signal.SIGTERM)
                assert await process.wait() == 0
            server.called.set()

    async def serve_until_asked(server: FakeServer) -> None:
        async with up(server):
            await server.called.wait()

    run(main())
