"""Layers with windows through the whole path, on virtual time: what they hold, what is moved of them, what is found."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from penstock.blocks import KvLayout
from penstock.engine.simulated import Options as EngineOptions
from penstock.policy.batching import Limits
from penstock.policy.routing.api import Route
from penstock.request import Timeline
from penstock.serve.prefill import PrefillOptions
from penstock.serve.worker import WorkerOptions
from penstock.sim.loop import run_virtual
from penstock.sim.world import Answer, Shape, World
from tests.serve.cluster import by_turns, through

KEEPS = ("all", 100, 100)
LAYOUT = KvLayout(1, 1, 1, 16, "uint64", keeps=KEEPS)  # as the simulated engine has it, in what matters here
PROMPT, STEP, CHUNK = 2_000, 64, 128
HANDED_OVER, HOME = through("prefill-0", "decode-0"), through("decode-0", "decode-0")

SHAPE = Shape(
    engine=EngineOptions(keeps=KEEPS, prefill_token_s=1e-3, most_steps=1),
    worker=WorkerOptions("", 0, limits=Limits(step_tokens=STEP), prefill=PrefillOptions(chunk_tokens=CHUNK)),
)


def windowed(policy: Route, **shape: object) -> World:
    return World(1, replace(SHAPE, **shape), policy=policy)  # type: ignore[arg-type]


@asynccontextmanager
async def watching(world: World, name: str = "decode-0") -> AsyncIterator[list[tuple[int, int]]]:
    """(output tokens, blocks held), as it is every virtual millisecond inside the block."""
    seen: list[tuple[int, int]] = []

    async def look() -> None:
        while True:
            load = world.workers[name].load()
            seen.append((load.output_tokens, load.blocks - load.free_blocks))
            await asyncio.sleep(0.001)

    looking = asyncio.create_task(look())
    try:
        yield seen
    finally:
        looking.cancel()


def timeline_of(answer: Answer) -> Timeline:
    assert answer.is_whole and answer.finish is not None, answer
    return answer.finish.timeline


@pytest.mark.parametrize(("policy", "at_a_time"), [(HOME, STEP), (HANDED_OVER, 2 * CHUNK)], ids=["home", "in-place"])
def test_a_long_sequence_holds_its_full_part_and_its_windows(policy: Route, at_a_time: int) -> None:
    async def story() -> None:
        async with windowed(policy) as world:
            async with watching(world) as seen:
                answer = await world.ask(tokens=PROMPT, max_tokens=100)
            assert timeline_of(answer).path == ("local" if policy is HOME else "in-place")
            assert max(held for _, held in seen) <= LAYOUT.blocks_for(PROMPT + 100, at_a_time)
            decoding = [held for tokens, held in seen if tokens > 1]
            assert max(decoding) <= LAYOUT.blocks_for(PROMPT + 100, 16) == 132 + 2 * 9
            assert max(decoding) >= 132 + 2 * 7
            await world.settle()

    run_virtual(story())


def test_of_windows_only_what_the_end_of_the_prompt_reads_is_sent() -> None:
    async def story() -> None:
        async with windowed(HANDED_OVER, is_streamed=True) as world:
            async with watching(world) as seen, watching(world, "prefill-0") as seen_there:
                timeline = timeline_of(await world.ask(tokens=PROMPT))
            assert timeline.path == "streamed"
            assert timeline.copied_bytes == (125 + 2 * 7) * 16 * 16
            assert max(held for _, held in seen) <= LAYOUT.blocks_for(PROMPT + 8)
            assert max(held for _, held in seen_there) <= LAYOUT.blocks_for(PROMPT, STEP)
            await world.settle()

    run_virtual(story())


@pytest.mark.parametrize("is_streamed", [False, True], ids=["in-place", "streamed"])
@pytest.mark.parametrize("policy", [HOME, HANDED_OVER], ids=["home", "away"])
def test_a_pool_that_is_too_small_for_all_of_everything_is_enough(policy: Route, is_streamed: bool) -> None:
    blocks = LAYOUT.blocks_for(PROMPT + 8, 2 * CHUNK) + len(KEEPS)
    assert blocks < LAYOUT.entries_for(PROMPT) / 2

    async def story() -> None:
        async with windowed(policy, is_streamed=is_streamed, kv_blocks=blocks) as world:
            for _ in range(3):
                timeline = timeline_of(await world.ask(tokens=PROMPT))
                assert (timeline.path == "local") == (policy is HOME)
            await world.settle()

    run_virtual(story())


@pytest.mark.parametrize("is_streamed", [False, True], ids=["in-place", "streamed"])
@pytest.mark.parametrize("policy", [HOME, HANDED_OVER], ids=["home", "away"])
@pytest.mark.parametrize("common", [PROMPT, 992, 100, 16], ids=lambda tokens: f"common-{tokens}")
def test_a_prefix_is_found_in_the_middle_of_a_prompt_too(policy: Route, is_streamed: bool, common: int) -> None:
    """What windows left behind stays cached where it was computed."""
    first = [200 + token for token in range(PROMPT)]

    async def story() -> None:
        async with windowed(policy, is_streamed=is_streamed) as world:
            await world.ask(first)
            timeline = timeline_of(await world.ask([*first[:common], *range(5_000, 5_300)]))
            assert timeline.cached_tokens == common // 16 * 16
            await world.settle()

    run_virtual(story())


def test_a_prefix_whose_windows_were_evicted_is_not_found() -> None:
    """Others took the room: of what the first prompt left behind nothing is there, its end is not either."""
    first = [200 + token for token in range(PROMPT)]
    blocks = LAYOUT.blocks_for(PROMPT + 8, STEP) + len(KEEPS)

    async def story() -> None:
        async with windowed(HOME, kv_blocks=blocks) as world:
            await world.ask(first)
            await world.ask(tokens=500)
            timeline = timeline_of(await world.ask([*first[:992], *range(5_000, 5_100)]))
            assert timeline.cached_tokens == 0
            await world.settle()

    run_virtual(story())


@pytest.mark.parametrize("is_streamed", [False, True], ids=["in-place", "streamed"])
def test_sequences_that_are_preempted_are_right(is_streamed: bool) -> None:
    async def story() -> None:
        policy = by_turns(HANDED_OVER, HOME)
        async with windowed(policy, is_streamed=is_streamed, kv_blocks=120) as world:
            asking = [world.ask(tokens=300, max_tokens=150) for _ in range(6)]
            answers = await asyncio.gather(*asking)
            assert all(answer.is_whole for answer in answers)
            assert sum(timeline_of(answer).preemptions for answer in answers) > 0
            await world.settle()

    run_virtual(story())


def test_a_prefix_that_only_the_decode_worker_has_is_fetched_with_its_windows() -> None:
    first = [200 + token for token in range(PROMPT)]

    async def story() -> None:
        async with windowed(by_turns(HOME, HOME, HANDED_OVER, HANDED_OVER), is_streamed=True) as world:
            await world.ask(first)
            await world.ask(tokens=PROMPT)  # so that it is known how long a prompt takes
            await world.ask(tokens=PROMPT)
            timeline = timeline_of(await world.ask([*first[:992], *range(5_000, 6_000)]))
            assert timeline.path == "streamed"
            assert timeline.fetched_tokens == 992
            await world.settle()

    run_virtual(story())
