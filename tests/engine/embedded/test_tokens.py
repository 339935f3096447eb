"""The tokens are the model's own, however the work is cut into steps, and whoever computed the prefix."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from penstock.engine import embedded_batch, embedded_products
from penstock.engine.embedded import EmbeddedEngine, Options
from penstock.request import Sampling
from tests.engine.embedded.driver import WHOLE, Driver, Running, distance, generated, prompts
from tests.models import ALIKE, SERVED, WINDOWED
from tests.support import run

Checkpoint = Callable[[str], Path]
TOKENS = 16


@pytest.mark.parametrize("architecture", SERVED + ALIKE)
def test_any_mixture_of_slices_equals_generate(
    checkpoint: Checkpoint, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded_products, "_LEAST_ELEMENTS", 1)  # the tiny model's layers are packed as large ones are
    folder = checkpoint(architecture)
    texts = prompts(7, 40, 61, 33)

    async def serve() -> list[Running]:
        async with EmbeddedEngine(Options(str(folder), device="cpu", threads=1)) as engine:
            driver = Driver(engine)
            one, two, chunked, late = running = [driver.start(text, TOKENS) for text in texts]
            await driver.step((one, 7), (two, 40))
            await driver.step((chunked, 25), (one, 1), (two, 1))
            await driver.step((two, 1), (chunked, 36), (one, 1), (late, 33))
            await driver.decode(running, TOKENS)
            return running

    for text, sequence in zip(texts, run(serve()), strict=True):
        assert sequence.ids == generated(folder, text, TOKENS)


@pytest.mark.parametrize("group_bytes", [1, embedded_batch._GROUP_BYTES])
def test_decoding_sequences_of_unlike_length_equals_generate(
    checkpoint: Checkpoint, group_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded_batch, "_GROUP_BYTES", group_bytes)
    folder = checkpoint("llama")
    texts = prompts(400, 5, 390, 20)  # two groups of two

    async def serve() -> list[Running]:
        async with EmbeddedEngine(Options(str(folder), device="cpu", threads=1)) as engine:
            driver = Driver(engine)
            running = [driver.start(text, TOKENS) for text in texts]
            await driver.step(*((one, len(one.tokens)) for one in running))
            await driver.decode(running, TOKENS)
            return running

    for text, sequence in zip(texts, run(serve()), strict=True):
        assert sequence.ids == generated(folder, text, TOKENS)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("computed", [32, 45, 61])
def test_another_engine_continues_in_place(checkpoint: Checkpoint, architecture: str, computed: int) -> None:
    """One prefills the first `computed` tokens, another the rest, in the same blocks, and decodes."""
    options = Options(str(checkpoint(architecture)), device="cpu", threads=1)
    (text,) = prompts(61)

    async def serve(engines: int) -> Running:
        async with EmbeddedEngine(options) as first, EmbeddedEngine(options) as second:
            driver = Driver(first)
            sequence = driver.start(text, TOKENS, WHOLE)
            await driver.step((sequence, computed))
            other = Driver(second, driver.region) if engines == 2 else driver
            if computed < len(text):
                await other.step((sequence, len(text) - computed))
            await other.decode([sequence], TOKENS)
            return sequence

    alone, handed_over = run(serve(1)), run(serve(2))
    assert alone.ids == generated(options.model, text, TOKENS)
    assert distance(handed_over.output, alone.output) == 0


def test_damage_to_any_block_shows(checkpoint: Checkpoint) -> None:
    """The negative control of all these tests: one block of zeros, or another sequence's."""
    text, foreign = prompts(70, 64)

    async def serve() -> tuple[float, list[float]]:
        async with EmbeddedEngine(Options(str(checkpoint("llama")), device="cpu", threads=1)) as engine:
            driver = Driver(engine)
            sequence, other, empty = driver.start(text, 2, WHOLE), driver.start(foreign, 0), driver.start(foreign, 0)
            await driver.step((sequence, 70), (other, 64))
            for block in empty.blocks:
                driver.zero(block)
            own = sequence.blocks
            intact = await driver.peek(sequence, own)
            damaged = [
                await driver.peek(sequence, [*own[:i], strange.blocks[i], *own[i + 1 :]])
                for i in range(4)
                for strange in (empty, other)
            ]
            again = await driver.peek(sequence, own)
            return distance([again], [intact]), [distance([one], [intact]) for one in damaged]

    undamaged, damaged = run(serve())
    assert undamaged == 0
    assert min(damaged) > 1e-4


def test_swapped_blocks_show_under_a_window(checkpoint: Checkpoint) -> None:
    """Without one they do not: keys carry their positions, and attention does not care where it finds them."""
    (text,) = prompts(70)

    async def serve() -> list[float]:
        async with EmbeddedEngine(Options(str(checkpoint("mistral")), device="cpu", threads=1)) as engine:
            driver = Driver(engine)
            sequence = driver.start(text, 2, WHOLE)
            await driver.step((sequence, len(text)))
            zero, one, two, three, last = sequence.blocks
            intact = await driver.peek(sequence, sequence.blocks)
            swapped = [[zero, two, one, three, last], [zero, one, three, two, last]]
            return [distance([await driver.peek(sequence, blocks)], [intact]) for blocks in swapped]

    assert min(run(serve())) > 1e-4


@pytest.mark.parametrize("architecture", WINDOWED)
def test_the_window_matters(checkpoint: Checkpoint, tmp_path: Path, architecture: str) -> None:
    """The negative control of the windowed models: the same weights without the window say something else."""
    folder = checkpoint(architecture)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"sliding_window": 500}))

    async def first_token(model: Path) -> Running:
        async with EmbeddedEngine(Options(str(model), device="cpu", threads=1)) as engine:
            driver = Driver(engine)
            sequence = driver.start(prompts(70)[0], 1, WHOLE)
            await driver.step((sequence, 70))
            return sequence

    assert distance(run(first_token(tmp_path)).output, run(first_token(folder)).output) > 1e-4


def test_two_engines_in_one_process_keep_apart(checkpoint: Checkpoint) -> None:
    """Different models, layouts and regions, stepping at the same time."""
    folders = [checkpoint("llama"), checkpoint("gpt2")]
    (text,) = prompts(40)

    async def serve(folder: Path) -> list[int]:
        async with EmbeddedEngine(Options(str(folder), device="cpu", threads=1)) as engine:
            driver = Driver(engine)
            sequence = driver.start(text, TOKENS)
            await driver.step((sequence, len(text)))
            await driver.decode([sequence], TOKENS)
            return sequence.ids

    async def both() -> list[list[int]]:
        return await asyncio.gather(*map(serve, folders))

    assert run(both()) == [generated(folder, text, TOKENS) for folder in folders]


def test_a_seeded_sequence_is_the_same_in_any_company(checkpoint: Checkpoint) -> None:
    seeded = Sampling(max_tokens=TOKENS, temperature=1.0, top_p=0.9, top_k=50, seed=5)
    texts = prompts(20, 33, 50)

    async def serve(texts: list[list[int]]) -> list[int]:
        async with EmbeddedEngine(Options(str(checkpoint("llama")), device="cpu", threads=1)) as engine:
            driver = Driver(engine)
            running = [driver.start(text, TOKENS, seeded) for text in texts]
            await driver.step(*((one, len(one.tokens)) for one in running))
            await driver.decode(running, TOKENS)
            return running[0].ids

    assert run(serve(texts[:1])) == run(serve(texts))


def test_bfloat16_keeps_close_to_float32(checkpoint: Checkpoint) -> None:
    (text,) = prompts(50)

    async def first_token(dtype: str) -> Running:
        options = Options(str(checkpoint("llama")), device="cpu", dtype=dtype, threads=1)
        async with EmbeddedEngine(options) as engine:
            driver = Driver(engine)
            sequence = driver.start(text, 1, WHOLE)
            await driver.step((sequence, 20))
            await driver.step((sequence, 30))
            return sequence

    exact, rounded = run(first_token("float32")), run(first_token("bfloat16"))
    assert 0 < distance(rounded.output, exact.output) < 0.5
