"""What the engine does to memory: it writes its slices' blocks only, lets go of regions, and survives failed steps."""

from __future__ import annotations

import gc
import mmap
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch
from msgspec import structs

from penstock.blocks import BlockId, Region
from penstock.engine.api import SequencesFailed, Slice, Step
from penstock.engine.embedded import EmbeddedEngine, Options
from penstock.errors import EngineFailed
from tests.engine.embedded.driver import GREEDY, Driver, poisoned_region, prompts
from tests.models import VOCABULARY
from tests.support import run

T = TypeVar("T")
With = Callable[[Callable[[EmbeddedEngine], Coroutine[object, object, T]]], T]


@pytest.fixture
def with_engine(checkpoint: Callable[[str], Path]) -> With[T]:
    """Runs a coroutine function on a tiny Llama."""

    def serve(use: Callable[[EmbeddedEngine], Coroutine[object, object, T]]) -> T:
        async def inside() -> T:
            async with EmbeddedEngine(Options(str(checkpoint("llama")), device="cpu", threads=1)) as engine:
                return await use(engine)

        return run(inside())

    return serve


def elements(region: Region) -> np.ndarray:
    """The region as [block, layer, K/V, head, token, dim], the raw words of its float32."""
    layout = region.layout
    shape = (region.blocks, layout.layers, 2, layout.kv_heads, layout.block_tokens, layout.head_dim)
    assert region.buffer is not None
    return np.frombuffer(region.buffer, np.uint32).reshape(shape).copy()


def test_no_byte_is_written_outside_the_slices(with_engine: With[None]) -> None:
    async def use(engine: EmbeddedEngine) -> None:
        driver = Driver(engine)
        decoding, chunked, fresh = (driver.start(text, 4) for text in prompts(20, 50, 35))
        await driver.step((decoding, 20), (chunked, 17))
        before = elements(driver.region)
        await driver.step((decoding, 1), (chunked, 20), (fresh, 35))
        written = (elements(driver.region) != before).any(axis=(1, 2, 3, 5))  # [block, token]
        allowed = np.zeros_like(written)
        for one, start in ((decoding, 20), (chunked, 17), (fresh, 0)):
            for position in range(start, one.computed):
                allowed[one.blocks[position // 16], position % 16] = True
        opened = (chunked.blocks[2], fresh.blocks[2])  # blocks of which the step wrote the first token
        allowed[list(opened)] = True
        assert not (written & ~allowed).any()
        assert written[allowed].mean() > 0.6

    with_engine(use)


def test_what_a_former_owner_left_behind_is_not_read(with_engine: With[None]) -> None:
    """A second sequence takes over a block full of NaN, in a batch that reads beyond its end."""

    async def use(engine: EmbeddedEngine) -> None:
        driver = Driver(engine)
        long, short = (driver.start(text, 4) for text in prompts(60, 17))
        await driver.step((long, 60), (short, 17))
        await driver.decode([long, short], 3)
        alone = Driver(engine, replace(poisoned_region(engine.info.layout), owner="other"))
        again = alone.start(prompts(60, 17)[1], 4)
        await alone.step((again, 17))
        await alone.decode([again], 3)
        assert again.ids == short.ids

    with_engine(use)


def test_nan_in_what_a_sequence_reads_is_an_error_not_a_token_and_its_own_alone(with_engine: With[None]) -> None:
    async def use(engine: EmbeddedEngine) -> None:
        driver = Driver(engine)
        (poisoned,) = driver.start([0], 0).blocks
        sequence = driver.start(prompts(40)[0], 4)
        await driver.step((sequence, 40))
        other = driver.start(prompts(40)[0], 4)
        await driver.step((other, 40))
        damaged, sound = (
            Slice(each.tokens[-1:], len(each.tokens) - 1, [first, *each.blocks[1:]], GREEDY, each.past)
            for each, first in ((sequence, poisoned), (other, other.blocks[0]))
        )
        with pytest.raises(SequencesFailed, match="position 41 are not finite") as caught:
            await engine.step(Step(driver.region, [damaged, sound]))
        assert list(caught.value.errors) == [sequence.past.sequence]

    with_engine(use)


def test_a_detached_region_can_be_unmapped(with_engine: With[None]) -> None:
    """No tensor looks at it any more, not even from a failed step whose error is still held."""

    async def use(engine: EmbeddedEngine) -> None:
        layout = engine.info.layout
        mapping = mmap.mmap(-1, 8 * layout.block_bytes)
        region = Region("peer", 3, layout, 8, memoryview(mapping))
        engine.attach(region)
        engine.attach(region)
        await engine.step(Step(region, [Slice([1, 2, 3], 0, [BlockId(5)], GREEDY)]))
        with pytest.raises(EngineFailed, match="out of bounds") as failed:
            await engine.step(Step(region, [Slice([4], 3, [BlockId(8)], GREEDY)]))
        assert tensors_in(mapping)
        engine.detach(region.key)
        engine.detach(region.key)
        assert not tensors_in(mapping)
        assert region.buffer is not None
        region.buffer.release()
        mapping.close()
        del failed

    with_engine(use)


def tensors_in(mapping: mmap.mmap) -> list[torch.Tensor]:
    start = np.frombuffer(mapping, np.uint8).ctypes.data
    tensors = [found for found in gc.get_objects() if type(found) is torch.Tensor]
    return [tensor for tensor in tensors if start <= tensor.data_ptr() < start + len(mapping)]


def test_a_failed_step_leaves_the_engine_usable(with_engine: With[None]) -> None:
    async def use(engine: EmbeddedEngine) -> None:
        driver = Driver(engine)
        bad, good = driver.start([1, VOCABULARY], 1), driver.start([1, 2], 1)
        with pytest.raises(EngineFailed, match="a step of 2 tokens raised IndexError: index out of range"):
            await driver.step((bad, 2))
        await driver.step((good, 2))
        assert len(good.output) == 1

    with_engine(use)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda region: replace(region, buffer=None), "in memory that this process cannot reach"),
        (lambda region: replace(region, layout=structs.replace(region.layout, head_dim=8)), "lays out KV as"),
    ],
)
def test_a_region_it_cannot_compute_in_is_refused(
    with_engine: With[None], change: Callable[[Region], Region], complaint: str
) -> None:
    async def use(engine: EmbeddedEngine) -> None:
        with pytest.raises(EngineFailed, match=complaint):
            engine.attach(change(poisoned_region(engine.info.layout)))

    with_engine(use)


def test_a_step_needs_its_region_attached_and_the_engine_entered(with_engine: With[EmbeddedEngine]) -> None:
    async def use(engine: EmbeddedEngine) -> EmbeddedEngine:
        with pytest.raises(EngineFailed, match="not attached to region \\('worker', 1\\)"):
            await engine.step(step(engine))
        return engine

    def step(engine: EmbeddedEngine) -> Step:
        return Step(poisoned_region(engine.info.layout), [Slice([1], 0, [BlockId(0)], GREEDY)])

    left = with_engine(use)
    with pytest.raises(EngineFailed, match="inside `async with` only"):
        run(left.step(step(left)))
