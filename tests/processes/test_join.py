"""A worker that its user adds to a running server, by the command that the server printed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.processes.server import Server, serving, until
from tests.processes.test_kills import a_prompt, complete, expected_text, timeline
from tests.support import run

TOKEN = "a token of this test"


@asynccontextmanager
async def worker(server: Server, *arguments: str, token: str = TOKEN) -> AsyncIterator[asyncio.subprocess.Process]:
    engine = ["--engine=simulated", *server.engine_flags]
    command = ["-m", "penstock", "worker", "--join", server.join, *engine, *arguments]
    environment = {**os.environ, "PENSTOCK_TOKEN": token}
    process = await asyncio.create_subprocess_exec(
        sys.executable, *command, env=environment, stderr=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        await process.communicate()


def test_it_serves_and_leaves_without_a_trace() -> None:
    async def story() -> None:
        async with serving("--workers=1", environment={"PENSTOCK_TOKEN": TOKEN}) as server:
            async with worker(server, "--name=guest", "--role=prefill"):
                await until(lambda: knows(server, "guest"))
                prompt = a_prompt(600)
                answer = await complete(server, prompt, 8)
                assert answer.choices[0].text == expected_text(prompt, 8)
                assert (timeline(answer)["prefill_worker"], timeline(answer)["path"]) == ("guest", "in-place")
            await until(lambda: forgot(server, "guest"))
            prompt = a_prompt(700)
            assert (await complete(server, prompt, 8)).choices[0].text == expected_text(prompt, 8)
            await server.wait_at_rest()

    run(story(), timeout_s=60)


def test_a_wrong_token_is_turned_away_and_the_server_serves_on() -> None:
    async def story() -> None:
        async with serving("--workers=1", environment={"PENSTOCK_TOKEN": TOKEN}) as server:
            async with worker(server, "--name=stranger", token="a guess") as process:
                assert process.stderr is not None
                while b"another token" not in (line := await process.stderr.readline()):
                    assert line, "it ended without a word"
            assert await server.workers() == ["worker-0"]
            prompt = a_prompt(50)
            assert (await complete(server, prompt, 8)).choices[0].text == expected_text(prompt, 8)

    run(story(), timeout_s=60)


async def knows(server: Server, name: str) -> bool:
    return name in await server.workers()


async def forgot(server: Server, name: str) -> bool:
    return not await knows(server, name)


def test_links_between_its_workers_can_be_measured() -> None:
    async def story() -> None:
        async with serving(environment={"PENSTOCK_TOKEN": TOKEN}) as server:
            probe = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "penstock", "topology", "probe", server.join, "--json", "--size=2"),
                env={**os.environ, "PENSTOCK_TOKEN": TOKEN},
                stdout=asyncio.subprocess.PIPE,
            )
            output, _ = await probe.communicate()
            links = json.loads(output)["links"]
            assert {(link["source"], link["target"]) for link in links} == {
                ("prefill-0", "decode-0"),
                ("decode-0", "prefill-0"),
            }
            assert all(link["measured"]["medium"] == "unix" and not link["failure"] for link in links)
            await server.wait_at_rest()

    run(story(), timeout_s=60)
