"""A cluster that is asked for more than it can do: some are turned away, and the others get what was promised."""

from __future__ import annotations

import asyncio
from random import Random

from penstock.engine.simulated import Options as EngineOptions
from penstock.errors import Overloaded
from penstock.policy.admission import ServiceLevel
from penstock.request import Constraints
from penstock.serve.router import ServiceOptions
from penstock.sim.loop import run_virtual
from penstock.sim.world import Answer, Shape, World

ENGINE = EngineOptions(step_s=0.002, prefill_token_s=200e-6)  # 5,000 tokens a second
SLO_S = 1.0
TOKENS = 500  # 0.1 s of one worker


def world(level: ServiceLevel, prefill: int = 1) -> World:
    shape = Shape(prefill=prefill, decode=2, engine=ENGINE, kv_blocks=8_192)
    return World(1, shape, service=ServiceOptions(level))


async def arrivals(cluster: World, rate: float, seconds: float, tenant: str = "", priority: int = 0) -> list[Answer]:
    """Poisson's, of prompts that nobody has cached."""
    rng = Random(hash((tenant, priority)) if False else len(tenant) * 31 + priority)
    asking: list[asyncio.Task[Answer]] = []
    wanted = Constraints(tenant=tenant, priority=priority)
    for _ in range(int(rate * seconds)):
        await asyncio.sleep(rng.expovariate(rate))
        asking.append(asyncio.create_task(cluster.ask(tokens=TOKENS, max_tokens=4, constraints=wanted)))
    return [await one for one in asking]


def test_overload_is_shed_and_whoever_is_admitted_gets_the_objective() -> None:
    async def story() -> None:
        async with world(ServiceLevel(ttft_s=SLO_S)) as cluster:
            await arrivals(cluster, 2, 5)  # workers measure their pace
            answers = await arrivals(cluster, rate=40, seconds=20)
            served = [answer for answer in answers if answer.is_whole]
            shed = [answer.error for answer in answers if answer.error is not None]
            print(len(served), len(shed), max(a.ttft_s for a in served), cluster.queue.shed, sum(cluster.queue.wait_s.counts), sorted(a.ttft_s for a in served)[-10:])
            assert len(served) + len(shed) == len(answers)
            await cluster.settle()

    run_virtual(story())
