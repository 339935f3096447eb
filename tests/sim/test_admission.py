"""A cluster that is asked for more than it can do: some are turned away, and the others get what was promised."""

from __future__ import annotations

import asyncio
from random import Random

import pytest

from penstock.engine.simulated import Options as EngineOptions
from penstock.errors import DeadlineExceeded, Overloaded, OverShare
from penstock.policy.admission import ServiceLevel
from penstock.policy.routing import p_token
from penstock.request import Constraints
from penstock.serve.router import ServiceOptions
from penstock.sim.loop import run_virtual
from penstock.sim.world import Answer, Shape, World

ENGINE = EngineOptions(step_s=0.002, prefill_token_s=200e-6)
TOKENS = 500
CAPACITY = 30  # requests a second: three workers of 5,000 tokens a second
SLO_S = 2.0


def world(level: ServiceLevel) -> World:
    shape = Shape(prefill=0, decode=0, either=3, engine=ENGINE, kv_blocks=8_192)
    return World(1, shape, policy=p_token.route, service=ServiceOptions(level))


async def arrivals(cluster: World, rate: float, seconds: float, wanted: Constraints = Constraints()) -> list[Answer]:
    """Poisson's, of prompts that nobody has cached."""
    rng = Random(int(rate))
    asking = []
    for _ in range(int(rate * seconds)):
        await asyncio.sleep(rng.expovariate(rate))
        asking.append(asyncio.create_task(cluster.ask(tokens=TOKENS, max_tokens=4, constraints=wanted)))
    return [await one for one in asking]


async def warm(cluster: World) -> None:
    """Every worker has measured its pace, and nothing is left to do."""
    await arrivals(cluster, 10, 3)
    await cluster.settle()
    await asyncio.sleep(cluster.shape.timing.report_s)


def share_served(answers: list[Answer]) -> float:
    return sum(answer.is_whole for answer in answers) / len(answers)


def test_overload_is_shed_and_whoever_is_admitted_gets_the_objective() -> None:
    async def story() -> None:
        async with world(ServiceLevel(ttft_s=SLO_S)) as cluster:
            await warm(cluster)
            answers = await arrivals(cluster, rate=1.5 * CAPACITY, seconds=20)
            served = [answer for answer in answers if answer.is_whole]
            shed = [answer.error for answer in answers if not answer.is_whole]
            assert sum(answer.ttft_s <= SLO_S for answer in served) > 0.99 * len(served)
            assert max(answer.ttft_s for answer in served) < 1.05 * SLO_S
            assert len(served) > 0.85 * CAPACITY * 20, "and the workers were kept busy"
            assert all(isinstance(error, Overloaded) and error.retry_after_s for error in shed)
            assert len(shed) == sum(cluster.queue.shed.values())
            assert cluster.queue.waiting == 0 and sum(cluster.queue.wait_s.counts) > 0
            await cluster.settle()

    run_virtual(story())


def test_without_an_objective_nothing_waits_here_and_all_are_late() -> None:
    async def story() -> None:
        async with world(ServiceLevel()) as cluster:
            await warm(cluster)
            answers = await arrivals(cluster, rate=1.5 * CAPACITY, seconds=20)
            assert share_served(answers) == 1.0
            assert max(answer.ttft_s for answer in answers) > 4 * SLO_S
            assert not cluster.queue.shed

    run_virtual(story())


def test_a_tenant_that_floods_does_not_touch_another_ones_share() -> None:
    async def story() -> None:
        async with world(ServiceLevel(ttft_s=SLO_S, weights={"flood": 2.0})) as cluster:
            await warm(cluster)
            flood = asyncio.create_task(arrivals(cluster, 3 * CAPACITY, 10, Constraints(tenant="flood")))
            modest = await arrivals(cluster, CAPACITY / 5, 10, Constraints(tenant="modest"))
            assert share_served(modest) == 1.0
            assert max(answer.ttft_s for answer in modest) <= SLO_S
            assert 0.2 < share_served(await flood) < 0.5

    run_virtual(story())


def test_the_urgent_go_first() -> None:
    async def story() -> None:
        async with world(ServiceLevel(ttft_s=SLO_S)) as cluster:
            await warm(cluster)
            batch = asyncio.create_task(arrivals(cluster, 2 * CAPACITY, 10, Constraints(priority=1)))
            urgent = await arrivals(cluster, CAPACITY / 2, 10)
            assert share_served(urgent) == 1.0
            assert 0.1 < share_served(await batch) < 0.5

    run_virtual(story())


def test_the_queue_is_bounded_and_its_places_are_shared() -> None:
    """A burst at one moment: those that do not fit in are told at once, the larger tenant's first."""

    async def story() -> None:
        async with world(ServiceLevel(ttft_s=60.0, max_queued=10)) as cluster:
            await warm(cluster)
            many = [
                asyncio.create_task(cluster.ask(tokens=8_000, constraints=Constraints(tenant="a"))) for _ in range(60)
            ]
            await asyncio.sleep(0)
            assert cluster.queue.waiting == 10
            few = [
                asyncio.create_task(cluster.ask(tokens=8_000, constraints=Constraints(tenant="b"))) for _ in range(3)
            ]
            answers, others = [await one for one in many], [await one for one in few]
            assert share_served(others) == 1.0
            refused = [answer.error for answer in answers if not answer.is_whole]
            assert [type(error) for error in refused].count(OverShare) == 3
            assert {type(error) for error in refused} == {OverShare, Overloaded}
            assert all(isinstance(error, Overloaded) and (error.retry_after_s or 0) > 1 for error in refused)

    run_virtual(story())


def test_whoever_leaves_makes_room_at_once() -> None:
    async def story() -> None:
        async with world(ServiceLevel(ttft_s=20.0)) as cluster:
            await warm(cluster)
            asking = [asyncio.create_task(cluster.ask(tokens=8_000)) for _ in range(40)]
            await asyncio.sleep(0.1)
            assert (waiting := cluster.queue.waiting) > 5
            for one in [one for one in asking if not one.done()][-5:]:
                one.cancel()
            await asyncio.sleep(0)
            assert cluster.queue.waiting == waiting - 5
            await asyncio.gather(*asking, return_exceptions=True)
            await cluster.settle()
            assert cluster.queue.waiting == 0

    run_virtual(story())


def test_a_deadline_that_cannot_be_met_is_said_at_once() -> None:
    async def story() -> None:
        async with world(ServiceLevel(ttft_s=20.0)) as cluster:
            await warm(cluster)
            asking = [asyncio.create_task(cluster.ask(tokens=8_000)) for _ in range(40)]
            await asyncio.sleep(0.1)
            hasty = await cluster.ask(tokens=8_000, timeout_s=2.0)
            assert isinstance(hasty.error, DeadlineExceeded) and hasty.ended_s == 0.0
            assert "to be whole 2.0 s after" in str(hasty.error)
            await asyncio.gather(*asking)

    run_virtual(story())


def test_who_waits_is_told_when_it_became_too_late_and_when_nobody_is_left() -> None:
    async def story(verb: str) -> set[str]:
        async with world(ServiceLevel(ttft_s=6.0)) as cluster:
            await warm(cluster)
            asking = [asyncio.create_task(cluster.ask(tokens=TOKENS)) for _ in range(100)]
            await asyncio.sleep(0)
            assert cluster.queue.waiting > 5
            for name in list(cluster.workers):
                getattr(cluster, verb)(name)
            waited = [await one for one in asking[-5:]]
            assert all(answer.ended_s <= 6.0 for answer in waited)
            for name in list(cluster.workers):
                cluster.resume(name)
            return {type(answer.error).__name__ for answer in waited}

    assert run_virtual(story("stall")) == {"Overloaded"}
    assert run_virtual(story("crash")) == {"NoWorker"}


@pytest.mark.parametrize("tokens", [4_000, 8_000])
def test_a_prompt_longer_than_the_objective_is_served_by_workers_that_are_idle(tokens: int) -> None:
    async def story() -> None:
        async with world(ServiceLevel(ttft_s=0.1)) as cluster:
            await warm(cluster)
            assert (await cluster.ask(tokens=tokens)).is_whole

    run_virtual(story())
