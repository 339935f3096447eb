"""What every engine promises. Each test runs on every backend."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from penstock import plugin
from penstock.blocks import BlockId, Region
from penstock.engine.api import FEATURES, Engine, Past, ScoringEngine, Slice, Step
from penstock.errors import EngineFailed
from penstock.request import Sampling
from tests.support import run

GREEDY = Sampling(max_tokens=1, temperature=0)
SEEDED = Sampling(max_tokens=1, temperature=1.0, seed=9)
PROMPT = [5, 60, 7, 100, 9, 33, 71, 12, 250, 14, 15, 90, 17, 18, 111, 20, 21, 222, 23, 24]
Make = Callable[[], AbstractAsyncContextManager[Engine]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch")
    from tests.models import make_model

    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(params=["embedded", "simulated"])
def make(request: pytest.FixtureRequest, folder: Path) -> Make:
    module = plugin.find("engine", request.param)
    options: dict[str, Any] = {"threads": 1} if request.param == "embedded" else {}
    return lambda: module.ENGINE(module.Options(model=str(folder), block_tokens=4, **options))


def test_every_backend_is_here() -> None:
    assert plugin.names("engine") == ["embedded", "simulated"]


def a_region(engine: Engine, blocks: int = 24, fill: int = 0) -> Region:
    layout = engine.info.layout
    return Region("w", 1, layout, blocks, memoryview(bytearray(bytes([fill]) * (blocks * layout.block_bytes))))


def table(*blocks: int) -> list[BlockId]:
    return [BlockId(block) for block in blocks]


async def sample(engine: Engine, region: Region, tokens: list[int], start: int, blocks: list[BlockId]) -> int:
    (token,) = await engine.step(Step(region, [Slice(tokens, start, blocks, GREEDY)]))
    assert token is not None
    return token.id


async def generate(engine: Engine, region: Region, blocks: list[BlockId], chunks: list[int], count: int) -> list[int]:
    """`count` greedy tokens after PROMPT, prefilled in `chunks`."""
    start = 0
    for chunk in chunks[:-1]:
        assert await engine.step(Step(region, [Slice(PROMPT[start : start + chunk], start, blocks)])) == [None]
        start += chunk
    tokens = [await sample(engine, region, PROMPT[start:], start, blocks)]
    while len(tokens) < count:
        tokens.append(await sample(engine, region, tokens[-1:], len(PROMPT) + len(tokens) - 1, blocks))
    return tokens


def test_its_info_is_known_before_it_is_entered(make: Make) -> None:
    engine: Any = make()
    info = engine.info
    assert info.layout.block_tokens == 4 and info.vocab_size > 300 and info.max_context_tokens > 100
    assert info.shares_memory


def test_who_supports_prompt_logprobs_scores(make: Make) -> None:
    engine: Any = make()
    assert set(engine.info.supports) <= set(FEATURES)
    assert ("prompt_logprobs" in engine.info.supports) == isinstance(engine, ScoringEngine)


def test_chunks_and_block_tables_do_not_matter(make: Make) -> None:
    async def story() -> None:
        async with make() as engine:
            outputs = []
            for chunks, blocks in (([20], range(8)), ([3, 9, 8], range(9, 17)), ([19, 1], (23, 2, 19, 4, 7, 5, 12, 9))):
                region = a_region(engine)
                engine.attach(region)
                outputs.append(await generate(engine, region, table(*blocks), list(chunks), 8))
                engine.detach(region.key)
            assert outputs[0] == outputs[1] == outputs[2]
            assert len(set(outputs[0])) > 2

    run(story())


def test_a_second_engine_goes_on_in_the_same_memory(make: Make) -> None:
    async def story() -> None:
        async with make() as first, make() as second:
            region, blocks = a_region(first), table(3, 1, 4, 15, 9, 2, 6, 5)
            for engine in (first, second):
                engine.attach(region)
            alone = await generate(first, a_region_attached(first), table(*range(8)), [20], 6)
            handed = [await sample(first, region, PROMPT, 0, blocks)]
            while len(handed) < 6:
                handed.append(await sample(second, region, handed[-1:], len(PROMPT) + len(handed) - 1, blocks))
            assert handed == alone

    run(story())


def a_region_attached(engine: Engine) -> Region:
    layout = engine.info.layout
    region = Region("other", 1, layout, 24, memoryview(bytearray(24 * layout.block_bytes)))
    engine.attach(region)
    return region


def test_neighbours_in_a_step_do_not_matter(make: Make) -> None:
    async def story() -> None:
        async with make() as engine:
            region = a_region(engine)
            engine.attach(region)
            mine = Slice(PROMPT, 0, table(*range(5)), SEEDED)
            alone = (await engine.step(Step(region, [mine])))[0]
            others = [Slice(PROMPT[:7], 0, table(10, 11), GREEDY), Slice(PROMPT[3:9], 0, table(12, 13))]
            together = await engine.step(Step(region, [others[0], mine, others[1]]))
            assert together[1] == alone and together[2] is None

    run(story())


def test_the_tokens_that_would_end_an_output_wait_for_min_tokens(make: Make) -> None:
    async def story() -> None:
        async with make() as engine:
            region, blocks, outputs = a_region(engine), table(*range(5)), 3
            engine.attach(region)
            past = Past("s", array("I", PROMPT), len(PROMPT) - outputs)
            ending = await sample(engine, region, PROMPT, 0, blocks)
            for min_tokens in (outputs, outputs + 1):
                sampling = structs.replace(GREEDY, stop_token_ids=(ending,), min_tokens=min_tokens)
                (token,) = await engine.step(Step(region, [Slice(PROMPT, 0, blocks, sampling, past)]))
                assert token is not None and (token.id == ending) == (min_tokens == outputs)

    run(story())


def test_it_writes_into_the_slices_blocks_and_nowhere_else(make: Make) -> None:
    async def story() -> None:
        async with make() as engine:
            region, size = a_region(engine, fill=1), engine.info.layout.block_bytes
            engine.attach(region)
            assert region.buffer is not None
            await engine.step(Step(region, [Slice(PROMPT, 0, table(7, 3, 11, 2, 20), GREEDY)]))
            for block in range(region.blocks):
                content = bytes(region.buffer[block * size : (block + 1) * size])
                assert (content == b"\x01" * size) == (block not in (7, 3, 11, 2, 20)), f"block {block}"

    run(story())


def test_damaged_memory_shows(make: Make) -> None:
    async def story() -> None:
        async with make() as engine:
            region, size, blocks = a_region(engine), engine.info.layout.block_bytes, table(*range(8))
            engine.attach(region)
            assert region.buffer is not None
            intact = await generate(engine, region, blocks, [20], 8)
            await engine.step(Step(region, [Slice(PROMPT, 0, blocks)]))
            region.buffer[:size] = bytes(size)
            after = [intact[0]]
            while len(after) < 8:
                after.append(await sample(engine, region, after[-1:], len(PROMPT) + len(after) - 1, blocks))
            assert after != intact

    run(story())


def test_a_region_must_be_attached_and_may_be_attached_twice(make: Make) -> None:
    async def story() -> None:
        async with make() as engine:
            region = a_region(engine)
            engine.detach(region.key)
            with pytest.raises(EngineFailed, match="attached"):
                await sample(engine, region, PROMPT, 0, table(*range(5)))
            engine.attach(region)
            engine.attach(region)
            await sample(engine, region, PROMPT, 0, table(*range(5)))
            engine.detach(region.key)
            with pytest.raises(EngineFailed, match="attached"):
                await sample(engine, region, PROMPT, 0, table(*range(5)))
            assert region.buffer is not None
            region.buffer.release()  # raises BufferError if the engine kept a view

    run(story())
