"""What it costs that another worker did the prefill: one prefill and one decode worker, real processes on this host.

    prefill worker   last chunk |--- message --->
    decode worker               |                first token, first decode step, which reads every block |
    hand-over                   |<-------------------------------------------------------------------->|

less the same time of a sequence that the decode worker prefilled for itself. Both kinds take turns; of the differences
of neighbours the median is reported, and how far apart the middle half of them lies. Prompts are random, so no prefix
is cached. No step of the decode worker has touched fresh blocks before; warm ones have held other sequences.

The model computes little and keeps 256 KiB of KV per token. The prefill worker's own region holds four tokens, so what
it computes cannot have been anywhere but in the decode worker's. A memcpy is numpy's, between buffers touched before.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from random import Random

import numpy as np
import numpy.typing as npt
import torch
from report import Row, emit
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils.logging import disable_progress_bar

from penstock.discovery.memory import MemoryDiscovery
from penstock.launch.api import Job
from penstock.launch.local import LocalLauncher
from penstock.policy.routing.api import Choice
from penstock.request import Request, Sampling, Timeline
from penstock.serve.registry import Registry
from penstock.serve.router import Router
from penstock.serve.rpc import Endpoint
from penstock.tokens import pack
from penstock.wire.stream import StreamWire

TOKENS_PER_MIB = 4
BLOCK_TOKENS = 4  # so a block is 1 MiB
MAX_TOKENS = BLOCK_TOKENS + 1  # the last is not computed on: one more block, filled, and so not free again at once
CONFIG = LlamaConfig(
    vocab_size=512,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=4,
    num_attention_heads=16,
    num_key_value_heads=16,
    head_dim=512,
    max_position_embeddings=8192,
    tie_word_embeddings=False,
)
MODEL = "bench"
HANDING_OVER = Choice("decode", ("prefill",), 0.0, wait_s=-1.0, why="worth it however short the prompt is")
AGGREGATED = Choice("decode", (), 0.0, 0.0, "the decode worker by itself")
AIM_MS = 2.0
DEADLINE_S = 120.0

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Plan:
    """Rounds over all sizes: `fresh` ones fill the decode worker's region, `warm` ones use it again.

    All of it once per session, each with workers of its own.
    """

    sizes_mib: Sequence[int]
    sessions: int
    fresh: int
    warm: int

    @property
    def region_gib(self) -> float:
        """Room for the sequences of the fresh rounds and the first pair, each with a block for what it generates."""
        return (2 * (1 + 1) + self.fresh * 2 * sum(size + 1 for size in self.sizes_mib)) / 1024

    @property
    def handoffs(self) -> int:
        """Of one session, beside the first, which is not counted."""
        return (self.fresh + self.warm) * len(self.sizes_mib)


QUICK = Plan((1, 16, 128), sessions=1, fresh=4, warm=10)
FULL = Plan((1, 4, 16, 64, 256, 512, 1024), sessions=4, fresh=1, warm=2)


@dataclass(frozen=True, slots=True)
class Pair:
    """A sequence served either way, and one copy of as many bytes. Milliseconds."""

    size_mib: int
    blocks: str  # "fresh", "warm"
    handed_over: float
    message: float  # the part of `handed_over` until the decode worker has the first token
    own: float
    memcpy: float
    copied_bytes: int  # by the hand-over

    @property
    def excess(self) -> float:
        return self.handed_over - self.own


@dataclass(frozen=True, slots=True)
class Fleet:
    """Both workers, and a router for either way."""

    handing_over: Router
    aggregated: Router
    discovery: MemoryDiscovery

    async def copied_bytes(self, handoffs: int) -> int:
        """By the decode worker's own count, once it has reported so many hand-overs."""
        async with asyncio.timeout(DEADLINE_S):
            async for standings in self.discovery.watch():
                load = standings["decode"].load
                if load.handoffs >= handoffs:
                    return load.copied_bytes
        raise SystemExit("the decode worker is gone")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    parser.add_argument("--quick", action="store_true", help="up to 128 MiB, one session")
    arguments = parser.parse_args()
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(CONFIG).save_pretrained(folder)
        emit(asyncio.run(measure(folder, QUICK if arguments.quick else FULL)), arguments.json)


async def measure(folder: str, plan: Plan) -> list[Row]:
    pairs: list[Pair] = []
    counted_bytes = 0  # by the workers
    for session in range(plan.sessions):
        async with serving(folder, plan) as fleet:
            pairs += [pair async for pair in rounds(fleet, plan, session)]
            counted_bytes += await fleet.copied_bytes(1 + plan.handoffs)
    rows = [row for size_mib in plan.sizes_mib for row in compared([p for p in pairs if p.size_mib == size_mib])]
    message = statistics.median(pair.message for pair in pairs)
    copied_bytes = max(counted_bytes, sum(pair.copied_bytes for pair in pairs))
    rows.append(Row("of a hand-over: until the first token is there", message, "ms"))
    rows.append(Row(f"copied of {sum(pair.size_mib for pair in pairs)} MiB", copied_bytes, "bytes", aim=0))
    return rows


def compared(pairs: Sequence[Pair]) -> Iterator[Row]:
    """Of one size."""
    size = f"{pairs[0].size_mib} MiB"
    for blocks in ("fresh", "warm"):
        some = [pair for pair in pairs if pair.blocks == blocks]
        excess = [pair.excess for pair in some]
        low, _, high = statistics.quantiles(excess, n=4, method="inclusive")
        memcpy = statistics.median(pair.memcpy for pair in some)
        yield Row(
            f"hand-over of {size}, {blocks}",
            statistics.median(excess),
            "ms",
            "memcpy",
            memcpy,
            AIM_MS,
            aim_is_for_value=True,
        )
        yield Row(f"  middle half of {len(excess)} spans", high - low, "ms")
    yield Row("  the same step after own prefill", statistics.median(pair.own for pair in pairs), "ms")


async def rounds(fleet: Fleet, plan: Plan, session: int) -> AsyncIterator[Pair]:
    rng = Random(session)
    source, target = (np.ones(max(plan.sizes_mib) << 20, np.uint8) for _ in range(2))
    await serve_both(fleet, TOKENS_PER_MIB, rng, session)
    for number in range(plan.fresh + plan.warm):
        for size_mib in plan.sizes_mib:
            handed_over, own = await serve_both(fleet, size_mib * TOKENS_PER_MIB, rng, session + number)
            yield Pair(
                size_mib=size_mib,
                blocks="fresh" if number < plan.fresh else "warm",
                handed_over=span_ms(handed_over.prefill_ended_s, handed_over.decoding_s),
                message=span_ms(handed_over.prefill_ended_s, handed_over.first_token_s),
                own=span_ms(own.prefill_ended_s, own.decoding_s),
                memcpy=copy_ms(source[: size_mib << 20], target[: size_mib << 20]),
                copied_bytes=handed_over.copied_bytes,
            )


async def serve_both(fleet: Fleet, tokens: int, rng: Random, turn: int) -> tuple[Timeline, Timeline]:
    """Handed over and not; which of them comes first depends on the turn."""
    ways = (fleet.handing_over, fleet.aggregated)
    timelines = {router: await serve(router, tokens, rng) for router in (ways if turn % 2 else reversed(ways))}
    handed_over, own = (timelines[router] for router in ways)
    if (handed_over.path, own.path) != ("in-place", "local"):
        raise SystemExit(f"the ways were {handed_over.path} and {own.path}")
    return handed_over, own


async def serve(router: Router, tokens: int, rng: Random) -> Timeline:
    prompt = [rng.randrange(CONFIG.vocab_size) for _ in range(tokens)]
    sampling = Sampling(MAX_TOKENS, temperature=0, ignore_eos=True)
    async with router.generate(Request(rng.randbytes(8).hex(), MODEL, pack(prompt), sampling)) as stream:
        while (await stream.read())[1] is None:
            pass
    timeline = stream.timeline
    if timeline is None or timeline.failures or timeline.cached_tokens:
        raise SystemExit(f"not served as it should be: {timeline}")
    return timeline


def span_ms(begin_s: float | None, end_s: float | None) -> float:
    if begin_s is None or end_s is None:
        raise SystemExit("a worker's timeline lacks a time")
    return (end_s - begin_s) * 1e3


def copy_ms(source: Bytes, target: Bytes) -> float:
    began_s = time.perf_counter()
    np.copyto(target, source)
    return (time.perf_counter() - began_s) * 1e3


@asynccontextmanager
async def serving(folder: str, plan: Plan) -> AsyncIterator[Fleet]:
    """Starts both workers; this process is their frontend."""
    token = secrets.token_hex(8)
    discovery = MemoryDiscovery()
    endpoint = Endpoint({"tcp": (wire := StreamWire()), "unix": wire}, token, {"join": Registry(discovery).join})
    async with (
        endpoint,
        endpoint.listen("tcp:127.0.0.1:0") as bound,
        LocalLauncher(os.environ) as launcher,
        Router(discovery, endpoint, Random(0), lambda *_: HANDING_OVER) as handing_over,
        Router(discovery, endpoint, Random(0), lambda *_: AGGREGATED) as aggregated,
    ):
        join = bound.removeprefix("tcp:")
        await launcher.start(worker("prefill", folder, 1 / 1024, join, token))
        await launcher.start(worker("decode", folder, plan.region_gib, join, token))
        async with asyncio.timeout(DEADLINE_S):
            await handing_over.wait_ready(2)
            await aggregated.wait_ready(2)
        yield Fleet(handing_over, aggregated, discovery)


def worker(role: str, folder: str, kv_gib: float, join: str, token: str) -> Job:
    flags = {"name": role, "role": role, "model-name": MODEL, "join": join, "kv-gib": kv_gib, "threads": 1}
    flags |= {"device": "cpu", "dtype": "float32", "block-tokens": BLOCK_TOKENS}
    arguments = [f"--{flag}={value}" for flag, value in flags.items()]
    return Job(role, ["worker", folder, *arguments], {"PENSTOCK_TOKEN": token})


if __name__ == "__main__":
    main()
