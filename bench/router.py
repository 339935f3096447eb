"""What routing costs: a whole decision, each policy's part of it, and the index of prefixes beside NVIDIA Dynamo's.

A decision is what `serve.router` does for a request: the prompt's hashes, who holds how much of it, the policy `pairs`
over a tree of links, a second look at who was chosen, and the booking. Workers are single GPUs of hgx-h100 nodes, four
to a rack, half prefilling and half decoding, or all doing either; they tell KV events in blocks of 16 tokens. Prompts
are of 4,096 tokens: 1,024 that an eighth of the workers hold, 2,048 that two hold, the rest new. Time of decisions is
this thread's CPU time, the best of the rounds.

The index's rows are wall time, medians, in a process of their own. With `--dynamo PYTHON`, an interpreter that has
ai-dynamo-runtime (`pip install ai-dynamo-runtime==1.6.1` and what it imports), the same documents go into its RadixTree
in the same run; its events are JSON. An entry is a block on a worker.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import TypeAlias

from dynamo_index import (
    BLOCKS,
    EVENT_BLOCKS,
    HASH_BITS,
    HASH_BLOCK_TOKENS,
    HASH_TOKENS,
    REMOVED,
    REPEATS,
    SHARED,
    documents,
    median_us,
    questions,
    resident_bytes,
)
from report import Row, emit

from penstock import plugin
from penstock.blocks import KvLayout
from penstock.cluster import Load, Member, Role, Standing, StepPrices
from penstock.policy.prefix_index import Incarnation, PrefixIndex, prefix_hashes
from penstock.policy.routing import pairs
from penstock.policy.routing.api import Ask, Choice, Fleet, Route
from penstock.policy.routing.roster import Roster
from penstock.policy.routing.ways import Climber, Rung
from penstock.request import Request, Sampling
from penstock.tokens import pack
from penstock.topology.build import NODES, Domain, Nodes, build

LAYOUT = KvLayout(layers=80, kv_heads=8, head_dim=128, block_tokens=16, dtype="bfloat16")
BLOCKS_EACH = 30_000
PROMPT_TOKENS, COMMON_TOKENS, OWN_TOKENS = 4_096, 1_024, 2_048
PROMPTS = 200
GPUS_PER_RACK = 32
BETWEEN_S = 0.01  # decisions
STATES = ("idle", "half busy", "all queued", "links loaded")
SPLIT: tuple[Role, Role] = ("prefill", "decode")
EITHER: tuple[Role, Role] = ("any", "any")

P99_AIM_US = 1_000.0  # at up to a thousand workers
LOOKUP_AIM = 0.2  # of Dynamo's
LOOKUP_AIM_US = {SHARED: 4.8, BLOCKS: 15.6}  # the same without it: of what was measured on the machine of the docs
BYTES_AIM, STORED_AIM, REMOVAL_AIM_MS, HASH_AIM_US = 97.0, 1.6e6, 1.0, 49.0
DYNAMO = "Dynamo RadixTree"

Found: TypeAlias = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured."""

    workers: Sequence[int]
    entries: int  # of the index in the first table
    other_entries: Sequence[int]  # at a thousand workers
    decisions: int
    rounds: int
    index: Sequence[tuple[int, int]]  # entries and workers
    alone: Sequence[tuple[int, int]] = ()  # the same, without Dynamo


FULL = Effort(
    *((8, 64, 1_000, 4_000), 1_000_000, (10_000, 10_000_000), 1_000, 4),
    index=((10_000, 8), (1_000_000, 8), (1_000_000, 1_000)),
    alone=((10_000_000, 1_000),),
)
QUICK = Effort((8, 64, 1_000, 4_000), 10_000, (1_000_000,), 100, 1, index=((1_000_000, 1_000),))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    parser.add_argument("--quick", action="store_true", help="fewer decisions and entries, one round")
    parser.add_argument("--dynamo", metavar="PYTHON", help="an interpreter that has ai-dynamo-runtime")
    arguments = parser.parse_args()
    effort = QUICK if arguments.quick else FULL
    dynamo = arguments.dynamo or (sys.executable if importlib.util.find_spec("dynamo") else None)
    emit([*index_rows(effort, dynamo), *decision_rows(effort)], arguments.json)


# Whole decisions


def decision_rows(effort: Effort) -> list[Row]:
    rows = []
    for workers in effort.workers:
        for roles in (SPLIT, EITHER):
            cluster = Cluster(workers, roles, effort.entries)
            for state in STATES:
                rows += state_rows(cluster, state, effort)
            if roles == SPLIT:
                rows += policy_rows(cluster, effort)
    for entries in effort.other_entries:
        rows += state_rows(Cluster(1_000, SPLIT, entries), "half busy", effort)
    return rows


def state_rows(cluster: Cluster, state: str, effort: Effort) -> list[Row]:
    rounds = []
    for _ in range(effort.rounds):
        cluster.enter(state)
        rounds.append(cluster.decide(effort.decisions))
    p50, p99 = (min(found[at] for found in map(sorted, rounds)) for at in _places(effort.decisions))
    mean = min(statistics.mean(found) for found in rounds)
    aim = P99_AIM_US if cluster.workers <= 1_000 else None
    return [
        Row(f"{cluster}, {state}: p50", p50, "us"),
        Row(f"{cluster}, {state}: p99", p99, "us", aim=aim),
        Row(f"{cluster}, {state}: one after the other", 1e6 / mean, "decisions/s"),
    ]


def _places(count: int) -> tuple[int, int]:
    return count // 2, count * 99 // 100


class Racks:
    """The wiring of so many GPUs."""

    def __init__(self, gpus: int) -> None:
        nodes = Nodes(NODES["hgx-h100"], GPUS_PER_RACK // 8)
        racks = Domain("rack", (nodes,), count=-(-gpus // GPUS_PER_RACK), oversubscription=2)
        self._climber = Climber(build([racks]))

    def climb(self, device: str) -> Sequence[Rung]:
        return self._climber.climb((device,))


class Cluster:
    """A router's roster, and requests to decide on."""

    def __init__(self, workers: int, roles: tuple[Role, Role], entries: int) -> None:
        self.workers, self.roles, self.entries = workers, roles, entries
        self._rng = Random(1)
        self._members = _members(workers, roles)
        self.roster, self._now = Roster(Racks(workers)), 0.0
        self._report("idle")
        self.requests = self._fill()
        gc.freeze()  # else the collector walks through all of it once more, in the midst of a decision

    def __str__(self) -> str:
        roles = "" if self.roles == SPLIT else " of either kind"
        return f"{self.workers} workers{roles}, {self.entries:.0e} entries".replace("e+0", "e")

    def fleet(self) -> Fleet:
        return self.roster.fleet(self._now)

    def enter(self, state: str) -> None:
        """Everything that a decision finds ready after the first one is found."""
        self._report(state)
        if state == "links loaded":
            self._load_links()
        decide(self.roster, self.requests[0], pairs.route, self._rng, self._now)

    def _report(self, state: str) -> None:
        """Every worker does, twice, 10 s apart, so that rates are known."""
        for at_s in (1.0, 11.0):
            loads = [_load(state, number, at_s, self._rng) for number in range(self.workers)]
            standings = {m.worker: Standing(m, load) for m, load in zip(self._members, loads, strict=True)}
            self.roster.update(standings, self._now)

    def decide(self, decisions: int) -> list[float]:
        """Microseconds of CPU for each. A request is over when the next one comes."""
        taken = []
        for number in range(decisions):
            request = self.requests[number % PROMPTS]
            begun_ns = time.thread_time_ns()
            decide(self.roster, request, pairs.route, self._rng, self._now)
            taken.append((time.thread_time_ns() - begun_ns) / 1e3)
            self._now += BETWEEN_S
            self.roster.prefilled(request.id, self._now)
            self.roster.release(request.id, self._now)
        return taken

    def _fill(self) -> list[Request]:
        """The index, with what the requests' workers hold among its entries."""
        names = [(member.worker, member.epoch) for member in self._members]
        for name in names:
            self._index(name).tell(name, True)
        for document in documents(self.entries, self.workers):
            self._store(names[document.worker], document.hashes)
        common = _tokens(COMMON_TOKENS, self._rng)
        for name in names[::8]:
            self._store(name, prefix_hashes(common, LAYOUT.block_tokens))
        requests = []
        for number in range(PROMPTS):
            head = common + _tokens(OWN_TOKENS, self._rng)
            for name in self._rng.sample(names, 2):
                self._store(name, prefix_hashes(head, LAYOUT.block_tokens))
            prompt = head + _tokens(PROMPT_TOKENS - COMMON_TOKENS - OWN_TOKENS, self._rng)
            requests.append(Request(f"r{number}", "m", prompt, Sampling(256)))
        return requests

    def _store(self, worker: Incarnation, hashes: Sequence[int]) -> None:
        self._index(worker).stored(worker, hashes)

    def _index(self, worker: Incarnation) -> PrefixIndex:
        index = self.roster.index(worker)
        assert index is not None
        return index

    def _load_links(self) -> None:
        """Twice as many transfers under way as there are workers."""
        fleet = self.fleet()
        ask, found = self.roster.ask(self.requests[0])
        for number in range(2 * self.workers):
            prefill, decode = self._rng.choice(fleet.prefillers), self._rng.choice(fleet.decoders)
            choice = Choice(fleet.names[decode], (fleet.names[prefill],), 0.0)
            self.roster.book(f"under way {number}", ask, found, choice, self._now)


def decide(roster: Roster, request: Request, route: Route, rng: Random, now: float) -> Choice:
    """What a router does for a request."""
    fleet = roster.fleet(now)
    ask, found = roster.ask(request)
    choice = route(now, ask, fleet, rng)
    if roster.corrects(ask, found, choice):
        choice = route(now, ask, fleet, rng)
    roster.book(request.id, ask, found, choice, now)
    return choice


def _members(workers: int, roles: tuple[Role, Role]) -> list[Member]:
    places = [f"rack{n // 32}/node{n // 8 % 4}/gpu{n % 8}" for n in range(workers)]
    return [
        Member(
            *(f"w{number}", 1, roles[number % 2], "m", (), LAYOUT, BLOCKS_EACH, 100_000),
            domain="network",
            device=place,
            chunk_tokens=2_048,
            kv_events="call",
        )
        for number, place in enumerate(places)
    ]


def _load(state: str, number: int, at_s: float, rng: Random) -> Load:
    is_busy = state == "all queued" or (state != "idle" and rng.random() < 0.5)
    least = 200_000 if state == "all queued" else 0
    return Load(
        at_s=at_s,
        queued_tokens=is_busy * rng.randrange(least, least + 200_000),
        waiting=is_busy * rng.randrange(1, 8),
        running=is_busy * rng.randrange(64),
        blocks=BLOCKS_EACH,
        free_blocks=BLOCKS_EACH - is_busy * rng.randrange(BLOCKS_EACH),
        prefill_tokens_per_s=14_000.0,
        decode_step_s=0.02,
        step_prices=StepPrices((0.005, 7e-5, 1e-9, 5e-5, 1e-8)),
        prefills=is_busy * int(at_s),
        computed_tokens=is_busy * int(4_000 * at_s),
    )


def _tokens(count: int, rng: Random) -> bytes:
    return pack(rng.randrange(1 << 16) for _ in range(count))


# Each policy's part


def policy_rows(cluster: Cluster, effort: Effort) -> list[Row]:
    """Each policy's time, beside that of P-token in plain Python, given the tokens that each worker has cached."""
    cluster.enter("half busy")
    fleet, ask = cluster.fleet(), cluster.roster.ask(cluster.requests[0])[0]
    listed = [Plain(*facts) for facts in zip(fleet.names, fleet.queued_tokens, ask.cached_tokens, strict=True)]
    halves = [listed[column] for column in fleet.prefillers], [listed[column] for column in fleet.decoders]
    plain_us = least_us(lambda: plain_p_token(*halves), effort)
    return [
        Row(f"{cluster.workers} workers, {name}", policy_us(name, ask, fleet, effort), "us", "plain P-token", plain_us)
        for name in plugin.names("policy.routing")
    ]


def policy_us(name: str, ask: Ask, fleet: Fleet, effort: Effort) -> float:
    route: Route = plugin.find("policy.routing", name).ROUTING
    rng = Random(2)
    route(0.0, ask, fleet, rng)  # finds the paths, once for a fleet
    return least_us(lambda: route(0.0, ask, fleet, rng), effort)


def least_us(call: Callable[[], object], effort: Effort) -> float:
    """CPU time of this thread: the mean of many calls, in the best of the rounds."""
    means = []
    for _ in range(effort.rounds):
        begun_s = time.thread_time()
        for _ in range(effort.decisions):
            call()
        means.append((time.thread_time() - begun_s) / effort.decisions)
    return min(means) * 1e6


@dataclass(frozen=True, slots=True)
class Plain:
    """A worker as an object; streams do not matter to what is measured."""

    name: str
    queued_tokens: float
    cached_tokens: float


def plain_p_token(prefillers: Sequence[Plain], decoders: Sequence[Plain]) -> tuple[str, str]:
    prefill = min(prefillers, key=lambda worker: worker.queued_tokens + PROMPT_TOKENS - worker.cached_tokens)
    return prefill.name, min(decoders, key=lambda worker: worker.queued_tokens).name


# The index


def index_rows(effort: Effort, dynamo: str | None) -> list[Row]:
    rows = []
    for entries, workers in (*effort.index, *effort.alone):
        theirs = partial(of_dynamo, dynamo) if dynamo and (entries, workers) in effort.index else None
        ours_best, theirs_best = dict[str, float](), dict[str, float]()
        for _ in range(effort.rounds):  # in turns, as others may use the machine
            better(ours_best, in_a_process_of_its_own(entries, workers))
            if theirs is not None:
                better(theirs_best, theirs(entries, workers))
        rows += [*compared(f"{entries:.0e} entries, {workers} workers".replace("e+0", "e"), ours_best, theirs_best)]
    return rows


def compared(where: str, ours: Found, theirs: Found) -> list[Row]:
    def row(name: str, key: str, unit: str, aim_ratio: float, aim: float, more_is_better: bool = False) -> Row:
        reference = (DYNAMO, theirs[key]) if key in theirs else (None, None)
        limit = aim_ratio if key in theirs else aim
        return Row(f"{where}: {name}", ours[key], unit, *reference, limit, more_is_better)

    lookups = [
        row(f"lookup of {blocks} blocks", f"lookup {blocks}", "us", LOOKUP_AIM, LOOKUP_AIM_US[blocks])
        for blocks in (SHARED, BLOCKS)
    ]
    removal = Row(f"{where}: a worker leaves", ours["removal"], "ms", aim=REMOVAL_AIM_MS, aim_is_for_value=True)
    return [
        *lookups,
        row("memory of an entry", "bytes", "B", 1.0, BYTES_AIM),
        row("events that store 16 blocks", "stored", "blocks/s", 1.0, STORED_AIM, more_is_better=True),
        row("events that remove 16 blocks", "removed", "blocks/s", 1.0, STORED_AIM, more_is_better=True),
        removal,
        Row(f"{where}: the longest event while it is swept", ours["longest event"], "ms"),
        row("hashes of 4,096 tokens", "hash", "us", 1.0, HASH_AIM_US),
    ]


def better(best: dict[str, float], found: Found) -> None:
    for name, value in found.items():
        choose = max if name in ("stored", "removed") else min
        best[name] = choose(best.get(name, value), value)


def of_dynamo(python: str, entries: int, workers: int) -> Found:
    command = [python, "-c", "import dynamo_index; dynamo_index.main()", str(entries), str(workers)]
    answer = subprocess.run(command, cwd=Path(__file__).parent, check=True, capture_output=True, text=True).stdout
    found: dict[str, float] = json.loads(answer)
    return found


def in_a_process_of_its_own(entries: int, workers: int) -> Found:
    """So that memory starts afresh."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(index_costs, entries, workers).result()


def index_costs(entries: int, workers: int) -> Found:
    held, names = documents(entries, workers), [(f"w{number}", 1) for number in range(workers)]
    before, blocks = resident_bytes(), sum(len(document.hashes) for document in held)
    index = PrefixIndex()
    index.seat(names, [entries] * workers)
    stored_s = sum(told_s(index.stored, names[one.worker], one.hashes) for one in held)
    found = {"stored": blocks / stored_s, "bytes": (resident_bytes() - before) / blocks}
    for asked in (SHARED, BLOCKS):
        found[f"lookup {asked}"] = median_us([partial(index.longest, one) for one in questions(held, asked)])
    gone = held[:REMOVED]
    removed_s = sum(told_s(index.removed, names[one.worker], one.hashes[::-1]) for one in gone)
    found["removed"] = sum(len(one.hashes) for one in gone) / removed_s
    found["removal"], found["longest event"] = leave_ms(index, names, held[-1].worker)
    rng = Random(3)
    prompt = pack(rng.randrange(128_000) for _ in range(HASH_TOKENS))
    found["hash"] = median_us([lambda: prefix_hashes(prompt, HASH_BLOCK_TOKENS)] * REPEATS)
    return found


def told_s(tell: Callable[[Incarnation, Sequence[int]], None], worker: Incarnation, hashes: Sequence[int]) -> float:
    """All of `hashes`, event by event: wall time."""
    total_s = 0.0
    for start in range(0, len(hashes), EVENT_BLOCKS):
        event = list(hashes[start : start + EVENT_BLOCKS])
        begun_s = time.perf_counter()
        tell(worker, event)
        total_s += time.perf_counter() - begun_s
    return total_s


def leave_ms(index: PrefixIndex, names: Sequence[Incarnation], leaver: int) -> tuple[float, float]:
    """Wall time of a worker's leaving, and CPU time of the longest event until its entries are swept."""
    left = [*names[:leaver], *names[leaver + 1 :]]
    begun_s = time.perf_counter()
    index.seat(left, [0] * len(left))
    left_ms = (time.perf_counter() - begun_s) * 1e3
    rng, longest_ns = Random(4), 0
    while index.is_sweeping:
        hashes = [rng.getrandbits(HASH_BITS) for _ in range(EVENT_BLOCKS)]
        begun_ns = time.thread_time_ns()
        index.stored(left[0], hashes)
        longest_ns = max(longest_ns, time.thread_time_ns() - begun_ns)
    return left_ms, longest_ns / 1e6


if __name__ == "__main__":
    main()
