"""KV that a long sequence holds, and that is moved of its prompt, where windows have block tables of their own.

Measured on virtual time: workers of the simulated engine serve one request, whose blocks are counted at the decode
worker, as they are held at most while the prompt is computed in them, and in the mean while it decodes. A block's size
is that of the named model in bfloat16. The reference is one block table for all layers, which keeps everything.
"""

from __future__ import annotations

import argparse
import asyncio
from dataclasses import dataclass, replace
from statistics import mean

from report import Row, emit

from penstock.blocks import Keeps, KvLayout, deal_layers
from penstock.engine.simulated import Options
from penstock.sim.loop import run_virtual
from penstock.sim.world import Answer, Shape, World

OUTPUT_TOKENS = 200


@dataclass(frozen=True)
class Model:
    """Layers by what they keep, and the keys and values of one."""

    name: str
    kinds: list[Keeps]
    kv_heads: int
    head_dim: int

    def layout(self, is_dealt: bool) -> KvLayout:
        layers, keeps, _ = deal_layers(self.kinds if is_dealt else ["all"] * len(self.kinds))
        return KvLayout(layers, self.kv_heads, self.head_dim, 16, "bfloat16", keeps=keeps)


MODELS = (
    Model("Gemma 3 4B", ([*[1023] * 5, "all"] * 6)[:34], 4, 256),
    Model("gpt-oss-20b", [127, "all"] * 12, 8, 64),
    Model("Mistral 7B v0.1", [4095] * 32, 8, 128),
)


@dataclass(frozen=True)
class Taken:
    """Bytes: at most while prefilling in place, in the mean while decoding, and moved if the prefill is elsewhere."""

    prefilling: float
    decoding: float
    moved: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    parser.add_argument("--quick", action="store_true", help="the shorter prompt alone")
    arguments = parser.parse_args()
    emit(rows((4_000,) if arguments.quick else (4_000, 32_000)), arguments.json)


def rows(lengths: tuple[int, ...]) -> list[Row]:
    found = []
    for model in MODELS:
        for tokens in lengths:
            ours, whole = (taken(model.layout(is_dealt), tokens) for is_dealt in (True, False))
            for what in ("prefilling", "decoding", "moved"):
                mib, reference_mib = (getattr(each, what) / 2**20 for each in (ours, whole))
                found.append(Row(f"{model.name}, {tokens} tokens, {what}", mib, "MiB", "one table", reference_mib))
    return found


def taken(layout: KvLayout, tokens: int) -> Taken:
    held, _ = run_virtual(serve(layout, tokens, is_streamed=False))
    _, answer = run_virtual(serve(layout, tokens, is_streamed=True))
    assert answer.finish is not None
    moved_blocks = answer.finish.timeline.copied_bytes / (16 * layout.block_tokens)  # of 16 bytes a token
    decoding = [blocks for outputs, blocks in held if outputs > 1]
    prefilling = [blocks for outputs, blocks in held if outputs <= 1]
    size = layout.block_bytes
    return Taken(max(prefilling) * size, mean(decoding) * size, moved_blocks * size)


async def serve(layout: KvLayout, tokens: int, is_streamed: bool) -> tuple[list[tuple[int, int]], Answer]:
    """(output tokens, blocks held at the decode worker), every virtual millisecond; and what the client got."""
    options = Options(keeps=layout.keeps, prefill_token_s=1e-4, max_context_tokens=tokens + OUTPUT_TOKENS + 1)
    room = 2 * layout.entries_for(tokens + OUTPUT_TOKENS)
    shape = replace(Shape(), engine=options, kv_blocks=room, is_streamed=is_streamed)
    held: list[tuple[int, int]] = []
    async with World(seed=1, shape=shape) as world:
        asking = asyncio.create_task(world.ask(tokens=tokens, max_tokens=OUTPUT_TOKENS))
        while not asking.done():
            load = world.workers["decode-0"].load()
            held.append((load.output_tokens, load.blocks - load.free_blocks))
            await asyncio.sleep(1e-3)
        answer = await asking
        assert answer.is_whole, answer
        return held, answer


if __name__ == "__main__":
    main()
