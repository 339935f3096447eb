"""The router in front of real vLLM servers, on the CPU: `make test-vllm` makes an environment for them, and minutes.

The bundled model is served by two of them, each with KV events and NIXL.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from tempfile import TemporaryFile

import httpx
import pytest

import penstock
from tests.serve.fake_servers import listener
from tests.support import run

PYTHON = os.environ.get("VLLM_PYTHON", "")
MODEL = Path(penstock.__file__).parent / "models" / "demo"
START_S, STOP_S = 240.0, 30.0
TURBINES = "A turbine is turned by water that falls. " * 20

pytestmark = pytest.mark.skipif(not PYTHON, reason="VLLM_PYTHON names no interpreter that has vLLM: make test-vllm")


def free_port() -> int:
    with listener() as found:
        port: int = found.getsockname()[1]
        return port


class Vllm:
    """One server, which can be started more than once at the same address."""

    def __init__(self) -> None:
        self.port, self.events, self.replay, self.channel = (free_port() for _ in range(4))
        self.url = f"http://127.0.0.1:{self.port}"
        self.name = f"127.0.0.1:{self.port}"

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """It answers. Leaving the block kills all of its processes: vLLM leaves some behind otherwise."""
        with TemporaryFile() as log:
            process = await asyncio.create_subprocess_exec(
                *self._command(),
                env={**os.environ, **self._environment()},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            try:
                async with asyncio.timeout(START_S), httpx.AsyncClient() as client:
                    while not await is_healthy(client, f"{self.url}/health"):
                        if process.returncode is not None:
                            log.seek(0)
                            raise RuntimeError(log.read()[-4000:].decode(errors="replace"))
                        await asyncio.sleep(0.5)
                yield
            finally:
                os.killpg(process.pid, signal.SIGKILL)
                await process.wait()

    def _command(self) -> list[str]:
        events = {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": f"tcp://*:{self.events}",
            "replay_endpoint": f"tcp://*:{self.replay}",
        }
        transfer = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}
        settings = {
            "--model": str(MODEL),
            "--served-model-name": "demo",
            "--host": "127.0.0.1",
            "--port": str(self.port),
            "--dtype": "float32",
            "--block-size": "32",
            "--max-num-seqs": "8",
            "--kv-events-config": json.dumps(events),
            "--kv-transfer-config": json.dumps(transfer),
        }
        flags = [part for setting in settings.items() for part in setting]
        return [PYTHON, "-m", "vllm.entrypoints.openai.api_server", *flags, "--enforce-eager"]

    def _environment(self) -> dict[str, str]:
        return {
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(self.channel),
            "VLLM_NO_USAGE_STATS": "1",
        }


async def is_healthy(client: httpx.AsyncClient, url: str) -> bool:
    try:
        return (await client.get(url)).status_code == 200
    except httpx.TransportError:
        return False


@asynccontextmanager
async def router(*arguments: str) -> AsyncIterator[httpx.AsyncClient]:
    """`penstock router` with these arguments, and a client of it."""
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "penstock", "router", "--port", str(port), *arguments
    )
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            yield client
    finally:
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), STOP_S) == 0


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    while not await condition():
        await asyncio.sleep(0.1)


async def known(client: httpx.AsyncClient) -> Mapping[str, Mapping[str, object]]:
    """What the router says of its servers; nothing before it listens."""
    try:
        servers: dict[str, dict[str, object]] = (await client.get("/health")).json()["servers"]
    except httpx.TransportError:
        return {}
    return servers


async def wait_up(client: httpx.AsyncClient, servers: Sequence[Vllm]) -> None:
    async def are_up() -> bool:
        found = await known(client)
        return all(found.get(server.name, {}).get("up") for server in servers)

    await until(are_up)


async def complete(client: httpx.AsyncClient, prompt: str, **fields: object) -> httpx.Response:
    body = {"model": "demo", "prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": True, **fields}
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response


def text_of(response: httpx.Response) -> str:
    text: str = response.json()["choices"][0]["text"]
    return text


def test_prefixes_restarts_and_two_calls() -> None:
    async def main() -> None:
        one, other = Vllm(), Vllm()
        async with AsyncExitStack() as first, other.running():
            await first.enter_async_context(one.running())
            await prefixes_go_to_their_holder(one, other)
            await prefill_and_decode_say_the_same(one, other)
            await a_restart_empties_the_cache(first, one, other)

    run(main(), timeout_s=900)


async def prefixes_go_to_their_holder(one: Vllm, other: Vllm) -> None:
    async with router("--attach", one.url, other.url) as client:
        await wait_up(client, [one, other])
        holder = (await complete(client, TURBINES)).headers["x-penstock-server"]

        async def is_told() -> bool:
            return bool((await known(client))[holder]["indexed_blocks"])

        await until(is_told)
        for number in range(4):
            assert (await complete(client, f"{TURBINES} {number}")).headers["x-penstock-server"] == holder


async def prefill_and_decode_say_the_same(one: Vllm, other: Vllm) -> None:
    async with (
        router("--prefill", one.url, "--decode", other.url, "--policy", "p_token") as client,
        httpx.AsyncClient(base_url=other.url, timeout=120) as alone,
    ):
        await wait_up(client, [one, other])
        for number in range(3):
            prompt = f"[{number}] Pipes bring water. " * (20 + number)
            split = await complete(client, prompt)
            assert split.headers["x-penstock-prefill"] == one.name
            assert text_of(split) == text_of(await complete(alone, prompt, cache_salt="computed here"))
        page = (await alone.get("/metrics")).text
        moved = [line for line in page.splitlines() if line.startswith("vllm:nixl_bytes_transferred_sum")]
        assert float(moved[0].rsplit(" ", 1)[1]) > 0


async def a_restart_empties_the_cache(stack: AsyncExitStack, one: Vllm, other: Vllm) -> None:
    async with router("--attach", one.url, other.url) as client, AsyncExitStack() as again:
        await wait_up(client, [one, other])

        async def is_indexed() -> bool:
            return bool((await known(client))[one.name]["indexed_blocks"])

        await until(is_indexed)  # by a replay of what it held before this router came
        await stack.aclose()
        assert (await complete(client, TURBINES)).headers["x-penstock-server"] == other.name
        await again.enter_async_context(one.running())
        await wait_up(client, [one, other])
        assert not await is_indexed()
