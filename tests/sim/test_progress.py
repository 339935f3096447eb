"""Engines that stand still while their processes go on reporting, and engines that are only slow."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from penstock.engine.simulated import Options as EngineOptions
from penstock.errors import WorkerLost
from penstock.policy.liveness import Patience
from penstock.policy.routing import round_robin
from penstock.serve.rpc import RpcOptions
from penstock.serve.worker import WorkerOptions
from penstock.sim.loop import run_virtual
from penstock.sim.world import Answer, Shape, World

ENGINE = EngineOptions(step_s=0.01, prefill_token_s=1e-4)
FLOOR_S = Patience().floor_s


@pytest.fixture(params=[False, True], ids=["in-place", "streamed"])
def is_streamed(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def holder(world: World) -> str:
    return next(name for name in world.workers if world.workers[name].load().running)


async def begun(world: World, count: int, **ask: int) -> list[asyncio.Task[Answer]]:
    tasks = [asyncio.create_task(world.ask(**{"tokens": 200, "max_tokens": 100, **ask})) for _ in range(count)]  # type: ignore[arg-type]
    await asyncio.sleep(0.5)
    return tasks


@asynccontextmanager
async def never_stalled(world: World) -> AsyncIterator[None]:
    """No worker is said to stand still while inside the block."""

    async def look() -> None:
        while True:
            assert not world.router.stalled()
            await world.router.wait_change()

    looking = asyncio.create_task(look())
    try:
        yield
    finally:
        looking.cancel()
        await asyncio.wait([looking])
        assert looking.cancelled()


def test_streams_of_a_decode_engine_that_freezes_end_whole_elsewhere(is_streamed: bool) -> None:
    async def story() -> None:
        shape = Shape(decode=2, engine=ENGINE, is_streamed=is_streamed)
        async with World(1, shape) as world:
            asking = await begun(world, 8)
            frozen = holder(world)
            world.stall(frozen)
            answers = await asyncio.gather(*asking)
            assert all(answer.is_whole for answer in answers)
            moved = [one.finish.timeline for one in answers if one.finish and one.finish.timeline.moves]
            assert moved and all(f"{frozen} made no step for 1" in timeline.failures[0] for timeline in moved)
            assert all(timeline.decode_worker != frozen for timeline in moved)
            assert max(answer.ended_s for answer in answers) < FLOOR_S + 10
            assert list(world.router.stalled()) == [frozen]
            await later_requests_avoid(world, frozen)
            world.resume(frozen)
            await asyncio.sleep(2.0)
            assert not world.router.stalled()
            again = await asyncio.gather(*await begun(world, 8))
            assert frozen in {answer.finish.timeline.decode_worker for answer in again if answer.finish}
            await world.settle()

    async def later_requests_avoid(world: World, frozen: str) -> None:
        await asyncio.sleep(5.0)  # it is not avoided any more for having lost requests
        for answer in await asyncio.gather(*await begun(world, 16, max_tokens=8)):
            assert answer.is_whole and answer.finish is not None
            assert answer.finish.timeline.decode_worker != frozen and not answer.finish.timeline.failures

    run_virtual(story())


def test_the_log_says_who_stands_still_what_comes_of_it_and_when_it_is_over(caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        async with World(1, Shape(decode=2, engine=ENGINE)) as world:
            asking = await begun(world, 2)
            frozen = holder(world)
            world.stall(frozen)
            await asyncio.gather(*asking)
            world.resume(frozen)
            await asyncio.sleep(2.0)

    with caplog.at_level(logging.WARNING, logger="penstock.serve.router"):
        run_virtual(story())
    stalled, moving = caplog.messages
    assert "stands still: no step for 1" in stalled and "restart it" in stalled
    assert "moves again after" in moving


def test_requests_before_their_first_token_are_recovered_too(is_streamed: bool) -> None:
    async def story() -> None:
        shape = Shape(prefill=0, decode=2, engine=ENGINE, is_streamed=is_streamed)
        async with World(1, shape) as world:
            warm = await asyncio.gather(*await begun(world, 4, max_tokens=8))
            assert all(answer.is_whole for answer in warm)
            world.stall("decode-0")
            answers = await asyncio.gather(*await begun(world, 8))
            assert all(answer.is_whole for answer in answers)
            assert {one.finish.timeline.decode_worker for one in answers if one.finish} == {"decode-1"}
            world.resume("decode-0")
            await world.settle()

    run_virtual(story())


def test_without_another_worker_streams_stay_and_end_when_it_moves_again() -> None:
    async def story() -> None:
        async with World(1, Shape(prefill=0, engine=ENGINE)) as world:
            asking = await begun(world, 2)
            world.stall("decode-0")
            await asyncio.sleep(2 * FLOOR_S)
            assert list(world.router.stalled()) == ["decode-0"]
            asking += await begun(world, 1)  # there is nobody else to ask
            world.resume("decode-0")
            for answer in await asyncio.gather(*asking):
                assert answer.is_whole and answer.finish is not None and not answer.finish.timeline.failures
            await world.settle()

    run_virtual(story())


def test_a_stream_on_which_every_engine_hangs_does_not_go_round_the_fleet() -> None:
    async def story() -> None:
        async with World(1, Shape(prefill=0, decode=5, engine=ENGINE), policy=round_robin.route) as world:
            await asyncio.gather(*await begun(world, 5, max_tokens=8))
            (asking,) = await begun(world, 1)
            before = {name: world.engine(name).steps_begun for name in world.workers}
            for name in world.workers:
                world.stall(name)
            answer = await asking
            assert isinstance(answer.error, WorkerLost) and "made no step" in str(answer.error)
            assert answer.is_right_so_far and answer.tokens
            assert sum(world.engine(name).steps_begun > steps for name, steps in before.items()) == 2  # and the first
            for name in world.workers:
                world.resume(name)
            await world.settle()

    run_virtual(story())


def test_a_worker_with_long_steps_is_slow_and_not_dead(is_streamed: bool) -> None:
    """Half a minute a step, 16 of them in one call that ends after eight minutes; priors say milliseconds."""

    async def story() -> None:
        engine = EngineOptions(step_s=30.0)
        async with World(1, Shape(decode=2, engine=engine, is_streamed=is_streamed)) as world, never_stalled(world):
            asking = [world.ask(tokens=1_500, max_tokens=40, timeout_s=1e5) for _ in range(3)]
            for answer in await asyncio.gather(*asking):
                assert answer.is_whole and answer.finish is not None
                assert (answer.finish.timeline.failures, answer.finish.timeline.moves) == ([], 0)
            await world.settle()

    run_virtual(story())


def test_a_prefill_worker_that_waits_for_a_frozen_decode_worker_does_not_stand_still() -> None:
    async def story() -> None:
        engine = EngineOptions(prefill_token_s=1e-3)
        patient = WorkerOptions("", 0, rpc=RpcOptions(silence_s=60.0))
        async with World(1, Shape(decode=2, engine=engine, worker=patient)) as world:
            asking = [asyncio.create_task(world.ask(tokens=2_000)) for _ in range(2)]
            await asyncio.sleep(0.9)
            frozen = next(name for name in world.workers if world.workers[name].load().leased_blocks)
            async with never_stalled(world):
                world.freeze(frozen)
                await asyncio.sleep(2 * FLOOR_S)
                world.thaw(frozen)
                assert all(answer.is_whole for answer in await asyncio.gather(*asking))
            await world.settle()

    run_virtual(story())


def test_a_prefill_engine_that_freezes_is_replaced_and_gets_nothing_more(is_streamed: bool) -> None:
    async def story() -> None:
        engine = EngineOptions(prefill_token_s=1e-3)
        async with World(1, Shape(prefill=2, engine=engine, is_streamed=is_streamed)) as world:
            assert all(answer.is_whole for answer in await asyncio.gather(*(world.ask(tokens=600) for _ in range(4))))
            asking = [asyncio.create_task(world.ask(tokens=2_000)) for _ in range(4)]
            await asyncio.sleep(0.9)
            world.stall("prefill-0")
            answers = await asyncio.gather(*asking)
            assert all(answer.is_whole and answer.ttft_s < 2 * FLOOR_S for answer in answers)
            failures = [failure for one in answers if one.finish for failure in one.finish.timeline.failures]
            assert failures and all("prefill-0" in failure and "made no step" in failure for failure in failures)
            later = await world.ask(tokens=2_000)
            assert later.is_whole and later.finish is not None
            assert later.finish.timeline.prefill_worker != "prefill-0" and not later.finish.timeline.failures
            world.resume("prefill-0")
            await world.settle()

    run_virtual(story())
