"""Streams whose decode worker is lost or leaves: they go on elsewhere, as if nothing had happened."""

from __future__ import annotations

import asyncio

import pytest

from penstock.engine.simulated import Options as EngineOptions
from penstock.errors import DeadlineExceeded, WorkerLost
from penstock.policy.batching import Limits
from penstock.request import Timeline
from penstock.serve.decode import DecodeOptions
from penstock.serve.worker import WorkerOptions
from penstock.sim.loop import run_virtual
from penstock.sim.processes import Timing
from penstock.sim.world import Answer, Shape, World

ENGINE = EngineOptions(step_s=0.01, prefill_token_s=1e-4)


@pytest.fixture(params=[False, True], ids=["in-place", "streamed"])
def is_streamed(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def world(is_streamed: bool = False, prefill: int = 1, decode: int = 2, **shape: object) -> World:
    return World(1, Shape(prefill=prefill, decode=decode, engine=ENGINE, is_streamed=is_streamed, **shape))  # type: ignore[arg-type]


def holder(world: World) -> str:
    """Who decodes."""
    return next(name for name in world.workers if world.workers[name].load().running)


async def begun(world: World, after_s: float = 0.5, **ask: int) -> asyncio.Task[Answer]:
    asking = asyncio.create_task(world.ask(**{"tokens": 200, "max_tokens": 200, **ask}))  # type: ignore[arg-type]
    await asyncio.sleep(after_s)
    return asking


def timeline_of(answer: Answer) -> Timeline:
    assert answer.is_whole and answer.finish is not None, answer
    return answer.finish.timeline


@pytest.mark.parametrize("seed", [0, 7], ids=["greedy", "seeded"])
def test_a_stream_goes_on_elsewhere_with_the_tokens_it_would_have_had(seed: int, is_streamed: bool) -> None:
    async def story() -> None:
        async with world(is_streamed) as cluster:
            asking = await begun(cluster, seed=seed)
            lost = holder(cluster)
            cluster.crash(lost)
            timeline = timeline_of(await asking)
            assert timeline.moves == 1 and lost in timeline.failures[0] and timeline.decode_worker != lost
            assert (timeline.prompt_tokens, timeline.output_tokens) == (200, 200)
            assert timeline.first_token_s is not None and timeline.first_token_s < 0.1
            assert timeline.ended_s is not None and 2.0 < timeline.ended_s < 2.4
            await cluster.settle()

    run_virtual(story())


def test_two_losses_in_a_row_and_one_worker_left(is_streamed: bool) -> None:
    async def story() -> None:
        async with world(is_streamed) as cluster:
            asking = await begun(cluster)
            for _ in range(2):
                cluster.crash(holder(cluster))
                await asyncio.sleep(0.3)
            timeline = timeline_of(await asking)
            assert (timeline.moves, len(timeline.failures)) == (2, 2)
            await cluster.settle()

    run_virtual(story())


def test_a_frozen_worker_is_left_after_its_silence_and_its_late_tokens_are_nobodys(is_streamed: bool) -> None:
    async def story() -> None:
        async with world(is_streamed) as cluster:
            asking = await begun(cluster)
            frozen = holder(cluster)
            cluster.freeze(frozen)
            timeline = timeline_of(await asking)
            assert timeline.moves == 1
            cluster.thaw(frozen)
            await cluster.settle()

    run_virtual(story())


@pytest.mark.parametrize("steps", range(1, 9))
def test_at_whatever_token_the_worker_is_lost(steps: int) -> None:
    """The last of them comes with the end, so nothing can be lost between the two."""

    async def story() -> None:
        async with world() as cluster:
            asking = await begun(cluster, after_s=0.0, tokens=20, max_tokens=8)
            while sum(worker.load().output_tokens for worker in cluster.workers.values()) < steps:
                await asyncio.sleep(0.001)
            busy = [name for name in cluster.workers if cluster.workers[name].load().output_tokens]
            cluster.crash(busy[0])
            timeline = timeline_of(await asking)
            assert timeline.output_tokens == 8 and timeline.moves <= 1

    run_virtual(story())


def test_without_another_worker_it_waits_for_one() -> None:
    async def story() -> None:
        async with world(prefill=0, decode=1) as cluster:
            asking = await begun(cluster)
            cluster.crash("decode-0")
            await asyncio.sleep(8)
            cluster.start("decode-0", "decode")
            assert timeline_of(await asking).moves == 1
            await cluster.settle()

    run_virtual(story())


def test_and_not_for_ever() -> None:
    async def story() -> None:
        async with world(prefill=0, decode=1) as cluster:
            asking = await begun(cluster)
            cluster.crash("decode-0")
            answer = await asking
            assert isinstance(answer.error, WorkerLost) and "no other worker took it over" in str(answer.error)
            assert answer.is_right_so_far and len(answer.tokens) > 20 and answer.ended_s < 17

    run_virtual(story())


def test_the_deadline_is_that_of_the_whole_request() -> None:
    async def story() -> None:
        async with world() as cluster:
            asking = asyncio.create_task(cluster.ask(tokens=200, max_tokens=5_000, timeout_s=3.0))
            for _ in range(2):
                await asyncio.sleep(1.0)
                cluster.crash(holder(cluster))
            answer = await asking
            assert isinstance(answer.error, DeadlineExceeded) and 2.9 < answer.ended_s < 3.2

    run_virtual(story())


def test_a_client_that_leaves_while_its_stream_moves_leaves_nothing_behind() -> None:
    async def story() -> None:
        async with world() as cluster:
            for tenth in range(10):
                asking = await begun(cluster)
                lost = holder(cluster)
                cluster.crash(lost)
                await asyncio.sleep(tenth / 100)
                asking.cancel()
                await asyncio.wait([asking])
                cluster.start(lost, "prefill" if lost.startswith("prefill") else "decode")
                await asyncio.sleep(0.5)
                await cluster.settle()

    run_virtual(story())


def test_a_worker_that_has_no_room_is_asked_again() -> None:
    async def story() -> None:
        small = WorkerOptions("", 0, limits=Limits(max_running=1), decode=DecodeOptions(max_queued=1))
        async with world(prefill=0, decode=2, worker=small) as cluster:
            asking = [await begun(cluster, after_s=0.1) for _ in range(3)]  # one of them waits for a slot
            await asyncio.sleep(0.1)
            waits = next(name for name in cluster.workers if cluster.workers[name].load().waiting)
            cluster.crash(next(name for name in cluster.workers if name != waits))
            timelines = [timeline_of(await each) for each in asking]
            failures = [failure for timeline in timelines for failure in timeline.failures]
            assert any("1 requests queued, its limit" in failure for failure in failures)
            await cluster.settle()

    run_virtual(story())


def test_a_worker_that_drains_hands_its_streams_over_at_once(is_streamed: bool) -> None:
    async def story() -> None:
        async with world(is_streamed) as cluster:
            asking = [await begun(cluster, after_s=0.1, max_tokens=1_000) for _ in range(4)]
            leaving = [name for name in cluster.workers if cluster.workers[name].load().running]
            cluster.drain(leaving[0])
            await asyncio.sleep(2)
            assert leaving[0] not in cluster.workers  # long before its streams end
            timelines = [timeline_of(await each) for each in asking]
            assert sum(timeline.moves for timeline in timelines) > 0
            await cluster.settle()

    run_virtual(story())


def test_the_last_worker_that_drains_ends_its_streams_first() -> None:
    async def story() -> None:
        async with world(prefill=0, decode=1) as cluster:
            asking = await begun(cluster, max_tokens=300)
            cluster.drain("decode-0")
            assert timeline_of(await asking).moves == 0

    run_virtual(story())


def test_a_rolling_restart_of_all_workers_loses_no_stream(is_streamed: bool) -> None:
    async def story() -> None:
        async with world(is_streamed, timing=Timing(report_s=0.2)) as cluster:
            asking = [await begun(cluster, after_s=0.05, max_tokens=1_500) for _ in range(6)]
            for name in list(cluster.workers):
                cluster.drain(name)
                while name in cluster.workers:
                    await asyncio.sleep(0.1)
                cluster.start(name, "prefill" if name.startswith("prefill") else "decode")
                await asyncio.sleep(1)
            timelines = [timeline_of(await each) for each in asking]
            assert all(timeline.output_tokens == 1_500 for timeline in timelines)
            assert sum(timeline.moves for timeline in timelines) > 0
            await cluster.settle()

    run_virtual(story())
