"""KV on its way over links, on virtual time: what becomes of a hand-over whose transfer is met by misfortune."""

from __future__ import annotations

import asyncio
from statistics import mean

import pytest

from penstock import clock
from penstock.engine.simulated import Options as EngineOptions
from penstock.policy.batching import Limits
from penstock.policy.routing.api import Ask, Choice, Fleet, Route
from penstock.request import Request, Sampling, Timeline
from penstock.serve.lend import LendOptions
from penstock.serve.prefill import PrefillOptions
from penstock.serve.worker import WorkerOptions
from penstock.sim.loop import run_virtual
from penstock.sim.transport import STALLED_S
from penstock.sim.world import Answer, Shape, World
from penstock.tokens import pack
from tests.serve.cluster import by_turns, through

TOKEN_BYTES = 16
PROMPT = 1_000
HANDED_OVER = through("prefill-0", "decode-0")


def streamed(prefill: int = 1, decode: int = 1, policy: Route = HANDED_OVER, **shape: object) -> World:
    return World(1, Shape(prefill=prefill, decode=decode, is_streamed=True, **shape), policy=policy)  # type: ignore[arg-type]


def throttle(world: World, bytes_per_s: float, source: str = "prefill-0", to: str = "decode-0") -> None:
    """So slow that a prompt is under way for seconds."""
    for link in world.wiring.route(source, to).links:
        world.links.slow(link, bytes_per_s / link.nominal_bytes_per_s)


def restore(world: World, source: str = "prefill-0", to: str = "decode-0") -> None:
    for link in world.wiring.route(source, to).links:
        world.links.restore(link)


async def ask_and_wait_for_first(world: World, seconds: float = 1.0, **ask: int) -> asyncio.Task[Answer]:
    """A request whose KV takes 4 s to move; returns after its first token, in the middle of that."""
    throttle(world, PROMPT * TOKEN_BYTES / 4)
    asking = asyncio.create_task(world.ask(tokens=PROMPT, **ask))
    await asyncio.sleep(seconds)
    assert world.workers["decode-0"].load().output_tokens == 1 and not asking.done()
    return asking


def timeline_of(answer: Answer) -> Timeline:
    assert answer.is_whole and answer.finish is not None, answer
    return answer.finish.timeline


def backed_by(*prefill: str) -> Route:
    """A policy that hands over to the first of these, and names the others for when that fails."""

    def route(now: float, ask: Ask, fleet: Fleet, rng: object) -> Choice:
        return Choice("decode-0", prefill, 0.0, -1.0, "by test")

    return route


def test_the_first_token_does_not_wait_for_the_kv_and_the_second_does() -> None:
    async def story() -> None:
        async with streamed() as world:
            answer = await (await ask_and_wait_for_first(world))
            timeline = timeline_of(answer)
            assert timeline.path == "streamed" and timeline.moved_tokens == PROMPT
            assert timeline.copied_bytes == 63 * 16 * TOKEN_BYTES
            assert answer.ttft_s < 0.1 and (timeline.decoding_s or 0.0) > 3.9
            await world.settle()

    run_virtual(story())


@pytest.mark.parametrize("others", [(), ("prefill-1",)], ids=["local", "elsewhere"])
def test_prefill_killed_after_the_first_token_the_stream_goes_on_with_it(others: tuple[str, ...]) -> None:
    async def story() -> None:
        async with streamed(prefill=2, policy=backed_by("prefill-0", *others)) as world:
            asking = await ask_and_wait_for_first(world, seed=7)
            world.crash("prefill-0")
            timeline = timeline_of(await asking)
            assert "prefill-0" in timeline.failures[0] and timeline.output_tokens == 8
            assert timeline.prefill_worker == (others[0] if others else "decode-0")
            await world.settle()

    run_virtual(story())


def test_prefill_killed_after_the_only_token_leaves_nothing_to_do_again() -> None:
    async def story() -> None:
        async with streamed() as world:
            throttle(world, PROMPT * TOKEN_BYTES / 4)
            timeline = timeline_of(await world.ask(tokens=PROMPT, max_tokens=1))
            assert timeline.prefill_attempts == 1 and world.workers["decode-0"].load().steps == 0
            await world.settle()

    run_virtual(story())


def test_a_writer_frozen_for_a_moment_goes_on_and_loses_nothing() -> None:
    async def story() -> None:
        async with streamed() as world:
            asking = await ask_and_wait_for_first(world)
            world.freeze("prefill-0")
            await asyncio.sleep(4)  # the transfer ends meanwhile, and nobody says so
            assert not asking.done()
            world.thaw("prefill-0")
            assert timeline_of(await asking).failures == []
            await world.settle()

    run_virtual(story())


def test_a_writer_frozen_past_its_lease_is_done_without() -> None:
    async def story() -> None:
        async with streamed() as world:
            asking = await ask_and_wait_for_first(world)
            world.freeze("prefill-0")
            timeline = timeline_of(await asking)
            assert "said nothing for 5.0 s" in timeline.failures[0] and timeline.path == "local"
            world.thaw("prefill-0")
            await world.settle()

    run_virtual(story())


def test_a_cut_link_is_given_up_and_the_prompt_computed_here() -> None:
    async def story() -> None:
        async with streamed() as world:
            asking = await ask_and_wait_for_first(world)
            throttle(world, 0.0)
            answer = await asking
            timeline = timeline_of(answer)
            assert "no byte of decode-0's has moved" in timeline.failures[0] and timeline.path == "local"
            assert STALLED_S < answer.ended_s < 3 * STALLED_S
            await world.settle(within_s=5)  # though the link is still cut
            restore(world)
            assert timeline_of(await world.ask(tokens=PROMPT)).path == "streamed"
            await world.settle()

    run_virtual(story())


def test_a_link_that_is_cut_for_a_moment_costs_only_that_moment() -> None:
    async def story() -> None:
        async with streamed() as world:
            asking = await ask_and_wait_for_first(world)
            throttle(world, 0.0)
            await asyncio.sleep(STALLED_S / 2)
            restore(world)
            answer = await asking
            assert timeline_of(answer).failures == [] and answer.ended_s < STALLED_S
            await world.settle()

    run_virtual(story())


def test_a_slow_link_is_waited_for_as_long_as_bytes_arrive() -> None:
    async def story() -> None:
        async with streamed() as world:
            tokens = 7 * PROMPT
            throttle(world, tokens * TOKEN_BYTES / (5 * STALLED_S))
            answer = await world.ask(tokens=tokens)
            assert timeline_of(answer).failures == [] and answer.ended_s > 4 * STALLED_S
            await world.settle()

    run_virtual(story())


def test_an_owner_that_dies_in_mid_transfer_takes_nothing_of_the_writer_along() -> None:
    async def story() -> None:
        async with streamed(policy=by_turns(HANDED_OVER, through("prefill-0", "prefill-0"))) as world:
            asking = await ask_and_wait_for_first(world)
            world.crash("decode-0")
            timeline = timeline_of(await asking)  # from what the writer's own cache holds
            assert (timeline.decode_worker, timeline.moves) == ("prefill-0", 1)
            await world.settle(within_s=5)
            assert sum(world.links.use(link).flows for link in world.wiring.route("prefill-0", "decode-0").links) == 0

    run_virtual(story())


def test_blocks_of_a_transfer_that_goes_on_are_not_used_again() -> None:
    """The writer's process is frozen and its network card is not: what it sends still lands, block after block."""

    async def story() -> None:
        async with streamed(kv_blocks=100) as world:
            asking = await ask_and_wait_for_first(world)
            world.freeze("prefill-0")
            throttle(world, PROMPT * TOKEN_BYTES / 30)
            asking.cancel()
            await asyncio.sleep(1)
            assert world.workers["decode-0"].load().quarantined_blocks == 63
            world.thaw("prefill-0")
            await world.settle()

    run_virtual(story())


def test_an_owner_without_room_has_it_computed_nowhere_else() -> None:
    async def story() -> None:
        policy = by_turns(through("decode-0", "decode-0"), HANDED_OVER)
        async with streamed(policy=policy, kv_blocks=100, engine=EngineOptions(prefill_token_s=1e-3)) as world:
            running = asyncio.create_task(world.ask(tokens=800, max_tokens=400))
            await asyncio.sleep(1)
            timeline = timeline_of(await world.ask(tokens=PROMPT))
            assert "had no room" in timeline.failures[0] and timeline.path == "local"
            assert timeline_of(await running).path == "local"
            await world.settle()

    run_virtual(story())


def test_a_prefix_that_only_the_prefill_worker_holds_is_moved_and_not_computed() -> None:
    async def story() -> None:
        policy = by_turns(*(through("prefill-0", name) for name in ("decode-0", "decode-1")))
        async with streamed(decode=2, policy=policy) as world:
            prompt = list(range(500, 500 + PROMPT))
            assert timeline_of(await world.ask(prompt)).cached_tokens == 0
            timeline = timeline_of(await world.ask(prompt))
            assert (timeline.decode_worker, timeline.cached_tokens) == ("decode-1", 992)
            assert (timeline.computed_tokens, timeline.moved_tokens) == (8, PROMPT)
            await world.settle()

    run_virtual(story())


def test_of_a_prefix_that_the_owner_holds_only_the_rest_is_sent() -> None:
    async def story() -> None:
        async with streamed() as world:
            prompt = list(range(500, 500 + PROMPT))
            assert (await world.ask(prompt[:480])).is_whole
            timeline = timeline_of(await world.ask(prompt))
            assert timeline.path == "streamed" and timeline.moved_tokens == PROMPT - 480
            assert timeline.copied_bytes == (63 - 30) * 16 * TOKEN_BYTES
            await world.settle()

    run_virtual(story())


async def preempted(kv_blocks: int, bytes_per_s: float) -> Timeline:
    """A prefill at a busy worker that decodes as well, and takes back the blocks of what it prefills for others."""
    engine = EngineOptions(prefill_token_s=2e-3, most_steps=1)
    worker = WorkerOptions("", 0, limits=Limits(step_tokens=16))
    policy = by_turns(*[through("prefill-0", "prefill-0")] * 6, HANDED_OVER)
    async with streamed(policy=policy, engine=engine, worker=worker, kv_blocks=kv_blocks) as world:
        throttle(world, bytes_per_s)
        crowd = [asyncio.create_task(world.ask(tokens=20, max_tokens=150)) for _ in range(6)]
        await asyncio.sleep(0.3)
        timeline = timeline_of(await world.ask(tokens=480))
        assert world.workers["prefill-0"].load().preemptions > 0
        assert all(answer.is_whole for answer in await asyncio.gather(*crowd))
        await world.settle()
    return timeline


def test_a_prefill_preempted_in_mid_transfer_sends_all_the_same() -> None:
    timeline = run_virtual(preempted(kv_blocks=58, bytes_per_s=2_000))
    assert (timeline.path, timeline.failures) == ("streamed", [])


@pytest.mark.parametrize("bytes_per_s", [1_000, 2_000], ids=["others-are-done", "others-still-decode"])
def test_a_prefill_that_is_preempted_is_not_in_its_own_way(bytes_per_s: float) -> None:
    timeline = run_virtual(preempted(52, bytes_per_s))  # 30 blocks that it needs, and 25 under way, are more
    assert (timeline.path, timeline.failures) == ("streamed", [])


def test_clients_that_leave_in_any_phase_of_a_transfer_leave_nothing_behind() -> None:
    async def story() -> None:
        engine = EngineOptions(prefill_token_s=1e-3)
        async with streamed(engine=engine) as world:
            throttle(world, 8_000)
            for tenth in range(40):  # computed after 1 s, moved after 2 s, decoded by 4 s
                asking = asyncio.create_task(world.ask(tokens=PROMPT, max_tokens=800))
                await asyncio.sleep(tenth / 10)
                asking.cancel()
                await asyncio.wait([asking])
                await world.settle(within_s=2)
            restore(world)
            assert (await world.ask(tokens=PROMPT)).is_whole

    run_virtual(story())


def test_a_draining_writer_ends_its_transfer_before_it_goes() -> None:
    async def story() -> None:
        async with streamed() as world:
            asking = await ask_and_wait_for_first(world)
            world.drain("prefill-0")
            timeline = timeline_of(await asking)
            assert (timeline.path, timeline.failures) == ("streamed", [])
            await asyncio.sleep(1)
            assert "prefill-0" not in world.workers
            await world.settle()

    run_virtual(story())


def test_a_writer_that_comes_back_under_a_new_epoch_knows_nothing_of_the_transfer() -> None:
    async def story() -> None:
        async with streamed() as world:
            asking = await ask_and_wait_for_first(world)
            world.crash("prefill-0")
            world.start("prefill-0", "prefill")
            assert timeline_of(await asking).path == "local"
            restore(world)
            await asyncio.sleep(1)
            assert timeline_of(await world.ask(tokens=PROMPT)).path == "streamed"
            await world.settle()

    run_virtual(story())


@pytest.mark.parametrize("ahead_s", [-1e3, 1e9])
def test_clocks_that_differ_change_nothing_that_anybody_is_told(ahead_s: float) -> None:
    async def story(skew_s: float) -> tuple[object, float]:
        world = streamed()
        world.skews_s = {"prefill-0": skew_s, "decode-0": -skew_s / 2}
        async with world:
            answer = await (await ask_and_wait_for_first(world))
            timeline = timeline_of(answer)
            times_s = [timeline.prefill_started_s, timeline.prefill_ended_s, timeline.decoding_s]
            assert all(0 <= (time_s or -1.0) < 5 for time_s in times_s) and times_s == sorted(filter(None, times_s))
            return timeline.failures, answer.ended_s

    failures, ended_s = run_virtual(story(ahead_s))
    assert (failures, ended_s) == (run_virtual(story(0.0))[0], pytest.approx(run_virtual(story(0.0))[1], abs=1e-3))


# Steps that are alike

ALIKE = EngineOptions(step_s=0.01, most_steps=1_000)


def test_steps_that_are_alike_end_for_whoever_arrives_and_for_whoever_leaves() -> None:
    async def story() -> None:
        async with World(1, Shape(prefill=0, engine=ALIKE)) as world:
            running = [asyncio.create_task(world.ask(tokens=50, max_tokens=1_000)) for _ in range(2)]
            await asyncio.sleep(1)
            answer = await world.ask(tokens=50, max_tokens=2)
            assert answer.is_whole and answer.ttft_s < 0.05
            await asyncio.sleep(1)
            running[0].cancel()
            await asyncio.sleep(0.05)
            assert world.workers["decode-0"].load().running == 1
            assert (await running[1]).is_whole
            await world.settle()

    run_virtual(story())


def test_steps_that_are_alike_end_when_blocks_do() -> None:
    async def story() -> None:
        async with World(1, Shape(prefill=0, engine=ALIKE, kv_blocks=40)) as world:
            answers = await asyncio.gather(*(world.ask(tokens=50, max_tokens=400) for _ in range(3)))
            assert all(answer.is_whole for answer in answers)
            assert world.workers["decode-0"].load().preemptions > 0
            await world.settle()

    run_virtual(story())


def test_no_step_is_made_past_the_last_token() -> None:
    async def story() -> None:
        async with World(1, Shape(prefill=0, engine=ALIKE)) as world:
            assert (await world.ask(tokens=50, max_tokens=37)).is_whole
            assert world.engine("decode-0").steps_begun == 37

    run_virtual(story())


def test_no_token_is_sent_past_one_that_stops() -> None:
    async def story() -> None:
        async with World(1, Shape(prefill=0, engine=ALIKE)) as world:
            prompt = list(range(500, 550))
            expected = (await world.ask(prompt, max_tokens=40)).expected
            sampling = Sampling(max_tokens=40, temperature=0.0, stop_token_ids=(expected[20],))
            tokens: list[int] = []
            async with world.router.generate(Request("stops", ALIKE.model, pack(prompt), sampling, 60.0)) as stream:
                finish = None
                while finish is None:
                    fresh, finish = await stream.read()
                    tokens += [token.id for token in fresh]
            assert tokens == expected[: expected.index(expected[20]) + 1] and finish.reason == "stop"
            await world.settle()
            assert clock.now() < 10

    run_virtual(story())


# Several ways, many writers, prefixes


def test_a_way_that_breaks_down_in_mid_transfer_is_replaced_by_the_next() -> None:
    async def story() -> None:
        async with streamed(ways=("rdma", "tcp")) as world:
            asking = await ask_and_wait_for_first(world)  # a quarter is there
            world.ways["rdma"].fail()
            answer = await asking
            timeline = timeline_of(answer)
            assert (timeline.path, timeline.transport, timeline.failures) == ("streamed", "tcp", [])
            assert timeline.decoding_s is not None and timeline.decoding_s < 4.5  # what was there is not sent again
            assert timeline_of(await world.ask(tokens=PROMPT)).transport == "tcp"  # the other one cools down
            world.ways["rdma"].mend()
            await asyncio.sleep(5)
            assert timeline_of(await world.ask(tokens=PROMPT)).transport == "rdma"
            await world.settle()

    run_virtual(story())


def test_what_is_fenced_off_comes_back_at_once_though_its_writer_is_frozen() -> None:
    async def story() -> None:
        async with streamed(ways=("tcp",)) as world:
            asking = await ask_and_wait_for_first(world)
            world.freeze("prefill-0")
            asking.cancel()
            await asyncio.wait([asking])
            await asyncio.sleep(0.5)
            assert world.workers["decode-0"].load().quarantined_blocks == 0
            world.thaw("prefill-0")
            await world.settle()

    run_virtual(story())


def test_what_cannot_be_fenced_off_waits_for_its_writer() -> None:
    async def story() -> None:
        async with streamed(ways=("rdma",)) as world:
            asking = await ask_and_wait_for_first(world)
            world.freeze("prefill-0")
            asking.cancel()
            await asyncio.wait([asking])
            await asyncio.sleep(0.5)
            assert world.workers["decode-0"].load().quarantined_blocks > 0
            world.thaw("prefill-0")
            await world.settle()

    run_virtual(story())


def test_many_writers_are_granted_no_more_than_arrives_and_do_not_all_wait_for_all() -> None:
    async def story() -> None:
        block_bytes = 16 * TOKEN_BYTES
        worker = WorkerOptions("", 0, lend=LendOptions(incoming_bytes=8 * block_bytes, lease_s=60.0))
        names = [f"prefill-{number}" for number in range(6)]
        policy = by_turns(*(through(name, "decode-0") for name in names))
        async with streamed(prefill=6, policy=policy, worker=worker) as world:
            for name in names:
                throttle(world, PROMPT * TOKEN_BYTES / 4, name)
            asking = [asyncio.create_task(world.ask(tokens=PROMPT)) for _ in names[1:]]
            await asyncio.sleep(1)  # so long that the link is known to be full when the last one comes
            asking.append(asyncio.create_task(world.ask(tokens=PROMPT)))
            lent = []
            while not all(task.done() for task in asking):
                lent.append(world.workers["decode-0"].load().leased_blocks)
                await asyncio.sleep(0.05)
            answers = [await task for task in asking]
            assert all(timeline_of(answer).path == "streamed" for answer in answers)
            assert max(answer.ttft_s for answer in answers) < 0.2  # no first token waits for others' KV
            ended = sorted(answer.ended_s for answer in answers)
            assert ended[0] < 10 and 23 < ended[-1] < 26  # 4 s each, two at a time; side by side all take 24 s
            await world.settle()

    run_virtual(story())


def mean_wait_of_eight(incoming_blocks: int) -> float:
    """Until the KV of eight equal prompts, computed at once by as many writers, came through one link of 10 s."""

    async def story() -> float:
        lend = LendOptions(incoming_bytes=incoming_blocks * 16 * TOKEN_BYTES, lease_s=60.0)
        prefill = PrefillOptions(chunk_tokens=64)
        worker = WorkerOptions("", 0, limits=Limits(step_tokens=64), prefill=prefill, lend=lend)
        names = [f"prefill-{number}" for number in range(8)]
        policy = by_turns(*(through(name, "decode-0") for name in names))
        async with streamed(
            prefill=8, policy=policy, worker=worker, engine=EngineOptions(prefill_token_s=1e-3)
        ) as world:
            for name in names:
                throttle(world, 8 * PROMPT * TOKEN_BYTES / 10, name)
            answers = await asyncio.gather(*(world.ask(tokens=PROMPT) for _ in names))
            return mean(answer.ended_s for answer in answers)

    return run_virtual(story())


def test_writers_that_begin_together_and_are_equally_fast_come_one_after_the_other() -> None:
    assert mean_wait_of_eight(16) < 0.7 * mean_wait_of_eight(1 << 20)


def with_a_prefix_at_decode(ways: tuple[str, ...], link_bytes_per_s: float) -> Timeline:
    """Of a prompt whose first half the decode worker alone has cached, and which is computed elsewhere."""

    async def story() -> Timeline:
        policy = by_turns(through("decode-0", "decode-0"), *[through("prefill-0", "decode-0")] * 13)
        engine = EngineOptions(prefill_token_s=1e-3)
        async with streamed(policy=policy, engine=engine, ways=ways) as world:
            first = [world.rng.randrange(100, 30_000) for _ in range(PROMPT)]
            timeline_of(await world.ask(first))
            for _ in range(12):  # the prefill worker learns how fast it is
                timeline_of(await world.ask(tokens=PROMPT))
            throttle(world, link_bytes_per_s, "decode-0", "prefill-0")
            rest = [world.rng.randrange(100, 30_000) for _ in range(PROMPT)]
            timeline = timeline_of(await world.ask(first + rest))
            await world.settle()
            return timeline

    return run_virtual(story())


def test_a_prefix_that_only_the_decode_worker_has_is_fetched_where_that_is_quicker() -> None:
    timeline = with_a_prefix_at_decode(("rdma",), 1e9)
    assert timeline.prefill_worker == "prefill-0" and timeline.fetched_tokens == 992
    assert timeline.computed_tokens == 2 * PROMPT - 992 and timeline.moved_tokens == 2 * PROMPT - 992


def test_a_prefix_whose_way_breaks_is_computed() -> None:
    async def story() -> None:
        policy = by_turns(through("decode-0", "decode-0"), *[through("prefill-0", "decode-0")] * 13)
        engine = EngineOptions(prefill_token_s=1e-3)
        async with streamed(policy=policy, engine=engine) as world:
            first = [world.rng.randrange(100, 30_000) for _ in range(PROMPT)]
            timeline_of(await world.ask(first))
            for _ in range(12):
                timeline_of(await world.ask(tokens=PROMPT))
            throttle(world, 1_000, "decode-0", "prefill-0")
            asking = asyncio.create_task(world.ask([*first, *[3] * PROMPT]))
            await asyncio.sleep(0.2)  # it is being fetched
            world.ways["rdma"].fail()
            world.ways["rdma"].mend()
            timeline = timeline_of(await asking)
            assert timeline.fetched_tokens == 0 and timeline.prefill_worker == "prefill-0"
            assert timeline.computed_tokens == 2 * PROMPT
            await world.settle()

    run_virtual(story())


def test_a_prefix_that_was_let_go_while_it_was_read_is_not_kept() -> None:
    async def story() -> None:
        here, there = through("decode-0", "decode-0"), through("prefill-0", "decode-0")
        policy = by_turns(*[there] * 12, here, there, *[here] * 4, there)
        engine = EngineOptions(prefill_token_s=1e-3)
        async with streamed(policy=policy, engine=engine, kv_blocks=140) as world:
            for _ in range(12):
                timeline_of(await world.ask(tokens=PROMPT))
            first, rest = ([world.rng.randrange(100, 30_000) for _ in range(PROMPT)] for _ in range(2))
            timeline_of(await world.ask(first))
            throttle(world, 990 * TOKEN_BYTES / 9, "decode-0", "prefill-0")
            asking = asyncio.create_task(world.ask([*first, *rest], max_tokens=1))
            await asyncio.sleep(0.5)
            world.freeze("prefill-0")  # the read goes on; the decode worker gives it up after 5 s
            await asyncio.sleep(5.5)
            for _ in range(4):  # and needs the blocks, before they are read
                await world.ask(tokens=PROMPT)
            await asyncio.sleep(4)
            world.thaw("prefill-0")
            await asking
            restore(world, "decode-0", "prefill-0")
            await asyncio.sleep(3)  # it is known again
            answer = await world.ask([*first, *rest])
            assert answer.is_right_so_far and timeline_of(answer).prefill_worker == "prefill-0"
            await world.settle()

    run_virtual(story())
