"""The whole path on virtual time, under faults: no token is wrong, nothing hangs, nothing leaks."""

from __future__ import annotations

import asyncio
from asyncio import TaskGroup
from dataclasses import replace

import pytest

from penstock import clock
from penstock.engine.api import Step
from penstock.engine.simulated import Options as EngineOptions
from penstock.errors import WorkerLost
from penstock.policy.batching import Limits
from penstock.policy.routing import round_robin
from penstock.request import Token
from penstock.serve.lend import LendOptions
from penstock.serve.worker import WorkerOptions
from penstock.sim.loop import run_virtual
from penstock.sim.world import Answer, Shape, World


@pytest.fixture(params=[False, True], ids=["in-place", "streamed"])
def is_streamed(request: pytest.FixtureRequest) -> bool:
    """Whether KV crosses a network, or is computed in memory that all share."""
    return bool(request.param)


def path(is_streamed: bool) -> str:
    """How a timeline calls it."""
    return "streamed" if is_streamed else "in-place"


SLOW = EngineOptions(prefill_token_s=1e-3)  # a prompt of 2,000 tokens takes two seconds, four chunks


def test_prefill_in_place_is_right_and_copies_nothing() -> None:
    async def story() -> None:
        async with World(seed=1) as world:
            answer = await world.ask(tokens=2_000, max_tokens=20)
            assert answer.is_whole and answer.finish is not None
            timeline = answer.finish.timeline
            assert (timeline.path, timeline.prefill_worker) == ("in-place", "prefill-0")
            assert (timeline.moved_tokens, timeline.copied_bytes) == (2_000, 0)
            await world.settle()

    run_virtual(story())


def test_a_prefix_cached_at_decode_is_read_in_place() -> None:
    async def story() -> None:
        async with World(seed=1) as world:
            first = list(range(200, 1_200))
            assert (await world.ask(first)).is_whole
            answer = await world.ask(first[:800] + list(range(5_000, 6_000)))
            assert answer.is_whole and answer.finish is not None
            assert answer.finish.timeline.cached_tokens == 800
            assert answer.finish.timeline.moved_tokens == 1_000
            await world.settle()

    run_virtual(story())


def test_prefill_that_dies_is_done_elsewhere_and_the_client_sees_only_time(is_streamed: bool) -> None:
    async def story() -> None:
        async with World(seed=1, shape=Shape(is_streamed=is_streamed, prefill=2, engine=SLOW)) as world:
            asking = asyncio.create_task(world.ask(tokens=2_000))
            await asyncio.sleep(0.9)
            victim = next(name for name in ("prefill-0", "prefill-1") if world.engine(name).steps_begun)
            world.crash(victim)
            answer = await asking
            assert answer.is_whole and answer.finish is not None
            assert answer.finish.timeline.prefill_attempts == 2
            assert victim in answer.finish.timeline.failures[0]
            await world.settle()

    run_virtual(story())


def test_the_last_prefill_worker_dies_and_decode_does_it_itself(is_streamed: bool) -> None:
    async def story() -> None:
        async with World(seed=1, shape=Shape(is_streamed=is_streamed, engine=SLOW)) as world:
            asking = asyncio.create_task(world.ask(tokens=2_000))
            await asyncio.sleep(0.9)
            world.crash("prefill-0")
            answer = await asking
            assert answer.is_whole and answer.finish is not None
            assert answer.finish.timeline.path == "local"
            await world.settle()

    run_virtual(story())


def test_a_prefill_worker_frozen_past_its_lease_wakes_and_writes_into_nobodys_blocks(is_streamed: bool) -> None:
    async def story() -> None:
        shape = Shape(
            is_streamed=is_streamed, engine=SLOW, kv_blocks=260
        )  # so small that quarantined blocks would soon be wanted
        async with World(seed=1, shape=shape) as world:
            asking = asyncio.create_task(world.ask(tokens=2_000))
            await asyncio.sleep(0.9)
            world.freeze("prefill-0")
            assert (await asking).is_whole
            assert world.workers["decode-0"].load().quarantined_blocks > 0
            asking_again = asyncio.create_task(world.ask(tokens=1_000, max_tokens=200))
            await asyncio.sleep(0.5)
            world.thaw("prefill-0")
            assert (await asking_again).is_whole
            await world.settle()

    run_virtual(story())


def test_a_prefill_worker_that_stays_frozen_is_killed_and_its_blocks_come_back() -> None:
    async def story() -> None:
        async with World(seed=1, shape=Shape(engine=SLOW)) as world:
            asking = asyncio.create_task(world.ask(tokens=2_000))
            await asyncio.sleep(0.9)
            world.freeze("prefill-0")
            assert (await asking).is_whole
            await world.settle(within_s=60)
            assert "prefill-0" not in world.workers

    run_virtual(story())


def test_a_chunk_that_takes_longer_than_a_lease_may_be_silent_is_no_silence(is_streamed: bool) -> None:
    async def story() -> None:
        worker = WorkerOptions("", 0, lend=LendOptions(lease_s=0.6))
        async with World(
            seed=1, shape=Shape(is_streamed=is_streamed, engine=EngineOptions(prefill_token_s=4e-3), worker=worker)
        ) as world:
            answer = await world.ask(tokens=1_000)  # two chunks of two seconds
            assert answer.is_whole and answer.finish is not None
            assert (answer.finish.timeline.path, answer.finish.timeline.failures) == (path(is_streamed), [])

    run_virtual(story())


def test_preemptions_are_counted_when_they_happen() -> None:
    async def story() -> None:
        async with World(seed=1, shape=Shape(prefill=0, kv_blocks=60)) as world:
            asking = [asyncio.create_task(world.ask(tokens=10, max_tokens=900)) for _ in range(2)]
            await asyncio.sleep(2)
            for task in asking:
                task.cancel()
            await asyncio.wait(asking)
            assert world.workers["decode-0"].load().preemptions > 0
            await world.settle()

    run_virtual(story())


def test_a_prefill_engine_that_hangs_is_given_up_and_its_process_killed() -> None:
    async def story() -> None:
        async with World(seed=1, shape=Shape(engine=SLOW)) as world:
            asking = asyncio.create_task(world.ask(tokens=2_000))
            await asyncio.sleep(0.9)
            world.stall("prefill-0")  # the process lives and says so
            answer = await asking
            assert answer.is_whole and answer.finish is not None
            assert "made no step for 1" in answer.finish.timeline.failures[0]
            assert answer.ttft_s < 20
            await world.settle()
            assert "prefill-0" not in world.workers

    run_virtual(story())


def test_a_decode_worker_lost_before_the_first_token_is_replaced(is_streamed: bool) -> None:
    async def story() -> None:
        async with World(seed=1, shape=Shape(is_streamed=is_streamed, decode=2, engine=SLOW)) as world:
            asking = asyncio.create_task(world.ask(tokens=2_000))
            await asyncio.sleep(0.9)
            holder = next(name for name in ("decode-0", "decode-1") if world.workers[name].load().leased_blocks)
            world.crash(holder)
            assert (await asking).is_whole
            await world.settle()

    run_virtual(story())


@pytest.mark.parametrize("misfortune", ["crash", "freeze"])
def test_a_stream_whose_last_worker_is_lost_ends_in_an_error_and_never_in_silence(
    misfortune: str, is_streamed: bool
) -> None:
    async def story() -> None:
        async with World(seed=1, shape=Shape(is_streamed=is_streamed, prefill=0)) as world:
            asking = asyncio.create_task(world.ask(tokens=200, max_tokens=10_000))
            await asyncio.sleep(1)
            getattr(world, misfortune)("decode-0")
            answer = await asking
            assert isinstance(answer.error, WorkerLost) and "decode-0" in str(answer.error)
            assert len(answer.tokens) > 50 and answer.is_right_so_far
            assert answer.ended_s < 35

    run_virtual(story())


def test_a_restarted_worker_comes_back_under_a_new_epoch(is_streamed: bool) -> None:
    async def story() -> None:
        async with World(seed=1, shape=Shape(is_streamed=is_streamed)) as world:
            assert (await world.ask(tokens=500)).is_whole
            for name in ("decode-0", "prefill-0"):
                world.crash(name)
                world.start(name)
            await asyncio.sleep(2)
            answer = await world.ask(tokens=500)
            assert answer.is_whole and answer.finish is not None
            assert answer.finish.timeline.cached_tokens == 0
            await world.settle()

    run_virtual(story())


def test_clients_that_leave_at_any_time_leave_nothing_behind(is_streamed: bool) -> None:
    async def story() -> None:
        async with World(seed=3, shape=Shape(is_streamed=is_streamed, engine=SLOW)) as world:
            asking = [asyncio.create_task(world.ask(tokens=700, max_tokens=40)) for _ in range(24)]
            for index, task in enumerate(asking):
                await asyncio.sleep(0.1 + 0.05 * index)
                task.cancel()
            await asyncio.wait(asking)
            await world.settle(within_s=5)

    run_virtual(story())


def test_an_attempt_that_fails_gives_back_the_prefix_it_read() -> None:
    async def story() -> None:
        async with World(seed=1, shape=Shape(engine=SLOW)) as world:
            first = list(range(200, 1_200))
            assert (await world.ask(first)).is_whole
            leaving = asyncio.create_task(world.ask(first[:800] + list(range(5_000, 7_000))))
            await asyncio.sleep(0.9)
            assert world.workers["decode-0"].load().leased_blocks
            leaving.cancel()
            await world.settle(within_s=5)

    run_virtual(story())


def test_a_small_pool_preempts_calls_leases_off_and_still_answers_everybody(is_streamed: bool) -> None:
    async def story() -> None:
        shape = Shape(
            is_streamed=is_streamed, kv_blocks=60, worker=replace(WorkerOptions("", 0), limits=Limits(step_tokens=64))
        )
        async with World(seed=4, shape=shape) as world:
            asking = [asyncio.create_task(world.ask(tokens=40 + 25 * i, max_tokens=200)) for i in range(20)]
            answers = await asyncio.gather(*asking)
            assert all(answer.is_whole for answer in answers)
            assert sum(a.finish.timeline.preemptions for a in answers if a.finish) > 0
            await world.settle()

    run_virtual(story())


def test_more_streams_than_a_step_has_tokens_wait_before_their_first_token_and_not_in_mid_stream(
    is_streamed: bool,
) -> None:
    async def story() -> None:
        worker = WorkerOptions("", 0, limits=Limits(step_tokens=16))
        async with World(
            seed=1, shape=Shape(is_streamed=is_streamed, prefill=4, kv_blocks=4_000, worker=worker)
        ) as world:
            asking = []
            for _ in range(40):
                asking.append(asyncio.create_task(world.ask(tokens=500, max_tokens=400)))
                await asyncio.sleep(0.04)
            answers = await asyncio.gather(*asking)
            assert all(answer.is_whole for answer in answers)
            durations_s = [answer.ended_s - answer.ttft_s for answer in answers]
            assert max(durations_s) < 2 * min(durations_s)

    run_virtual(story())


def test_running_requests_outrank_a_lease_that_is_not_complete(is_streamed: bool) -> None:
    async def story() -> None:
        async with World(seed=2, shape=Shape(is_streamed=is_streamed, kv_blocks=100, engine=SLOW)) as world:
            running = asyncio.create_task(world.ask(tokens=10, max_tokens=1_000))  # will want 64 blocks
            await asyncio.sleep(0.6)
            borrowing = asyncio.create_task(world.ask(tokens=1_200, max_tokens=8))  # 75 blocks, 1.2 s
            for answer in await asyncio.gather(running, borrowing):
                assert answer.is_whole
            assert borrowing.result().finish is not None
            await world.settle()

    run_virtual(story())


def test_a_long_prompt_that_waits_for_blocks_is_not_overtaken_for_as_long_as_short_ones_come(is_streamed: bool) -> None:
    async def story() -> None:
        engine = EngineOptions(prefill_token_s=1e-3, step_s=0.01)
        async with (
            World(seed=1, shape=Shape(is_streamed=is_streamed, prefill=3, kv_blocks=100, engine=engine)) as world,
            TaskGroup() as group,
        ):

            async def crowd() -> None:
                while clock.now() < 60:
                    group.create_task(world.ask(tokens=300, max_tokens=40))
                    await asyncio.sleep(0.25)

            group.create_task(crowd())
            await asyncio.sleep(3)
            answer = await world.ask(tokens=1_400)  # 88 of 100 blocks
            assert answer.is_whole and answer.ttft_s < 6

    run_virtual(story())


def test_a_late_write_cannot_hit_blocks_that_serve_somebody_else(is_streamed: bool) -> None:
    async def story() -> None:
        async with World(seed=1, shape=Shape(is_streamed=is_streamed, engine=SLOW, kv_blocks=140)) as world:
            leaving = asyncio.create_task(world.ask(tokens=2_000))
            await asyncio.sleep(0.6)  # in the middle of the second chunk
            world.freeze("prefill-0")
            leaving.cancel()
            await asyncio.sleep(0.01)
            others = [asyncio.create_task(world.ask(tokens=300, max_tokens=100)) for _ in range(4)]
            await asyncio.sleep(0.9)
            world.thaw("prefill-0")
            assert all(answer.is_whole for answer in await asyncio.gather(*others))
            await world.settle()

    run_virtual(story())


def test_a_chunk_in_progress_keeps_its_blocks_until_it_has_ended(is_streamed: bool) -> None:
    async def story() -> None:
        async with World(seed=1, shape=Shape(is_streamed=is_streamed, engine=SLOW, kv_blocks=140)) as world:
            leaving = asyncio.create_task(world.ask(tokens=2_000))
            await asyncio.sleep(0.6)  # early in the second chunk, most of which is yet to be written
            world.stall("prefill-0")  # a slow kernel: the process lives and answers
            leaving.cancel()
            world.drain("prefill-0")  # so that the next requests are prefilled at decode, at once
            others = [asyncio.create_task(world.ask(tokens=20, max_tokens=200)) for _ in range(9)]
            await asyncio.sleep(1)
            world.resume("prefill-0")
            assert all(answer.is_whole for answer in await asyncio.gather(*others))
            await world.settle()

    run_virtual(story())


def test_blocks_granted_on_a_connection_that_was_given_up_are_never_written(is_streamed: bool) -> None:
    """The grant is on its way for 6 s; the lease is settled meanwhile, on another connection."""

    async def story() -> None:
        async with World(seed=1, shape=Shape(is_streamed=is_streamed, engine=SLOW, kv_blocks=140)) as world:
            granted_s: list[float] = []

            def slow_line(source: str, to: str, frame: bytes) -> list[float]:
                if b"granted" in frame:
                    granted_s.append(clock.now())
                since_s = clock.now() - granted_s[0] if granted_s else 0.0
                if not granted_s or since_s > 3.5 or b"settle" in frame:
                    return [0.0]
                if source.startswith("decode") and to.startswith("prefill"):
                    return [6.0]
                return [] if source.startswith("prefill") and 0.1 < since_s < 1.1 else [0.0]

            world.network.weather = slow_line
            prompt = list(range(500, 2_500))
            assert (await world.ask(prompt)).is_whole
            await asyncio.sleep(8)
            again = await world.ask(prompt[:1_900])
            assert again.is_whole and again.finish is not None and again.finish.timeline.cached_tokens > 1_000
            await world.settle()

    run_virtual(story())


def test_a_frozen_decode_worker_holds_up_no_prefill_but_its_own(is_streamed: bool) -> None:
    async def story() -> None:
        async with World(seed=1, shape=Shape(is_streamed=is_streamed, engine=SLOW)) as world:

            def freezing(source: str, to: str, frame: bytes) -> list[float]:
                if b"begin" in frame and to.startswith("decode-0"):  # so no blocks are granted for what began
                    world.freeze("decode-0")
                return [0.0]

            world.network.weather = freezing
            stuck = [asyncio.create_task(world.ask(tokens=tokens)) for tokens in (20, 400)]
            world.start("decode-1", "decode")
            await asyncio.sleep(0.5)
            answer = await world.ask(tokens=2_000)
            assert answer.is_whole and answer.finish is not None and answer.finish.timeline.path == path(is_streamed)
            assert answer.ttft_s < 2.2
            world.thaw("decode-0")
            assert all(answer.is_whole for answer in await asyncio.gather(*stuck))
            await world.settle()

    run_virtual(story())


def test_an_engine_that_breaks_ends_its_worker(is_streamed: bool) -> None:
    async def broken(step: Step) -> list[Token | None]:
        raise ZeroDivisionError("a bug of the engine")

    async def story() -> None:
        async with World(seed=1, shape=Shape(is_streamed=is_streamed, engine=SLOW)) as world:
            world.engine("prefill-0").step = broken  # type: ignore[method-assign]
            assert (await world.ask(tokens=2_000)).is_whole

    with pytest.raises(ExceptionGroup) as failed:
        run_virtual(story())
    assert failed.group_contains(ZeroDivisionError)


def test_seeded_sampling_is_the_same_whoever_serves_it() -> None:
    async def story() -> list[Answer]:
        # Not `pairs`: with that they would all follow the cached prompt to one worker.
        async with World(seed=1, shape=Shape(prefill=0, decode=0, either=2), policy=round_robin.route) as world:
            prompt = list(range(300, 400))
            return await asyncio.gather(*(world.ask(prompt, max_tokens=30, seed=7) for _ in range(6)))

    answers = run_virtual(story())
    assert all(answer.is_whole for answer in answers)
    assert {tuple(a.tokens) for a in answers} == {tuple(answers[0].tokens)}
    assert len({a.finish.timeline.decode_worker for a in answers if a.finish}) == 2


def test_a_draining_worker_finishes_what_it_has_and_gets_nothing_new(is_streamed: bool) -> None:
    async def story() -> None:
        async with World(seed=1, shape=Shape(is_streamed=is_streamed, decode=2)) as world:
            asking = [asyncio.create_task(world.ask(tokens=100, max_tokens=400)) for _ in range(6)]
            await asyncio.sleep(1)
            world.drain("decode-0")
            await asyncio.sleep(1)
            later = await world.ask(tokens=100)
            assert later.is_whole and later.finish is not None
            assert later.finish.timeline.decode_worker == "decode-1"
            assert all(answer.is_whole for answer in await asyncio.gather(*asking))

    run_virtual(story())


def test_the_deadline_of_a_request_holds_on_the_worker(is_streamed: bool) -> None:
    async def story() -> None:
        async with World(seed=1, shape=Shape(is_streamed=is_streamed)) as world:
            answer = await world.ask(tokens=100, max_tokens=7_000, timeout_s=2.0)
            assert type(answer.error).__name__ == "DeadlineExceeded" and answer.is_right_so_far
            await world.settle()

    run_virtual(story())


def test_roles_change_while_serving(is_streamed: bool) -> None:
    async def story() -> None:
        async with World(seed=1, shape=Shape(is_streamed=is_streamed)) as world:
            before = await world.ask(tokens=2_000)
            for name, role in (("prefill-0", "decode"), ("decode-0", "prefill")):
                peer = await world.router.endpoint.peer(world.workers[name].member.addresses)
                async with peer.call("prefer", role) as call:
                    await call.receive(lambda raw: raw)
            await asyncio.sleep(1)
            after = await world.ask(tokens=2_000)
            for answer, pair in ((before, ("prefill-0", "decode-0")), (after, ("decode-0", "prefill-0"))):
                assert answer.is_whole and answer.finish is not None
                timeline = answer.finish.timeline
                assert (timeline.prefill_worker, timeline.decode_worker) == pair

    run_virtual(story())
