"""What service levels bring under overload, and what constraints cost a decision.

First, in virtual time: four workers that compute 5,000 prompt tokens a second each are asked for 500-token prompts at
several times what they can do, with two seconds promised and without (the reference). Goodput is how many requests a
second got their first token in two seconds, of what is asked for or could be done, whichever is less.

Then CPU time of a router's decision by what a request asks for; the reference asks for nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from random import Random

import numpy as np
from report import Row, emit

from penstock.blocks import KvLayout
from penstock.cluster import Load, Member, Role, Standing
from penstock.discovery.memory import MemoryDiscovery
from penstock.engine.simulated import Options as EngineOptions
from penstock.policy.admission import ServiceLevel
from penstock.policy.routing import p_token
from penstock.request import Constraints, Request, Sampling
from penstock.serve.router import Router, ServiceOptions
from penstock.serve.rpc import Endpoint
from penstock.sim.loop import run_virtual
from penstock.sim.world import Answer, Shape, World
from penstock.tokens import pack
from penstock.wire.memory import MemoryNetwork

SLO_S = 2.0
WORKERS, TOKENS = 4, 500
CAPACITY_PER_S = WORKERS * 5_000 / TOKENS
LOADS = (0.6, 0.9, 1.2, 2.0)
LIMITED = ServiceOptions(ServiceLevel(ttft_s=SLO_S))
FLEETS = (8, 1_000)
ROLES: tuple[Role, Role] = ("prefill", "decode")
LAYOUT = KvLayout(layers=80, kv_heads=8, head_dim=128, block_tokens=64, dtype="bfloat16")
ASKS = {
    "session": (ServiceOptions(), Constraints(session="s")),
    "preferred label": (ServiceOptions(), Constraints(prefer=(("zone", "1"),))),
    "required label": (ServiceOptions(), Constraints(require=(("zone", "1"),))),
    "time to first token": (ServiceOptions(ServiceLevel(ttft_s=1e6)), Constraints()),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    parser.add_argument("--quick", action="store_true", help="shorter runs")
    arguments = parser.parse_args()
    rows = [row for load in LOADS for row in overload(load, 20 if arguments.quick else 120)]
    rows += [row for workers in FLEETS for row in costs(workers, 300 if arguments.quick else 3_000)]
    emit(rows, arguments.json)


def overload(load: float, seconds: float) -> Iterator[Row]:
    """Goodput and the 99th percentile of those that were served."""
    kept, free = (run_virtual(played(load, seconds, service)) for service in (LIMITED, ServiceOptions()))
    possible = min(load, 1.0) * CAPACITY_PER_S
    goodputs = [float((times_s <= SLO_S).sum() / seconds) for times_s in (kept, free)]
    name, reference = f"{load} of capacity", "nothing promised"
    yield Row(f"{name}: share of possible goodput", goodputs[0] / possible, "", reference, goodputs[1] / possible)
    p99s_s = [float(np.percentile(times_s, 99)) for times_s in (kept, free)]
    yield Row(f"{name}: p99 TTFT", p99s_s[0], "s", reference, p99s_s[1], aim=SLO_S, aim_is_for_value=True)


async def played(load: float, seconds: float, service: ServiceOptions) -> np.ndarray:
    """Times to the first token of those that were served."""
    engine = EngineOptions(step_s=0.002, prefill_token_s=200e-6)
    shape = Shape(prefill=0, decode=0, either=WORKERS, engine=engine, kv_blocks=16_384)
    async with World(1, shape, policy=p_token.route, service=service) as world:
        await arrivals(world, 0.3, 5)  # workers learn their pace
        answers = await arrivals(world, load, seconds)
        return np.array([answer.ttft_s for answer in answers if answer.is_whole])


async def arrivals(world: World, load: float, seconds: float) -> list[Answer]:
    """Poisson's, of prompts that nobody has cached."""
    rng, rate, asking = Random(2), load * CAPACITY_PER_S, []
    for _ in range(int(rate * seconds)):
        await asyncio.sleep(rng.expovariate(rate))
        asking.append(asyncio.create_task(world.ask(tokens=TOKENS, max_tokens=4)))
    return [await one for one in asking]


def costs(workers: int, decisions: int) -> list[Row]:
    """A row for each kind of wish."""
    plain_us = asyncio.run(decision_us(workers, decisions, ServiceOptions(), Constraints()))
    rows = []
    for name, (service, constraints) in ASKS.items():
        took_us = asyncio.run(decision_us(workers, decisions, service, constraints))
        rows.append(Row(f"{workers} workers, {name}", took_us, "us", "no wish", plain_us))
    return rows


async def decision_us(workers: int, decisions: int, service: ServiceOptions, constraints: Constraints) -> float:
    """CPU time of admitting, routing and releasing a request, the third of three rounds."""
    prompts = [pack(Random(number).choices(range(30_000), k=TOKENS)) for number in range(50)]
    async with router_of(workers, service) as router:
        for _ in range(3):
            begun_s = time.process_time()
            for number in range(decisions):
                request = Request(f"r{number}", "m", prompts[number % 50], Sampling(100), constraints=constraints)
                async with router.admitted(request):
                    router.route(request, {})
                router.prefilled(request)
                router.release(request)
            took_s = time.process_time() - begun_s
    return took_s / decisions * 1e6


@asynccontextmanager
async def router_of(workers: int, service: ServiceOptions) -> AsyncIterator[Router]:
    """With so many workers in four zones, half of which prefill."""
    discovery = MemoryDiscovery(ttl_s=3_600)
    load = Load(prefill_tokens_per_s=20_000.0, decode_step_s=0.02, blocks=10_000, free_blocks=10_000)
    async with AsyncExitStack() as stack:
        for number in range(workers):
            role, labels = ROLES[number // 4 % 2], {"zone": str(number % 4)}
            member = Member(f"w{number}", 1, role, "m", (), LAYOUT, 10_000, 100_000, domain="network", labels=labels)
            announced = await stack.enter_async_context(discovery.announce(member))
            await announced.renew(Standing(member, load))
        endpoint = await stack.enter_async_context(Endpoint({"memory": MemoryNetwork().wire("frontend")}, "", {}))
        router = Router(discovery, endpoint, Random(1), p_token.route, service=service)
        yield await stack.enter_async_context(router)


if __name__ == "__main__":
    main()
