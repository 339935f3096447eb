"""Decode steps computed together are the same steps, one after the other."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from penstock.blocks import BlockId, KvLayout, Region
from penstock.engine.api import Slice, Step
from penstock.policy.latency.fit import believe
from penstock.policy.latency.steps import StepModel
from penstock.request import Sampling
from penstock.sim.engine import ModelledEngine, Options
from penstock.sim.faults import Fate
from penstock.sim.loop import run_virtual

LAYOUT = KvLayout(1, 1, 1, 16, "uint64")
REGION = Region("w", 1, LAYOUT, 100, None)
MODEL = StepModel(believe((5e-3, 1e-5, 1e-9, 1e-4, 3e-7), doubt=0.5), free_tokens=4)


def engine() -> ModelledEngine:
    return ModelledEngine(Options("m", LAYOUT, 10_000, MODEL), Fate())


def step(contexts: list[int]) -> Step:
    return Step(REGION, [Slice([1], context, [BlockId(0)], Sampling(100)) for context in contexts])


def one_by_one(contexts: list[int], steps: int) -> list[float]:
    """When each step ends."""

    async def story() -> list[float]:
        model, ends = engine(), []
        for number in range(steps):
            await model.step(step([context + number for context in contexts]))
            ends.append(asyncio.get_running_loop().time())
        return ends

    return run_virtual(story())


@given(st.lists(st.integers(1, 5_000), min_size=1, max_size=6), st.integers(1, 40), st.floats(0, 1.2))
def test_steps_together_take_as_long_as_one_by_one_and_end_with_the_one_in_progress(
    contexts: list[int], steps: int, when: float
) -> None:
    ends = one_by_one(contexts, steps)
    interrupted_s = when * ends[-1]

    async def story() -> tuple[int, float]:
        model = engine()
        asyncio.get_running_loop().call_later(interrupted_s, lambda: model.interrupt() if not done else None)
        done: list[int] = []
        made = await model.decode(step(contexts), steps)
        done.append(len(made[0]))
        assert {len(tokens) for tokens in made} == {done[0]}
        return done[0], asyncio.get_running_loop().time()

    made, ended_s = run_virtual(story())
    expected = next((n for n, end in enumerate(ends, 1) if end >= interrupted_s - 1e-12), steps)
    assert abs(made - expected) <= (abs(ends[made - 1] - interrupted_s) < 1e-9)  # a tie may go either way
    assert abs(ended_s - ends[made - 1]) < 1e-9


def test_an_interruption_before_the_first_turn_of_the_loop_counts() -> None:
    async def story() -> int:
        model = engine()
        computing = asyncio.ensure_future(model.decode(step([10]), 50))
        model.interrupt()
        return len((await computing)[0])

    assert run_virtual(story()) == 1
