"""The default policy: the cheapest pair, in reach, and (D, D) where that is cheapest."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.cluster import Role
from penstock.policy.routing import is_worth_asking
from penstock.policy.routing.api import (
    EXPECTED_OUTPUT_TOKENS,
    PRIOR_TOKENS_PER_S,
    SATURATED_STREAMS,
    Ask,
    Choice,
    Fleet,
    Floats,
)
from penstock.policy.routing.meeting import HANDOVER_S, Moves
from penstock.policy.routing.pairs import MOST_BUSY, TIE_S, route
from penstock.policy.routing.ways import Wiring
from tests.policy.routing.fleets import Rows, Worker, ask_of, fleet_of, some_workers
from tests.policy.routing.test_policies import decoders_of, prefillers_of, reaches

P = Worker("p", "prefill")
D = Worker("d", "decode")
LONG, SHORT = 2_000, 2


def choose(prompt_tokens: int, workers: Sequence[Worker], seed: int = 1, wiring: Wiring | None = None) -> Choice:
    return route(0.0, ask_of(workers, prompt_tokens), fleet_of(workers, wiring), Random(seed))


def test_a_long_prompt_is_prefilled_elsewhere_and_a_short_one_at_home() -> None:
    choice = choose(LONG, [P, D])
    assert (choice.decode, choice.prefill) == ("d", ("p",))
    assert "p prefills for d" in choice.why
    assert choose(SHORT, [P, D]).prefill == ()


def test_a_queue_at_the_prefill_worker_sends_the_prompt_home() -> None:
    busy = replace(P, queued=100_000)
    assert choose(LONG, [busy, D]).prefill == ()
    behind = choose(LONG, [busy, replace(D, running=100)])
    assert behind.prefill == ("p",)
    assert behind.wait_s == 100_000 / PRIOR_TOKENS_PER_S


def test_a_cached_prompt_stays_where_it_is() -> None:
    assert choose(LONG, [P, replace(D, cached=1_999)]).prefill == ()
    holder = replace(D, name="e", cached=1_999)
    assert choose(LONG, [P, D, holder]).decode == "e"


def test_a_worker_in_another_memory_prefills_for_itself() -> None:
    assert choose(LONG, [replace(P, memory="elsewhere"), D]).prefill == ()
    assert choose(LONG, [replace(P, memory=""), replace(D, memory="")]).prefill == ()


def test_over_a_network_the_way_is_part_of_the_price() -> None:
    near, far = (replace(P, name=name, memory="", domain="net") for name in ("e", "z"))
    decode = replace(D, memory="", domain="net")
    assert choose(LONG, [far, near, decode], wiring=Rows()).prefill == ("e", "z")


def test_roles_are_preferences() -> None:
    assert choose(LONG, [P]).decode == "p"
    assert choose(LONG, [replace(D, name="a"), D]).decode in ("a", "d")


def test_alternatives_come_in_order_of_price() -> None:
    slow, slower = replace(P, name="q", queued=500), replace(P, name="r", queued=900)
    assert choose(LONG, [slower, P, slow, D]).prefill == ("p", "q", "r")


def test_large_fleets_are_paired_among_the_most_promising() -> None:
    prefill = [replace(P, name=f"p{i}", queued=10 * i) for i in reversed(range(100))]
    decode = [replace(D, name=f"d{i}", running=i) for i in reversed(range(100))]
    choice = choose(LONG, [*prefill, *decode])
    assert (choice.decode, choice.prefill) == ("d0", ("p0", "p1", "p2"))


class Plain:
    """The price of a pair, written down once more: for one pair at a time, in plain numbers."""

    def __init__(self, ask: Ask, fleet: Fleet) -> None:
        self.ask, self.fleet = ask, fleet
        decodes = [bool(fleet.prefers_decode[w] or not fleet.prefers_prefill[w]) for w in range(len(fleet.names))]
        self.alike = [[other for other, does in enumerate(decodes) if does == mine] for mine in decodes]

    def mean(self, column: Floats, worker: int) -> float:
        return sum(float(column[other]) for other in self.alike[worker]) / len(self.alike[worker])

    def prefill_s(self, worker: int, cached: float) -> float:
        fleet = self.fleet
        tokens, wait_s = self.ask.prompt_tokens - cached, float(fleet.wait_s[worker])
        token_s, pair_s = fleet.prices[:2, worker].tolist()
        work_s = tokens / float(fleet.prefill_tokens_per_s[worker])
        if token_s:
            work_s = token_s * tokens + pair_s * tokens * (cached + tokens / 2)
        busy = min(self.mean(fleet.busy_share, worker), MOST_BUSY)
        others_s = self.mean(fleet.arrivals_per_s, worker) / (1 - busy) * work_s * (wait_s + work_s / 2)
        delayed = self.mean(fleet.streams, worker) + bool(fleet.prefers_decode[worker])
        return wait_s + work_s + others_s + work_s * delayed

    def decode_s(self, worker: int) -> float:
        fleet, steps = self.fleet, min(self.ask.max_tokens, EXPECTED_OUTPUT_TOKENS)
        streams, held = float(fleet.streams[worker]), float(fleet.used_blocks[worker] * fleet.block_tokens[worker])
        sequence_s, read_s = fleet.prices[2:, worker].tolist()
        mine = steps * (sequence_s * streams + read_s * held)
        theirs = steps * streams * (sequence_s + read_s * self.ask.prompt_tokens)
        step_s = float(fleet.decode_step_s[worker])
        if not sequence_s:
            mine, theirs = steps / SATURATED_STREAMS * step_s * streams, 0.0
        used = float(fleet.used_blocks[worker])
        needed = (self.ask.prompt_tokens + steps) / float(fleet.block_tokens[worker])
        lacking = max(0.0, needed - (float(fleet.blocks[worker]) - used))
        return mine + theirs + lacking / max(1.0, used) * steps * step_s

    def move_s(self, source: int, target: int, loads: Mapping[Hashable, float]) -> float:
        ask, fleet, tree = self.ask, self.fleet, Rows()
        ups, downs = tree.climb(fleet.names[source]), tree.climb(fleet.names[target])
        level = next(level for level in range(2) if ups[level].domain == downs[level].domain)
        steps = [(ups[i].up_s, ("up", ups[i].up_gate)) for i in range(level + 1)]
        steps += [(downs[i].down_s, ("down", downs[i].down_gate)) for i in range(level + 1)]
        shares = [min(0.9, idle_s * loads.get(gate, 0.0)) for idle_s, gate in steps]
        byte_s = max(idle_s / (1 - busy) for (idle_s, _), busy in zip(steps, shares, strict=True))
        others_s = sum(idle_s * busy / (1 - busy) for (idle_s, _), busy in zip(steps, shares, strict=True))
        lacking = (ask.prompt_tokens - float(ask.cached_tokens[target])) * ask.token_bytes
        computed = ask.prompt_tokens - float(ask.cached_tokens[source])
        step = min(computed, float(fleet.chunk_tokens[source]))
        hidden_s = float(fleet.prompt_s(computed, ask.prompt_tokens - computed)[source]) * (1 - step / computed)
        waited_s = max(byte_s * min(lacking, step * ask.token_bytes), byte_s * lacking - hidden_s)
        return waited_s + lacking * others_s + ups[level].latency_s + downs[level].latency_s + HANDOVER_S


@settings(max_examples=300, deadline=None)
@given(some_workers(), st.integers(1, 10_000), st.integers(0, 2**32))
def test_the_choice_is_the_cheapest_admissible_pair(workers: list[Worker], prompt: int, seed: int) -> None:
    rng = Random(seed)
    fleet, ask = fleet_of(workers, Rows()), ask_of(workers, prompt)
    if rng.random() < 0.7:
        fleet.prices[:] = [[rng.choice([1e-5, 1e-4]) * scale for _ in workers] for scale in (1, 1e-4, 1, 1e-3)]
    fleet.arrivals_per_s[:] = [rng.choice([0.0, 0.5, 5.0]) for _ in workers]
    fleet.busy_share[:] = [rng.choice([0.0, 0.6, 1.2]) for _ in workers]
    fleet.chunk_tokens[:] = [rng.choice([256.0, 8192.0]) for _ in workers]
    loads = carry_some(fleet, rng)
    plain = Plain(ask, fleet)
    names, by_name = list(fleet.names), {worker.name: worker for worker in workers}
    prices = {}
    for decode in decoders_of(workers):
        for prefill in [decode, *prefillers_of(workers)]:
            p, d = names.index(prefill.name), names.index(decode.name)
            cached = float(ask.cached_tokens[d])
            if p == d:
                cost = plain.prefill_s(d, cached)
            elif prefill.memory and prefill.memory == decode.memory:
                cost = plain.prefill_s(p, cached) + HANDOVER_S
            elif reaches(prefill, decode) and fleet.is_split:
                cost = plain.prefill_s(p, float(ask.cached_tokens[p])) + plain.move_s(p, d, loads)
            else:
                continue
            prices[p, d] = cost + plain.decode_s(d)
    choice = route(0.0, ask, fleet, rng)
    chosen = names.index((*choice.prefill, choice.decode)[0]), names.index(choice.decode)
    assert min(prices.values()) <= prices[chosen] + 1e-9
    assert prices[chosen] <= min(prices.values()) * (1 + 1e-9) + 2 * TIE_S
    assert choice.cost == pytest.approx(prices[chosen], abs=2 * TIE_S)
    assert sum(choice.parts.values()) == pytest.approx(choice.cost)
    assert all(seconds >= -1e-9 for seconds in choice.parts.values())
    assert by_name[choice.decode] in decoders_of(workers)


def carry_some(fleet: Fleet, rng: Random) -> Mapping[Hashable, float]:
    """Books transfers between some workers; bytes per second by direction and gate."""
    loads: dict[Hashable, float] = {}
    for _ in range(rng.randrange(6)):
        source, target = rng.randrange(len(fleet.names)), rng.randrange(len(fleet.names))
        if fleet.network[source] < 0 or fleet.network[source] != fleet.network[target] or source == target:
            continue
        fleet.ways.carry(source, target, 1e8)
        ups, downs = Rows().climb(fleet.names[source]), Rows().climb(fleet.names[target])
        level = next(level for level in range(2) if ups[level].domain == downs[level].domain)
        for i in range(level + 1):
            for gate in (("up", ups[i].up_gate), ("down", downs[i].down_gate)):
                loads[gate] = loads.get(gate, 0.0) + 1e8
    return loads


@pytest.mark.parametrize("seed", range(40))
def test_bounds_leave_out_no_pair_that_is_cheaper(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(20, 300))
    roles: list[Role] = [str(role) for role in rng.choice(["prefill", "decode", "any"], count)]  # type: ignore[misc]
    workers = [
        Worker(f"{'abcdefghijkl'[rng.integers(12)]}{number}", role, memory="", domain="net", cached=int(tokens))
        for number, (role, tokens) in enumerate(zip(roles, rng.choice([0, 0, 0, 4_000], count), strict=True))
    ]
    fleet, ask = fleet_of(workers, Rows()), ask_of(workers, int(rng.integers(1, 20_000)))
    fleet.chunk_tokens[:] = rng.choice([512.0, 1e6], count)
    for _ in range(int(rng.integers(0, 40))):
        fleet.ways.carry(*rng.integers(0, count, 2).tolist(), float(rng.exponential(5e7)))
    prefill_s, decode_s = (rng.exponential(rng.choice([1e-3, 1.0]), count) for _ in range(2))
    moves = Moves.of(
        *(ask.uncached_tokens, ask.token_bytes, fleet.chunk_tokens),
        fleet.prompt_s(ask.uncached_tokens, ask.cached_tokens),
    )
    every = {
        (int(prefill), int(decode)): float(prefill_s[prefill] + decode_s[decode] + seconds)
        for decode in fleet.decoders
        for prefill, seconds in zip(
            fleet.prefillers, moves.seconds(fleet.ways, fleet.prefillers, int(decode)), strict=True
        )
        if prefill != decode
    }
    found = fleet.meeting.cheapest(prefill_s, decode_s, moves, math.inf)
    assert found is not None
    prefill, decode, cost = found
    assert cost == pytest.approx(min(every.values()), rel=1e-12)
    assert every[prefill, decode] == pytest.approx(cost, rel=1e-12)
    assert fleet.meeting.cheapest(prefill_s, decode_s, moves, cost) is None


def test_ties_are_spread() -> None:
    roles: list[Role] = ["prefill", "decode"]
    workers = [Worker(f"{role}-{number}", role) for role in roles for number in range(4)]
    choices = [choose(LONG, workers, seed) for seed in range(200)]
    assert len({(choice.prefill[0], choice.decode) for choice in choices}) == 16


def test_a_decode_worker_keeps_what_its_cache_nearly_holds() -> None:
    assert not is_worth_asking(1, 1, streams=0, own_tokens_per_s=2_000, wait_s=0)
    assert is_worth_asking(500, 500, streams=0, own_tokens_per_s=2_000, wait_s=0)
    assert not is_worth_asking(500, 500, streams=0, own_tokens_per_s=2_000, wait_s=1)
    assert is_worth_asking(500, 500, streams=8, own_tokens_per_s=2_000, wait_s=1)
    assert not is_worth_asking(500, 5_000, streams=0, own_tokens_per_s=2_000, wait_s=0)
