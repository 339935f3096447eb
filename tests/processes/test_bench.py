"""`penstock bench` against a server as its user runs it."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator
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


async def completions(server: Server, folder: Path) -> None:
    """Exactly the tokens that were asked for, text of their own at each level, and a page."""
    page = folder / "page.html"
    flags = "--concurrency 1,4 --requests 8 --isl 100 --osl 5 --prefix-tokens 64"
    few, more = await bench(server, flags, f"--html={page}")
    assert (few["cell"]["level"], more["cell"]["level"]) == (1, 4)
    for told in (few, more):
        assert (told["ended"], told["errors"], told["unfinished"]) == (8, {}, 0)
        assert (told["tokens"]["prompt"], told["tokens"]["output"]) == (8 * 164, 8 * 5)
        assert told["tokens"]["per_event"] == 1.0
        assert told["latencies"]["itl"]["count"] == 8 * 4
    assert few["tokens"]["cached"] == 7 * 64  # the prefix alone
    assert page.exists()


async def chats(server: Server, folder: Path) -> None:
    """Nearly as many tokens as were asked for, with words that the server counts or a tokenizer knows."""
    flags = "--endpoint chat --requests 6 --isl 200 --osl 4"
    (asked,) = await bench(server, f"{flags} --rate 50")
    assert asked["generated"]["lateness"]["count"] == 6
    assert 198 * 6 <= asked["tokens"]["prompt"] <= 200 * 6
    (known,) = await bench(server, f"{flags} --turns 2", f"--tokenizer={MODEL}")
    assert known["cell"]["prompts"] == "words of one token"
    assert known["errors"] == {} and known["tokens"]["cached"] > 0


async def trace(server: Server, folder: Path) -> None:
    """Equal hash ids are equal text: the first block of 512 tokens is computed once."""
    rows = [{"timestamp": 20 * n, "input_length": 600, "output_length": 3, "hash_ids": [1, 2 + n]} for n in range(4)]
    file = folder / "trace.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (told,) = await bench(server, "--concurrency 1 --warmup 0", f"--trace={file}")
    assert (told["ended"], told["tokens"]["prompt"], told["tokens"]["output"]) == (4, 2400, 12)
    assert told["tokens"]["cached"] == 3 * 512


def test_requests_are_what_was_asked_for(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving() as server:
            for ask in (completions, chats, trace):
                await ask(server, tmp_path)
            await server.wait_at_rest()

    run(main(), timeout_s=60)


def test_ctrl_c_tells_what_was_measured_until_then() -> None:
    async def main() -> None:
        async with serving() as server:
            flags = "--concurrency 2,4 --duration-s 600 --osl 2000 --isl 10 --warmup 0 --json -"
            async with benching(server, flags) as process:
                while await server.metric("penstock_num_requests_running") < 2:
                    await asyncio.sleep(0.02)
                process.send_signal(signal.SIGINT)
                out, error = await process.communicate()
            assert (process.returncode, error) == (0, b"")
            (told,) = json.loads(out)["reports"]
            assert (told["requests"], told["unfinished"], told["errors"]) == (2, 2, {})
            await server.wait_at_rest()

    run(main(), timeout_s=60)
