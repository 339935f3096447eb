"""Documents to fill an index with, and what NVIDIA Dynamo's index of prefixes takes for them, through its binding.

`bench/router.py` runs `main` by an interpreter that has ai-dynamo-runtime, and need not have penstock.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

BLOCKS = 2_048  # of a document
SHARED = 256  # of them begin those of others as well
EVENT_BLOCKS = 16
HASH_TOKENS, HASH_BLOCK_TOKENS = 4_096, 16
HASH_BITS = 60
REMOVED = 20  # documents
REPEATS = 300


class Document(NamedTuple):
    """The hashes of its blocks, each of all before it too; `worker` holds it."""

    worker: int
    hashes: Sequence[int]


def documents(entries: int, workers: int) -> list[Document]:
    """So many blocks on workers, no less than one document. Who begins alike depends on the sizes alone."""
    rng, length = Random(1), min(BLOCKS, entries)
    count = max(1, entries // length)
    prefixes = max(1, count // workers)
    shared = [array("q", (rng.getrandbits(HASH_BITS) for _ in range(min(SHARED, length)))) for _ in range(prefixes)]
    return [
        Document(
            number // prefixes % workers,
            shared[number % prefixes] + array("q", (rng.getrandbits(HASH_BITS) for _ in range(length - SHARED))),
        )
        for number in range(count)
    ]


def questions(held: Sequence[Document], blocks: int) -> Iterator[list[int]]:
    """Beginnings of documents that are held."""
    rng = Random(2)
    return (list(held[rng.randrange(len(held))].hashes[:blocks]) for _ in range(REPEATS))


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def median_us(calls: Sequence[Callable[[], object]]) -> float:
    """Wall time of one of them: the median."""
    taken = []
    for call in calls:
        begun = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken) * 1e6


def main() -> None:
    """`entries workers` as arguments; prints one JSON object."""
    from dynamo.llm import RadixTree, compute_block_hash_for_seq

    entries, workers = map(int, sys.argv[1:])
    held = documents(entries, workers)
    events = [
        (document.worker, _stored(document.hashes[start - 1 : start], document.hashes[start : start + EVENT_BLOCKS]))
        for document in held
        for start in range(0, len(document.hashes), EVENT_BLOCKS)
    ]
    before = resident_bytes()
    tree, found = RadixTree(), {}
    begun = time.perf_counter()
    for worker, event in events:
        tree.apply_event(worker, event)
    tree.find_matches([1])  # it has a thread of its own: wait for it
    blocks = sum(len(document.hashes) for document in held)
    found["stored"] = blocks / (time.perf_counter() - begun)
    found["bytes"] = (resident_bytes() - before) / blocks
    for asked in (SHARED, BLOCKS):
        found[f"lookup {asked}"] = median_us([lambda q=q: tree.find_matches(q) for q in questions(held, asked)])
    gone = held[:REMOVED]
    events = [
        (document.worker, _removed(document.hashes[start : start + EVENT_BLOCKS]))
        for document in gone
        for start in range(len(document.hashes) - EVENT_BLOCKS, -1, -EVENT_BLOCKS)  # the end first, as engines do
    ]
    begun = time.perf_counter()
    for worker, event in events:
        tree.apply_event(worker, event)
    tree.find_matches([1])
    found["removed"] = sum(len(document.hashes) for document in gone) / (time.perf_counter() - begun)
    begun = time.perf_counter()
    tree.remove_worker(held[-1].worker)
    tree.find_matches([1])
    found["removal"] = (time.perf_counter() - begun) * 1e3
    rng = Random(3)
    tokens = [rng.randrange(128_000) for _ in range(HASH_TOKENS)]
    found["hash"] = median_us([lambda: compute_block_hash_for_seq(tokens, HASH_BLOCK_TOKENS)] * REPEATS)
    print(json.dumps(found))


def _stored(parent: Sequence[int], hashes: Sequence[int]) -> bytes:
    """An event. The chained hash names a block alone as well: equal ones are equal in both senses here."""
    blocks = [{"block_hash": block, "tokens_hash": block} for block in hashes]
    data = {"parent_hash": parent[0] if parent else None, "blocks": blocks}
    return json.dumps({"event_id": 0, "dp_rank": 0, "data": {"stored": data}}).encode()


def _removed(hashes: Sequence[int]) -> bytes:
    return json.dumps({"event_id": 0, "dp_rank": 0, "data": {"removed": {"block_hashes": list(hashes)}}}).encode()
