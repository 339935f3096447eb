"""Planning a move of KV between layouts that differ: time, and ranges, for a prompt of 8,000 tokens of a 70B model.

80 layers, 8 KV heads of 128, bfloat16, block tables in random order. The last block of 64 is full, that of 48 is not.
Times are CPU of this process, the least of several runs; the first in a process takes up to ten times as long, in which
it touches the memory that later ones find. "all ranks" is the plan of every source rank, "one rank" what the busiest
has to do by itself. "loop" is the same plan by a plain Python loop over pieces, layers, sides and heads, which joins
nothing; "naive" counts a range for each (token, layer, side, head), as from an engine that keeps tokens apart. The plan
and the loop are checked to move equally many bytes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from random import Random
from typing import NamedTuple

from report import Row, emit

from penstock.blocks import BlockId, KvGroup, KvLayout, Sharding
from penstock.kv.reshard import Plan, plan

TOKENS = 8_000
LAYERS, HEADS, DIM = 80, 8, 128
POOL_BLOCKS = 4_000
AIM_MS = 5.0
AIM_OF_LOOP = 0.05
CASES = (  # (tensor parallelism, tokens in a block) of the source, and of the target
    ((8, 16), (4, 64)),
    ((4, 64), (8, 16)),
    ((4, 16), (8, 48)),
    ((8, 16), (4, 16)),
    ((4, 16), (4, 16)),
)


class Worker(NamedTuple):
    sharding: Sharding
    table: list[BlockId]


class Piece(NamedTuple):
    source_rank: int
    target_rank: int
    source: int
    target: int
    length: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    arguments = parser.parse_args()
    repeat = 5 if arguments.quick else 50
    emit([row for ours, theirs in CASES for row in measured(ours, theirs, repeat)], arguments.json)


def measured(ours: tuple[int, int], theirs: tuple[int, int], repeat: int) -> list[Row]:
    name = f"tp {ours[0]} -> {theirs[0]}, blocks of {ours[1]} -> {theirs[1]}"
    rng = Random(1)
    source, target = worker(*ours, rng), worker(*theirs, rng)
    all_ms = least_ms(lambda: carried_out(planned(source, target)), repeat)
    one_ms = max(least_ms(lambda rank=rank: list(planned(source, target).of(rank)), repeat) for rank in range(ours[0]))
    loop_ms = least_ms(lambda: list(looped(source, target)), 1)
    sent = [ranges for rank in range(ours[0]) for _, ranges in planned(source, target).of(rank)]
    moved = sum(ranges.bytes for ranges in sent)
    if moved != (looped_bytes := sum(piece.length for piece in looped(source, target))):
        raise AssertionError(f"{name}: {moved} bytes planned, {looped_bytes} by the loop")
    naive = TOKENS * LAYERS * 2 * HEADS
    return [
        Row(f"{name}: all ranks", all_ms, "ms", "loop", loop_ms, AIM_MS, aim_is_for_value=True),
        Row(f"{name}: one rank", one_ms, "ms", "loop", loop_ms / ours[0], AIM_OF_LOOP),
        Row(f"{name}: ranges", sum(len(ranges) for ranges in sent), "", "naive", naive, 1.0),
    ]


def worker(tp: int, block_tokens: int, rng: Random) -> Worker:
    layout = KvLayout(LAYERS, HEADS, DIM, block_tokens, "bfloat16")
    table = rng.sample(range(POOL_BLOCKS), layout.blocks_for(TOKENS))
    return Worker(Sharding("70b", (KvGroup(layout),), tp), [BlockId(block) for block in table])


def planned(source: Worker, target: Worker) -> Plan:
    return plan(source.sharding, target.sharding, [(source.table, target.table)], range(TOKENS), TOKENS)


def carried_out(made: Plan) -> int:
    """Has every rank's ranges made; returns how many."""
    return sum(len(ranges) for rank in range(made.source.tp) for _, ranges in made.of(rank))


def least_ms(call: Callable[[], object], repeat: int) -> float:
    """CPU time of the quickest of `repeat` calls."""
    spent = []
    for _ in range(repeat):
        begun_s = time.process_time()
        call()
        spent.append(time.process_time() - begun_s)
    return min(spent) * 1e3


def looped(source: Worker, target: Worker) -> Iterator[Piece]:
    """The plan, spelled out. Every head is on one rank here: there are no more ranks than heads."""
    ours, theirs = (side.sharding.groups[0].layout.block_tokens for side in (source, target))
    position = 0
    while position < TOKENS:
        stop = min(TOKENS, position // ours * ours + ours, position // theirs * theirs + theirs)
        for layer in range(LAYERS):
            for side in range(2):
                for head in range(HEADS):
                    source_rank, begin = place(source, position, layer, side, head)
                    target_rank, to = place(target, position, layer, side, head)
                    yield Piece(source_rank, target_rank, begin, to, (stop - position) * DIM * 2)
        position = stop


def place(worker: Worker, position: int, layer: int, side: int, head: int) -> tuple[int, int]:
    """The rank that holds this, and the offset in its region."""
    per_rank = HEADS // worker.sharding.tp
    size = worker.sharding.groups[0].layout.block_tokens
    slab = (worker.table[position // size] * LAYERS + layer) * 2 + side
    return head // per_rank, ((slab * per_rank + head % per_rank) * size + position % size) * DIM * 2


if __name__ == "__main__":
    main()
