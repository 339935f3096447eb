"""Workers with engines of one's choice, joined by memory wire and transport, on whatever loop runs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from random import Random

from penstock.blocks import KvLayout, Region
from penstock.cluster import Member, Role, Standing
from penstock.discovery.memory import MemoryDiscovery
from penstock.engine.api import Engine
from penstock.policy.routing.api import Ask, Choice, Fleet, Route
from penstock.request import Finish, Request, Sampling, Token
from penstock.serve.router import Router
from penstock.serve.rpc import Endpoint
from penstock.serve.worker import Worker, WorkerOptions
from penstock.tokens import pack
from penstock.transport.api import Transport
from penstock.transport.memory import MemoryHub, MemoryTransport, heap_region
from penstock.wire.memory import MemoryNetwork

MODEL = "m"


def through(prefill: str, decode: str) -> Route:
    """A policy that always chooses this pair."""

    def route(now: float, ask: Ask, fleet: Fleet, rng: Random) -> Choice:
        return Choice(decode, () if prefill == decode else (prefill,), 0.0, -1.0, "by test")

    return route


def by_turns(*policies: Route) -> Route:
    """One policy after the other, request by request."""
    turn = iter(range(1 << 30))

    def route(now: float, ask: Ask, fleet: Fleet, rng: Random) -> Choice:
        return policies[next(turn) % len(policies)](now, ask, fleet, rng)

    return route


class Cluster:
    """`workers` by name, the regions of their KV, the discovery that lists them, and a way to ask."""

    def __init__(
        self,
        router: Router,
        workers: Mapping[str, Worker],
        regions: Mapping[str, Region],
        discovery: MemoryDiscovery,
    ) -> None:
        self.router = router
        self.discovery = discovery
        self.workers = workers
        self.regions = regions
        self._asked = 0

    async def ask(self, prompt: list[int], sampling: Sampling) -> tuple[list[Token], Finish]:
        """The whole output. Raises what the request failed with."""
        self._asked += 1
        tokens: list[Token] = []
        async with self.router.generate(Request(f"r{self._asked}", MODEL, pack(prompt), sampling)) as stream:
            while True:
                fresh, finish = await stream.read()
                tokens += fresh
                if finish is not None:
                    return tokens, finish

    def check_all_free(self) -> None:
        for name, worker in self.workers.items():
            load = worker.load()
            assert load.free_blocks == load.blocks, f"{name} still holds blocks: {load}"
            worker.check_integrity()


@asynccontextmanager
async def cluster(
    engines: Mapping[str, tuple[Role, Engine]],
    policy: Route,
    options: WorkerOptions,
    kv_blocks: int,
    transports: Mapping[str, Transport] | None = None,
) -> AsyncIterator[Cluster]:
    """One worker for each engine. `options` apply to all, names and addresses are made here.

    KV is in one memory, unless each worker has a transport of its own.
    """
    network, hub, discovery = MemoryNetwork(), MemoryHub(), MemoryDiscovery(ttl_s=3600)
    workers: dict[str, Worker] = {}
    regions: dict[str, Region] = {}
    async with AsyncExitStack() as stack:
        for name, (role, engine) in engines.items():
            address = f"memory:{name}"
            own = replace(
                options,
                name=name,
                epoch=1,
                role=role,
                model=MODEL,
                addresses=(address,),
                kv_bytes=kv_blocks * engine.info.layout.block_bytes,
            )

            @asynccontextmanager
            async def new_region(owner: str, epoch: int, layout: KvLayout, blocks: int) -> AsyncIterator[Region]:
                async with heap_region(owner, epoch, layout, blocks) as regions[owner]:
                    yield regions[owner]

            worker = Worker(
                own,
                engine,
                {"memory": network.wire(name)},
                new_region,
                [(transports or {}).get(name) or MemoryTransport(hub)],
            )
            workers[name] = await stack.enter_async_context(worker)
            await _announce(stack, discovery, worker.member)
        endpoint = await stack.enter_async_context(Endpoint({"memory": network.wire("frontend")}, "", {}))
        router = await stack.enter_async_context(Router(discovery, endpoint, Random(1), policy))
        await router.wait_ready(len(workers))
        yield Cluster(router, workers, regions, discovery)


async def _announce(stack: AsyncExitStack, discovery: MemoryDiscovery, member: Member) -> None:
    announcement = await stack.enter_async_context(discovery.announce(member))
    await announcement.renew(Standing(member))
