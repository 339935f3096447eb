"""`penstock bench` against a server as its user runs it."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.processes.server import MODEL, Server, serving
from tests.support import run

Report = dict[str, Any]


@asynccontextmanager
async def benching(server: Server, flags: str, *more: str) -> AsyncIterator[asyncio.subprocess.Process]:
    command = [sys.executable, "-m", "penstock", "bench", server.url, *flags.split(), *more]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def bench(server: Server, flags: str, *more: str) -> list[Report]:
    async with benching(server, f"--json - {flags}", *more) as process:
        out, error = await process.communicate()
    assert (process.returncode, error.decode()) == (0, "")
    reports: list[Report] = json.loads(out)["reports"]
    return reports


def with_server(ask: Callable[[Server], Coroutine[object, object, None]]) -> None:
    async def main() -> None:
        async with serving() as server:
            await ask(server)
            await server.wait_at_rest()

    run(main(), timeout_s=60)


def test_completions_have_exactly_the_tokens_that_were_asked_for(tmp_path: Path) -> None:
    page = tmp_path / "page.html"

    async def ask(server: Server) -> None:
        few, more = await bench(
            server,
            *[
                "--concurrency",
                "1,4",
                "--requests",
                "8",
                "--isl",
                "100",
                "--osl",
                "5",
                "--prefix-tokens",
                "64",
                "--html",
            ],
            page,
        )
        assert (few["cell"]["level"], more["cell"]["level"]) == (1, 4)
        for told in (few, more):
            assert (told["ended"], told["errors"], told["unfinished"]) == (8, {}, 0)
            assert (told["tokens"]["prompt"], told["tokens"]["output"]) == (8 * 164, 8 * 5)
            assert told["tokens"]["per_event"] == 1.0
            assert told["latencies"]["itl"]["count"] == 8 * 4
        assert few["tokens"]["cached"] == 7 * 64  # the prefix alone, which is another one at each level

    with_server(ask)
    assert page.read_text().startswith("<!doctype html>")


def test_chats_have_the_tokens_that_words_allow() -> None:
    async def ask(server: Server) -> None:
        (asked,) = await bench(server, "--endpoint chat --rate 50 --requests 6 --isl 200 --osl 4")
        assert asked["generated"]["lateness"]["count"] == 6
        assert 198 * 6 <= asked["tokens"]["prompt"] <= 200 * 6
        (known,) = await bench(
            server,
            "--endpoint chat --requests 6 --isl 200 --osl 4 --turns 2",
            f"--tokenizer={MODEL}",
        )
        assert known["cell"]["prompts"] == "words of one token"
        assert known["errors"] == {} and known["tokens"]["cached"] > 0

    with_server(ask)


def test_a_trace_is_played_with_its_shared_blocks(tmp_path: Path) -> None:
    rows = [{"timestamp": 20 * n, "input_length": 600, "output_length": 3, "hash_ids": [1, 2 + n]} for n in range(4)]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))

    async def ask(server: Server) -> None:
        (told,) = await bench(server, "--concurrency 1 --warmup 0", f"--trace={trace}")
        assert (told["ended"], told["tokens"]["prompt"], told["tokens"]["output"]) == (4, 2400, 12)
        assert told["tokens"]["cached"] == 3 * 512

    with_server(ask)


def test_ctrl_c_tells_what_was_measured_until_then() -> None:
    async def ask(server: Server) -> None:
        flags = [
            "--concurrency",
            "2,4",
            "--duration-s",
            "600",
            "--osl",
            "2000",
            "--isl",
            "10",
            "--warmup",
            "0",
            "--json",
            "-",
        ]
        async with benching(server, flags) as process:
            while await server.metric("penstock_num_requests_running") < 2:
                await asyncio.sleep(0.02)
            process.send_signal(signal.SIGINT)
            out, error = await process.communicate()
        assert (process.returncode, error) == (0, b"")
        (told,) = json.loads(out)["reports"]
        assert told["unfinished"] == 2
        assert sum(told["course"]["events_per_s"]) > 0

    with_server(ask)
