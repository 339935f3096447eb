"""Frontend processes that share a port, on the virtual clock: who knows which worker, and who tells what."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from penstock import metrics
from penstock.blocks import KvLayout
from penstock.cluster import Load, Member, Standing
from penstock.discovery.memory import MemoryDiscovery
from penstock.serve.frontend import Frontend
from penstock.serve.registry import Registry, stay_joined
from penstock.serve.rpc import Endpoint, Handler
from penstock.serve.siblings import REJOIN_S, Siblings
from penstock.sim.loop import run_virtual
from penstock.wire.memory import MemoryNetwork
from tests.serve.fake_backend import FakeBackend, chat_body, frontend
from tests.serve.test_frontend import Client, get

NAMES = ("frontend-0", "frontend-1", "frontend-2")


@dataclass
class Process:
    """One of them, without its router."""

    endpoint: Endpoint
    discovery: MemoryDiscovery
    siblings: Siblings
    app: Frontend

    async def wait_workers(self, *names: str) -> dict[str, Standing]:
        async with aclosing(self.discovery.watch()) as fleets:  # type: ignore[type-var]
            while sorted(fleet := await anext(fleets)) != sorted(names):
                pass
        return fleet


@asynccontextmanager
async def running(network: MemoryNetwork, name: str) -> AsyncIterator[Process]:
    methods: dict[str, Handler] = {}
    endpoint = Endpoint({"memory": network.wire(name)}, "", methods)
    discovery = MemoryDiscovery()
    others = {other: f"memory:{other}" for other in NAMES if other != name}
    siblings = Siblings(name, others, endpoint, discovery)
    registry = Registry(discovery, siblings.telling)
    app = frontend(FakeBackend(), siblings=siblings)
    methods |= {"join": registry.join, "members": registry.members, "relay": siblings.relayed, **app.methods()}
    async with endpoint, endpoint.listen(f"memory:{name}"), app:
        yield Process(endpoint, discovery, siblings, app)


def play(story: Callable[[MemoryNetwork, list[Process], AsyncExitStack], Awaitable[None]]) -> None:
    """A story of three processes; the last one can be ended by closing the stack."""

    async def bounded() -> None:
        network = MemoryNetwork()
        async with asyncio.timeout(1_000), AsyncExitStack() as stack, AsyncExitStack() as last:
            processes = [await stack.enter_async_context(running(network, name)) for name in NAMES[:-1]]
            processes.append(await last.enter_async_context(running(network, NAMES[-1])))
            await story(network, processes, last)

    run_virtual(bounded())


def standing(running: int = 0) -> Standing:
    layout = KvLayout(layers=1, kv_heads=1, head_dim=4, block_tokens=16, dtype="float32")
    return Standing(Member("w", 1, "any", "demo", ("memory:w",), layout, 64, 1024), Load(running=running))


@asynccontextmanager
async def joined(network: MemoryNetwork, name: str, now: Callable[[], Standing] = standing) -> AsyncIterator[None]:
    """A worker that has joined one of them."""
    async with Endpoint({"memory": network.wire("w")}, "", {}) as endpoint:
        joining = endpoint.spawn(stay_joined(endpoint, (f"memory:{name}",), now, 0.5))
        yield
        joining.cancel()
        await asyncio.wait([joining])


def test_a_worker_that_joins_one_is_known_to_all_and_so_is_its_load() -> None:
    async def story(network: MemoryNetwork, processes: list[Process], last: AsyncExitStack) -> None:
        async with joined(network, NAMES[0], lambda: standing(running=7)):
            for process in processes:
                fleet = await process.wait_workers("w")
                while fleet["w"].load.running != 7:
                    fleet = await process.wait_workers("w")
        for process in processes:
            await process.wait_workers()

    play(story)


def test_a_worker_outlives_the_process_that_it_had_joined() -> None:
    async def story(network: MemoryNetwork, processes: list[Process], last: AsyncExitStack) -> None:
        first, other, joined_one = processes
        async with AsyncExitStack() as worker:
            await worker.enter_async_context(joined(network, joined_one.siblings.own))
            for process in processes:
                await process.wait_workers("w")
            await last.aclose()
            seen: list[int] = []
            async with asyncio.TaskGroup() as group:
                watching = group.create_task(watch(first, seen))
                await asyncio.sleep(REJOIN_S / 2)
                await worker.enter_async_context(joined(network, other.siblings.own))
                await asyncio.sleep(2 * REJOIN_S)
                watching.cancel()
            assert set(seen) == {1}
        await first.wait_workers()

    play(story)


def test_a_worker_that_joins_no_other_is_forgotten() -> None:
    async def story(network: MemoryNetwork, processes: list[Process], last: AsyncExitStack) -> None:
        async with joined(network, processes[2].siblings.own):
            await processes[0].wait_workers("w")
            await last.aclose()
            started_s = asyncio.get_running_loop().time()
            await processes[0].wait_workers()
            assert asyncio.get_running_loop().time() - started_s <= 2 * REJOIN_S

    play(story)


async def watch(process: Process, seen: list[int]) -> None:
    async with aclosing(process.discovery.watch()) as fleets:  # type: ignore[type-var]
        async for fleet in fleets:
            seen.append(len(fleet))


def test_one_that_starts_late_catches_up_before_it_serves() -> None:
    async def story(network: MemoryNetwork, processes: list[Process], last: AsyncExitStack) -> None:
        await last.aclose()
        async with joined(network, NAMES[0]):
            await processes[1].wait_workers("w")
            async with running(network, NAMES[2]) as late:
                await late.siblings.wait_caught_up()
                await late.wait_workers("w")

    play(story)


def test_any_of_them_tells_what_another_did() -> None:
    async def story(network: MemoryNetwork, processes: list[Process], last: AsyncExitStack) -> None:
        first, other, _ = processes
        answer = (await Client(other.app).ask("POST", "/v1/chat/completions", chat_body())).json
        record = (await get(first.app, f"/debug/requests/{answer['id']}")).json
        assert (record["id"], record["state"]) == (answer["id"], "finished")
        assert [one["id"] for one in (await get(first.app, "/debug/requests")).json["requests"]] == [answer["id"]]
        assert (await get(first.app, "/debug/requests/unheard-of")).status == 404

    play(story)


def test_counts_are_told_apart_by_process() -> None:
    async def story(network: MemoryNetwork, processes: list[Process], last: AsyncExitStack) -> None:
        first, other, _ = processes
        await Client(other.app).ask("POST", "/v1/chat/completions", chat_body())
        assert prompts(await get(first.app, "/metrics")) == {"frontend-1": 5.0}
        await Client(first.app).ask("POST", "/v1/chat/completions", chat_body())
        assert prompts(await get(other.app, "/metrics")) == {"frontend-0": 5.0, "frontend-1": 5.0}
        await last.aclose()  # one that is gone is left out, and delays nothing for long
        assert prompts(await get(other.app, "/metrics")) == {"frontend-0": 5.0, "frontend-1": 5.0}

    play(story)


def prompts(page: Client) -> dict[str, float]:
    """Tokens of prompts by process."""
    families = {family.name: family for family in text_string_to_metric_families(page.body.decode())}
    return {one.labels["process"]: one.value for one in families["penstock_prompt_tokens"].samples}


def test_counts_cross_processes_as_they_are() -> None:
    counted = metrics.Metrics()
    counted.model("demo").ttft_s.observe(0.5)
    told = metrics.Told(counted, 0.25)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(told), type=metrics.Told) == told
