"""Prefill on one host and decode on another: network namespaces, with a network between them that can be harmed."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.processes.server import Server, serving, until
from tests.processes.test_join import TOKEN, forgot, knows
from tests.processes.test_kills import a_prompt, complete, expected_text, timeline
from tests.support import run

HERE, THERE = "10.77.31.1", "10.77.31.2"


def why_not() -> str:
    """Why no second host can be made here; empty if one can."""
    if os.geteuid() != 0 or not Path("/dev/net/tun").exists():
        return "network namespaces and TUN devices need root"
    try:
        ip("netns", "add", probe := f"penstock-probe-{os.getpid()}")
        ip("netns", "del", probe)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        return f"no network namespace can be made: {error}"
    return ""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


REASON = why_not()
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)


class Link:
    """The network between the hosts."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def set(self, what: str, value: float) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{what} {value}\n".encode())
        assert await self._process.stdout.readline() == b"done\n"


@asynccontextmanager
async def other_host() -> AsyncIterator[tuple[str, Link]]:
    """A network namespace, and the link to it."""
    namespace = f"penstock-{os.getpid()}"
    ip("netns", "add", namespace)
    try:
        wire = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.processes.wire", namespace, HERE, THERE),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert wire.stdin is not None and wire.stdout is not None
        assert await wire.stdout.readline() == b"ready\n"
        try:
            yield namespace, Link(wire)
        finally:
            wire.stdin.close()
            await wire.wait()
    finally:
        ip("netns", "del", namespace)


TRANSPORTS = ["tcp", pytest.param("nixl", marks=pytest.mark.skipif(find_spec("nixl") is None, reason="make test-nixl"))]


@asynccontextmanager
async def two_hosts(
    *arguments: str, transport: str = "tcp"
) -> AsyncIterator[tuple[Server, asyncio.subprocess.Process, Link]]:
    """A server with a decode worker here, and a prefill worker there, which a router must use."""
    ways = ("--transport=shm", f"--transport={transport}")
    server_arguments = ("--prefill=0", "--decode=1", f"--join-host={HERE}", "--policy=p_token", *ways, *arguments)
    async with (
        other_host() as (namespace, link),
        serving(*server_arguments, environment={"PENSTOCK_TOKEN": TOKEN}) as server,
    ):
        command = [sys.executable, "-m", "penstock", "worker", "--name=far", "--role=prefill", "--engine=simulated"]
        far = await asyncio.create_subprocess_exec(
            *(
                "ip",
                "netns",
                "exec",
                namespace,
                *command,
                f"--join={server.join}",
                *server.engine_flags,
                *ways,
                *arguments,
            ),
            env={**os.environ, "PENSTOCK_TOKEN": TOKEN},
        )
        try:
            await until(lambda: knows(server, "far"))
            yield server, far, link
        finally:
            if far.returncode is None:
                far.send_signal(signal.SIGCONT)
                far.send_signal(signal.SIGTERM)
            await far.wait()
            await until(lambda: forgot(server, "far"))
            await server.wait_at_rest()


async def check(server: Server, seed: int, tokens: int = 600) -> dict[str, object]:
    """Asks, and returns where the time went. The engine reads back every byte of KV."""
    prompt = a_prompt(tokens, seed)
    answer = await complete(server, prompt, 8)
    assert answer.choices[0].text == expected_text(prompt, 8)
    return timeline(answer)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_kv_crosses_to_the_other_host(transport: str) -> None:
    async def story() -> None:
        async with two_hosts(transport=transport) as (server, _, _):
            for seed in range(3):
                found = await check(server, seed)
                assert (found["prefill_worker"], found["path"], found["transport"]) == ("far", "streamed", transport)

    run(story(), timeout_s=60)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_delay_and_loss_cost_time_alone(transport: str) -> None:
    async def story() -> None:
        async with two_hosts(transport=transport) as (server, _, link):
            await link.set("delay_s", 0.01)
            await link.set("loss", 0.03)
            timelines = await asyncio.gather(*(check(server, seed) for seed in range(4)))
            assert all(found["path"] == "streamed" and not found["failures"] for found in timelines)

    run(story(), timeout_s=60)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_link_that_goes_down_in_mid_transfer_and_comes_back(transport: str) -> None:
    async def story() -> None:
        async with two_hosts(transport=transport) as (server, _, link):
            asking = asyncio.create_task(check(server, 1, tokens=1_500))
            await until(lambda: leased(server))
            await link.set("up", 0)
            asyncio.get_running_loop().call_later(2.0, lambda: asyncio.ensure_future(link.set("up", 1)))
            found = await asking  # over the link after all, or without it
            assert found["path"] in ("streamed", "local")
            await until(lambda: knows(server, "far"))
            await until(lambda: is_streamed_again(server))

    run(story(), timeout_s=90)


def test_a_link_that_stays_down_is_done_without() -> None:
    async def story() -> None:
        async with two_hosts("--lease-s=1.5") as (server, far, link):
            asking = asyncio.create_task(check(server, 1, tokens=1_500))
            await until(lambda: leased(server))
            await link.set("up", 0)
            assert (await asking)["path"] == "local"
            await server.wait_at_rest()  # though nobody there can be asked: what it writes is not taken any more
            far.kill()
            await until(lambda: forgot(server, "far"))
            await link.set("up", 1)

    run(story(), timeout_s=60)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP], ids=lambda end: end.name)
def test_a_prefill_worker_that_dies_or_freezes_over_there(end: signal.Signals) -> None:
    async def story() -> None:
        async with two_hosts("--lease-s=1.5") as (server, far, _):
            asking = asyncio.create_task(check(server, 1, tokens=1_500))
            await until(lambda: leased(server))
            far.send_signal(end)
            assert (await asking)["path"] == "local"
            await server.wait_at_rest()
            if end == signal.SIGSTOP:  # wakes late, with bytes on their way
                others = [asyncio.create_task(check(server, seed, tokens=30)) for seed in range(2, 8)]
                far.send_signal(signal.SIGCONT)
                await asyncio.gather(*others)
                await until(lambda: knows(server, "far"))
                await until(lambda: is_streamed_again(server))

    run(story(), timeout_s=60)


async def leased(server: Server) -> bool:
    return await server.metric("penstock_kv_cache_usage_perc") > 0


async def is_streamed_again(server: Server) -> bool:
    return (await check(server, seed=int.from_bytes(os.urandom(3)), tokens=300))["path"] == "streamed"
