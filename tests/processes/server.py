"""`penstock serve` as its user runs it: a process with children, real sockets, and a simulated engine."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from openai import AsyncOpenAI

import penstock
from penstock.engine.simulated import Options
from penstock.serve.text import load_tokenizer

MODEL = Path(penstock.__file__).parent / "models" / "demo"
ENGINE = Options(model=str(MODEL), first_token=300, prefill_token_s=1e-3, step_s=0.005)
TOKENIZER = load_tokenizer(MODEL, "demo")


@dataclass
class Server:
    """A running server. `pids` are those of its start; `/health` and `find` know about restarts."""

    process: asyncio.subprocess.Process
    url: str
    join: str
    pids: dict[str, int]
    engine_flags: list[str]
    http: httpx.AsyncClient
    client: AsyncOpenAI

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        os.kill(self.process.pid if name == "launcher" else self.pids[name], number)

    async def metric(self, name: str) -> float:
        """The sum over all workers."""
        lines = (await self.http.get("/metrics")).text.splitlines()
        values = [float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == name]
        assert values, f"no metric {name}"
        return sum(values)

    async def workers(self) -> list[str]:
        return list((await self.http.get("/health")).json()["workers"])

    async def wait_at_rest(self) -> None:
        """Returns once no worker holds a block or has anything to do."""
        names = ("penstock_kv_cache_usage_perc", "penstock_num_requests_running", "penstock_num_requests_waiting")

        async def is_at_rest() -> bool:
            return [await self.metric(name) for name in names] == [0, 0, 0]

        await until(is_at_rest)


async def until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    """Returns when `condition`, a coroutine function, holds."""
    async with asyncio.timeout(timeout_s):
        while not await condition():  # type: ignore[misc]
            await asyncio.sleep(0.05)


def children_of(pid: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(status.parent.name))
    return found


def lives(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def abstract_sockets() -> list[str]:
    """Names of penstock's sockets in the abstract namespace, of all servers of this machine."""
    return [line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines() if "@penstock" in line]


def traces_of(pids: list[int]) -> list[str]:
    """What ended processes may have left: files of shared memory, and sockets that nobody owns."""
    shared = [str(path) for path in Path("/dev/shm").glob("*penstock*")]
    return shared + [f"process {pid}" for pid in pids if lives(pid)]


@asynccontextmanager
async def serving(
    *arguments: str, engine: Options | None = ENGINE, environment: Mapping[str, str] | None = None
) -> AsyncIterator[Server]:
    """A server with a simulated engine, for None the embedded one; SIGTERM at the end, after which nothing is left."""
    options = ("first_token", "prefill_token_s", "step_s")
    flags = [f"--engine-option.{name}={getattr(engine, name)}" for name in options] if engine else []
    kind = "--engine=simulated" if engine else "--engine=embedded"
    command = ["-m", "penstock", "serve", "--port=0", "--json", "--no-ask", kind, *flags, *arguments]
    process = await asyncio.create_subprocess_exec(
        sys.executable, *command, stdout=asyncio.subprocess.PIPE, env={**os.environ, **(environment or {})}
    )
    try:
        ready = await _read_ready(process)
        url = ready["url"]
        async with (
            httpx.AsyncClient(base_url=url, timeout=30) as http,
            AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30) as client,
        ):
            yield Server(process, url, ready["join"], ready["pids"], flags, http, client)
    finally:
        family = [process.pid, *children_of(process.pid)]
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(20):
            await process.wait()
        await until(lambda: _none_of(family))
        assert not traces_of(family)


async def _none_of(pids: list[int]) -> bool:
    return not any(lives(pid) for pid in pids)


async def _read_ready(process: asyncio.subprocess.Process) -> dict[str, Any]:
    assert process.stdout is not None
    async with asyncio.timeout(60):
        while line := await process.stdout.readline():
            event: dict[str, Any] = json.loads(line)
            if event["event"] == "ready":
                return event
    raise AssertionError(f"the server ended with {await process.wait()} before it was ready")
