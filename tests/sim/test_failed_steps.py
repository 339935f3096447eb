"""Steps that fail, for some of their sequences or for all, and prompts that are scored: in fair weather and in storms.

PENSTOCK_STORMS=100000 python -m pytest tests/sim/test_failed_steps.py                5,000 storms
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass, field, replace
from itertools import pairwise
from random import Random

import pytest
from msgspec import structs

from penstock.blocks import Keeps, KvLayout
from penstock.engine.api import EngineInfo, Scored, SequencesFailed, Slice, Step
from penstock.engine.simulated import Options as EngineOptions
from penstock.engine.simulated import Words, _fingerprint, expected_tokens
from penstock.errors import BadRequest, DeadlineExceeded, EngineFailed, PenstockError
from penstock.policy.batching import Limits
from penstock.request import Request, Sampling, Token
from penstock.serve.lend import LendOptions
from penstock.serve.prefill import PrefillOptions
from penstock.serve.worker import WorkerOptions
from penstock.sim.faults import MortalEngine
from penstock.sim.loop import run_virtual
from penstock.sim.world import Answer, Shape, World
from penstock.tokens import pack
from tests.serve.cluster import by_turns, through
from tests.sim.test_storms import NAMES, WEATHERS, clear_up, misfortune

STORMS, BATCH = int(os.environ.get("PENSTOCK_STORMS", "2000")) // 20, 20

DOOMED, BROKEN = "doomed", "broken"  # what names of requests begin with; the number of tokens that they get follows

# Of groups, and of their windows: wider than a chunk, narrower than a block, as narrow as can be.
KEEPS: tuple[tuple[Keeps, ...], ...] = (("all",), ("all", 100, 100), (24,), (5, 100), ("all", "all", 7), (1,))


class Fickle(MortalEngine):
    """Scores prompts by what it finds in memory, and fails sequences or whole steps by the names of requests."""

    @property
    def info(self) -> EngineInfo:
        return replace(super().info, supports=("sampling", "prompt_logprobs"))

    async def step(self, step: Step) -> list[Token | None]:
        tokens = await super().step(step)
        if any(_is_due(part, BROKEN) for part in step.slices):
            raise EngineFailed("a step broke")
        if doomed := [part.past.sequence for part in step.slices if _is_due(part, DOOMED)]:
            raise SequencesFailed({sequence: BadRequest("doomed") for sequence in doomed})
        return tokens

    async def score(self, step: Step) -> list[Scored]:
        memory = self._regions[step.region.key]
        sampled = await self.step(step)
        return [
            Scored(token, _found(memory, part, step.region.layout) if part.scores is not None else ())
            for token, part in zip(sampled, step.slices, strict=True)
        ]


def _is_due(part: Slice, fate: str) -> bool:
    """Whether this is where a request of that name fails."""
    kind, _, tokens = part.past.sequence.partition("-")
    outputs = part.start + len(part.tokens) - part.past.prompt_tokens
    return part.sampling is not None and kind == fate and outputs == int(tokens.partition("-")[0])


def _found(memory: Words, part: Slice, layout: KvLayout) -> list[Token]:
    """The prompt's tokens after the slice's, each with the fingerprint before it in the first group's block."""
    ends = range(part.start, min(part.start + len(part.tokens), part.past.prompt_tokens - 1))
    size, width = layout.block_tokens, len(layout.keeps)
    return [
        Token(part.past.tokens[at + 1], float(memory[part.blocks[at // size * width], 0, at % size])) for at in ends
    ]


def expected_scores(prompt: list[int]) -> list[Token]:
    scores, fingerprint = [], 0
    for token, following in pairwise(prompt):
        fingerprint = _fingerprint(fingerprint, token, 0)
        scores.append(Token(following, float(fingerprint)))
    return scores


@dataclass(slots=True)
class Told(Answer):
    """An answer, what was told of the prompt, and what should have been."""

    name: str = ""
    scores: list[Token] | None = None
    expected_scores: list[Token] | None = field(default=None, repr=False)


async def ask(world: World, prompt: list[int], sampling: Sampling, name: str) -> Told:
    answer = Told([], expected_tokens(prompt, sampling, world.shape.engine), name=name)
    if sampling.prompt_logprobs is not None:
        answer.expected_scores = expected_scores(prompt)
    try:
        request = Request(name, world.shape.engine.model, pack(prompt), sampling, timeout_s=120.0)
        async with world.router.generate(request) as stream:
            while answer.finish is None:
                fresh, answer.finish = await stream.read()
                answer.tokens += [token.id for token in fresh]
                answer.scores = stream.prompt_logprobs
    except PenstockError as error:
        answer.error = error
    return answer


def check_rest(world: World) -> None:
    """Nothing is promised, claimed or lent any more: all blocks are to spare."""
    for worker in world.workers.values():
        stepper, leases = worker._stepper, worker._leases
        assert (leases.promised_blocks, stepper.claimed_blocks, stepper.running, stepper.waiting) == (0, 0, 0, 0)
        assert stepper.spare_blocks == worker.load().blocks


async def storm(seed: int) -> list[Told]:
    """Prompts with common beginnings, each asked for by up to three, some of which fail, under random misfortunes.

    Pools have room for the longest prompt, and often for nothing else.
    """
    rng = Random(seed)
    longest, most_tokens = rng.choice([(400, 10), (400, 100), (20, 200)])
    stems = [[rng.randrange(100, 30_000) for _ in range(400)] for _ in range(2)]
    prompts = [
        rng.choice(stems)[: rng.randrange(longest)] + [rng.randrange(100, 30_000) for _ in range(rng.randrange(1, 100))]
        for _ in range(4)
    ]
    shape = some_shape(rng, seed % 2 == 1, max(map(len, prompts)) + most_tokens + 1)
    gap_s = rng.choice([0.0, 0.1, 0.7])
    async with World(seed, shape, rng.choice(WEATHERS)) as world:
        asking: list[asyncio.Task[Told]] = []
        for prompt in prompts:
            for choice in range(rng.choice([1, 1, 3])):
                scores = rng.choice([None, None, 0])
                fate = rng.choice(["fine"] * 6 + [DOOMED, DOOMED, BROKEN])
                sampling = Sampling(most_tokens, float(choice > 0), seed=7, choice=choice, prompt_logprobs=scores)
                name = f"{fate}-{rng.randrange(4)}-{len(asking)}"
                early = expected_tokens(prompt, sampling, shape.engine)[rng.randrange(most_tokens)]
                sampling = structs.replace(sampling, min_tokens=most_tokens, stop_token_ids=(early,))
                asking.append(asyncio.create_task(ask(world, prompt, sampling, name)))
            await asyncio.sleep(gap_s * rng.random())
            if rng.random() < 0.3:
                rng.choice(asking[-2:]).cancel()
            if rng.random() < 0.5:
                misfortune(rng, world)
        await clear_up(world)
        await asyncio.wait(asking)
        await world.router.wait_ready(len(NAMES))
        await world.settle()
        check_rest(world)
        again = [ask(world, prompt, Sampling(2, 0.0), f"again-0-{at}") for at, prompt in enumerate(prompts)]
        answers = await asyncio.gather(*again)
        assert all(answer.is_whole for answer in answers), "fair weather, and not answered"
        return [task.result() for task in asking if not task.cancelled()] + answers


def some_shape(rng: Random, is_streamed: bool, most_tokens: int) -> Shape:
    engine = EngineOptions(
        prefill_token_s=rng.choice([2e-4, 1e-3]),
        step_s=0.01,
        most_steps=rng.choice([1, 4, 16]),
        keeps=rng.choice(KEEPS),
        block_tokens=rng.choice([4, 8, 16, 32]),
    )
    worker = WorkerOptions(
        *("", 0),
        limits=Limits(step_tokens=rng.choice([16, 48, 128]), max_running=rng.choice([2, 8, 256])),
        prefill=PrefillOptions(active=rng.choice([1, 2, 4]), chunk_tokens=rng.choice([16, 40, 200])),
        lend=LendOptions(lease_s=2.0, kill_after_s=8.0),
    )
    layout = KvLayout(1, 1, 1, engine.block_tokens, "uint64", keeps=engine.keeps)
    least = layout.blocks_for(most_tokens, worker.limits.step_tokens)
    blocks = rng.choice([least, least + len(layout.keeps), rng.randrange(least, 4 * least)])
    return Shape(
        prefill=2,
        decode=2,
        engine=engine,
        kv_blocks=blocks,
        worker=worker,
        is_streamed=is_streamed,
        new_engine=Fickle,
    )


def check(answer: Told) -> None:
    assert answer.is_right_so_far, f"a wrong token: {answer}"
    assert not isinstance(answer.error, DeadlineExceeded), f"hung until its deadline: {answer}"
    assert answer.error is not None or answer.is_whole, f"an end that is none: {answer}"
    if isinstance(answer.error, BadRequest):  # the tokens of other steps in the same call do not count either
        kind, tokens, _ = answer.name.split("-")
        assert kind == DOOMED and len(answer.tokens) <= int(tokens), f"failed for another: {answer}"
    if answer.tokens:
        assert answer.scores == answer.expected_scores, f"scores that are not the prompt's: {answer}"


@pytest.mark.parametrize("first", range(0, STORMS, BATCH))
def test_storms(first: int) -> None:
    for seed in range(first, first + BATCH):
        try:
            for answer in run_virtual(storm(seed)):
                check(answer)
        except Exception as error:
            raise AssertionError(f"storm {seed}: {error!r}") from error


ONE_BY_ONE = Shape(engine=EngineOptions(most_steps=1), new_engine=Fickle)


@pytest.mark.parametrize("is_streamed", [False, True], ids=["in-place", "streamed"])
@pytest.mark.parametrize("fails_at", range(4))
def test_whom_a_step_fails_for_ends_and_the_others_do_not_notice(is_streamed: bool, fails_at: int) -> None:
    policy = by_turns(through("decode-0", "decode-0"), through("prefill-0", "decode-0"))

    async def story() -> list[Told]:
        async with World(1, replace(ONE_BY_ONE, is_streamed=is_streamed), policy=policy) as world:
            names = [f"fine-0-{at}" for at in range(4)] + [f"{DOOMED}-{fails_at}-{at}" for at in range(4)]
            prompts = [[200 + at, *range(300, 300 + 40 * (1 + at))] for at in range(len(names))]
            asking = [ask(world, prompt, Sampling(12, 0.0), name) for prompt, name in zip(prompts, names, strict=True)]
            answers = await asyncio.gather(*asking)
            await world.settle()
            check_rest(world)
            return answers

    answers = run_virtual(story())
    assert all(answer.is_whole for answer in answers[:4])
    assert all(isinstance(answer.error, BadRequest) and len(answer.tokens) == fails_at for answer in answers[4:])
    for answer in answers:
        check(answer)


def test_after_a_step_that_failed_nothing_more_is_computed_for_its_sequences() -> None:
    async def story() -> None:
        async with World(1, replace(ONE_BY_ONE, prefill=0)) as world:
            answer = await ask(world, [200, 300], Sampling(8, 0.0), f"{BROKEN}-2-1")
            assert isinstance(answer.error, EngineFailed) and len(answer.tokens) == 2
            await world.settle()
            assert world.engine("decode-0").steps_begun == 3
            check_rest(world)

    run_virtual(story())


@pytest.mark.parametrize("keeps", [("all",), ("all", 40)], ids=["all", "windows"])
def test_prompts_that_lose_their_blocks_before_the_end_are_told_once(keeps: tuple[Keeps, ...]) -> None:
    """Streams that began earlier grow meanwhile, and take the blocks of a long prompt that is computed beside them."""
    worker = WorkerOptions("", 0, limits=Limits(step_tokens=8))
    shape = replace(ONE_BY_ONE, prefill=0, engine=replace(ONE_BY_ONE.engine, keeps=keeps), worker=worker)

    async def story() -> list[Told]:
        async with World(1, replace(shape, kv_blocks=45 + 15 * len(keeps))) as world:
            sampling = Sampling(170, 0.0, prompt_logprobs=0, stop_token_ids=(1,))  # so nobody knows how long it gets
            asking = [ask(world, [200 + at, 300], sampling, f"fine-0-{at}") for at in range(4)]
            growing = asyncio.gather(*asking)
            await asyncio.sleep(0.02)
            long = await ask(world, list(range(400, 1_000)), sampling, "fine-0-long")
            answers = await growing
            await world.settle()
            check_rest(world)
            return [*answers, long]

    answers = run_virtual(story())
    assert all(answer.is_whole for answer in answers)
    timeline = answers[-1].finish.timeline if answers[-1].finish else None
    assert timeline is not None and timeline.preemptions > 0 and timeline.computed_tokens > 600
    for answer in answers:
        check(answer)
