"""The embedded engine against transformers' own generate(): ms per decode step and per prefill, in one run.

A Llama of 22 M parameters with random weights; contexts of 128 to 136 tokens. Rounds of both are interleaved and the
medians of wall and process CPU time reported. Index building is the engine's own work before a forward pass.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from report import Row, emit
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from penstock.blocks import BlockId, KvLayout, Region
from penstock.engine.api import Slice, Step
from penstock.engine.embedded import EmbeddedEngine, Options
from penstock.engine.embedded_batch import Geometry, build
from penstock.request import Sampling

PROMPT_TOKENS = 128
PREFILL_TOKENS = 512
STEPS = 8
GREEDY = Sampling(max_tokens=STEPS, temperature=0)
CONFIG = LlamaConfig(
    vocab_size=8192,
    hidden_size=384,
    intermediate_size=1024,
    num_hidden_layers=10,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
)


@dataclass(frozen=True, slots=True)
class Spent:
    """Milliseconds."""

    wall: float
    cpu: float

    def __sub__(self, other: Spent) -> Spent:
        return Spent(self.wall - other.wall, self.cpu - other.cpu)

    def __truediv__(self, parts: int) -> Spent:
        return Spent(self.wall / parts, self.cpu / parts)


class Stopwatch:
    """`with Stopwatch() as watch: ...; watch.spent`."""

    def __enter__(self) -> Stopwatch:
        self._from = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        wall, cpu = self._from
        self.spent = Spent((time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--threads", type=int, default=1, help="of a step, for both sides")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(CONFIG).save_pretrained(folder)
        rounds = 3 if arguments.quick else 11
        emit(asyncio.run(measure(folder, rounds, arguments.threads)), arguments.json)


async def measure(folder: str, rounds: int, threads: int) -> list[Row]:
    rows = []
    for dtype in ("float32", "bfloat16"):
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        engine = EmbeddedEngine(Options(folder, device="cpu", dtype=dtype, threads=threads))
        async with engine:
            bench = Bench(engine, reference)
            for batch in (1, 8, 32):
                pairs = [(await bench.decode(batch), bench.decode_reference(batch)) for _ in range(rounds)]
                rows += compared(f"decode step, batch {batch}, {dtype}", pairs)
            pairs = [(await bench.prefill(), bench.prefill_reference()) for _ in range(rounds)]
            rows += compared(f"prefill of {PREFILL_TOKENS}, {dtype}", pairs)
    return rows + index_building()


class Bench:
    """Both sides, on the same prompts."""

    def __init__(self, engine: EmbeddedEngine, reference: PreTrainedModel) -> None:
        layout = engine.info.layout
        blocks = 32 * layout.entries_for(PROMPT_TOKENS + STEPS) + layout.entries_for(PREFILL_TOKENS)
        self._engine = engine
        self._reference = reference
        self._region = Region("bench", 1, layout, blocks, memoryview(bytearray(blocks * layout.block_bytes)))
        self._prompts = torch.randint(CONFIG.vocab_size, (32, PROMPT_TOKENS))
        self._long = torch.randint(CONFIG.vocab_size, (1, PREFILL_TOKENS))
        engine.attach(self._region)

    async def decode(self, batch: int) -> Spent:
        """The engine's time per step: prompts are computed first, in one step that does not count."""
        tables = self._tables(batch, PROMPT_TOKENS + STEPS)
        prompts = self._prompts[:batch].tolist()
        whole = [Slice(prompt, 0, table, GREEDY) for prompt, table in zip(prompts, tables, strict=True)]
        tokens = await self._step(whole)
        with Stopwatch() as watch:
            for position in range(PROMPT_TOKENS, PROMPT_TOKENS + STEPS):
                tokens = await self._step(
                    [Slice([token], position, table, GREEDY) for token, table in zip(tokens, tables, strict=True)]
                )
        return watch.spent / STEPS

    def decode_reference(self, batch: int) -> Spent:
        longer = self._generate(self._prompts[:batch], 1 + STEPS)
        return (longer - self._generate(self._prompts[:batch], 1)) / STEPS

    async def prefill(self) -> Spent:
        (table,) = self._tables(1, PREFILL_TOKENS)
        with Stopwatch() as watch:
            await self._step([Slice(self._long[0].tolist(), 0, table, GREEDY)])
        return watch.spent

    def prefill_reference(self) -> Spent:
        return self._generate(self._long, 1)

    def _tables(self, batch: int, tokens: int) -> list[list[BlockId]]:
        each = self._engine.info.layout.entries_for(tokens)
        return [[BlockId(b) for b in range(row * each, (row + 1) * each)] for row in range(batch)]

    async def _step(self, slices: Sequence[Slice]) -> list[int]:
        return [token.id for token in await self._engine.step(Step(self._region, slices)) if token is not None]

    def _generate(self, prompts: torch.Tensor, tokens: int) -> Spent:
        with Stopwatch() as watch:
            self._reference.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        return watch.spent


def compared(name: str, pairs: Sequence[tuple[Spent, Spent]]) -> list[Row]:
    ours, reference = zip(*pairs, strict=True)
    return [
        Row(f"{name}, {kind}", median(ours, kind), "ms", "generate()", median(reference, kind))
        for kind in ("wall", "cpu")
    ]


def median(spent: Sequence[Spent], kind: str) -> float:
    return statistics.median(getattr(one, kind) for one in spent)


def index_building() -> list[Row]:
    """For a model of 32 layers and 8 KV heads, since that is where tables are long."""
    layout = KvLayout(layers=32, kv_heads=8, head_dim=128, block_tokens=16, dtype="bfloat16")
    geometry = Geometry(layout, 32, torch.bfloat16, torch.device("cpu"))
    return [
        Row(f"index building, {sequences} x {context} tokens", index_ms(geometry, sequences, context), "ms")
        for sequences, context in ((1, 128), (32, 128), (1, 4_000), (32, 4_000), (1, 50_000))
    ]


def index_ms(geometry: Geometry, sequences: int, context: int) -> float:
    table = [BlockId(block) for block in range(geometry.layout.entries_for(context))]
    slices = [Slice([0], context - 1, table, GREEDY)] * sequences
    taken = []
    for _ in range(21):
        with Stopwatch() as watch:
            for group in build(slices, geometry).groups:
                group.span(None, 0)
        taken.append(watch.spent.wall)
    return statistics.median(taken)


if __name__ == "__main__":
    main()
