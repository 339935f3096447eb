"""The cheapest pair of workers. Every candidate is priced in seconds; the default policy.

A pair (P, D) costs, for this request: the wait at P, the prefill of what P lacks, and what the transfer of what D lacks
takes longer than the computing it hides behind. And it costs others: those who come to P while it computes this, the
streams that decode where prompts are computed, those that share the links, and those that share D's steps. (D, D),
where D prefills for itself, is one of the pairs, so aggregated and disaggregated serving are one decision.

    those to come     l / (1 - r) * s * (w + s/2)   s of work added to a queue of w, to which l prompts come a second
                      and which is busy for a share r of the time, delay them until it would have been empty: the
                      fluid limit of an M/G/1 queue. l and r are means over all workers of a kind, since those to
                      come choose as well.
    interference      s for each stream of a worker of that kind in the mean: whoever computes a prompt delays some
    links             see `ways`
    decoding          steps are linear in streams and cached tokens: this one's steps are longer by what is there, and
                      theirs by what this one brings; where blocks run out, the time until enough are free

Prices of steps and rates come from the workers' own reports.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from random import Random
from typing import Literal, get_args

import numpy as np

from penstock.policy.routing.api import (
    ALTERNATIVES,
    EXPECTED_OUTPUT_TOKENS,
    PRIOR_TOKENS_PER_S,
    Ask,
    Choice,
    Fleet,
    Floats,
    Indices,
    Route,
    decode_s,
)
from penstock.policy.routing.meeting import HANDOVER_S, Moves

MOST_BUSY = 0.95  # a queue counts as no busier
TIE_S = 0.001  # what is so close is the same: drawn, so that routers do not all choose the same

_noise = np.random.default_rng(0).random(1 << 16) * TIE_S


Term = Literal["later prompts", "delayed streams", "decoding", "links", "handing over", "prefilling at home"]
TERMS: tuple[Term, ...] = get_args(Term)


def route(now: float, ask: Ask, fleet: Fleet, rng: Random) -> Choice:
    """The cheapest pair of all."""
    return _cheapest(ask, fleet, rng)


def without(term: Term) -> Route:
    """The same with one term left out of the price, or some of the pairs, to see what they are worth."""

    def route(now: float, ask: Ask, fleet: Fleet, rng: Random) -> Choice:
        return _cheapest(ask, fleet, rng, term)

    return route


def _cheapest(ask: Ask, fleet: Fleet, rng: Random, left_out: Term | None = None) -> Choice:
    costs = Costs.of(ask, fleet, rng, left_out)
    itself = int(fleet.decoders[np.argmin(costs.alone_s[fleet.decoders])])
    best_s, pair = float(costs.alone_s[itself]), (itself, itself)
    if left_out == "prefilling at home" and fleet.is_split:
        best_s = math.inf
    others = () if left_out == "handing over" else (*_in_place(fleet, costs), *_over_links(fleet, costs, best_s))
    for prefill, decode, cost in others:
        if cost < best_s:
            best_s, pair = cost, (prefill, decode)
    return _describe(fleet, costs, *pair)


@dataclass(frozen=True, slots=True, eq=False)
class Costs:
    """Of one request at each worker, in seconds; a column each."""

    ask: Ask
    tie_s: Floats  # drawn; part of `prefill_s`
    pressure: Floats  # prompts that come per second of a worker's idle time
    delayed: Floats  # streams that wait while a prompt is computed
    prefill_s: Floats  # all of it, after what the worker itself has cached
    decode_s: Floats
    alone_s: Floats  # doing both
    moves: Moves

    @classmethod
    def of(cls, ask: Ask, fleet: Fleet, rng: Random, left_out: Term | None) -> Costs:
        decode_tie_s, tie_s = _ties_for(len(fleet.names), rng)
        busy = np.minimum(_by_kind(fleet, fleet.busy_share), MOST_BUSY)
        pressure = _by_kind(fleet, fleet.arrivals_per_s) / (1 - busy)
        delayed = _by_kind(fleet, fleet.streams) + fleet.prefers_decode  # this one, or who comes meanwhile
        if left_out == "later prompts":
            pressure *= 0
        if left_out == "delayed streams":
            delayed *= 0
        compute_s = fleet.prompt_s(ask.uncached_tokens, ask.cached_tokens) + ask.restore_s
        prefill_s = fleet.wait_s + tie_s + compute_s * (1 + pressure * (fleet.wait_s + compute_s / 2) + delayed)
        decoding_s = (_decoding_s(ask, fleet) if left_out != "decoding" else 0.0) + decode_tie_s
        moves = Moves.of(
            ask.uncached_tokens, ask.token_bytes, fleet.chunk_tokens, compute_s, counts_others=left_out != "links"
        )
        return cls(ask, tie_s, pressure, delayed, prefill_s, decoding_s, prefill_s + decoding_s, moves)

    def elsewhere_s(self, fleet: Fleet, prefill: int | Indices, cached: Floats) -> Floats:
        """What `prefill_s` would be of workers that compute after what others have cached."""
        compute_s, wait_s = fleet.prompt_s_at(prefill, self.ask.prompt_tokens - cached, cached), fleet.wait_s[prefill]
        others = self.pressure[prefill] * (wait_s + compute_s / 2) + self.delayed[prefill]
        total: Floats = wait_s + self.tie_s[prefill] + compute_s * (1 + others)
        return total

    def parts(self, fleet: Fleet, prefill: int, decode: int, cost: float) -> dict[str, float]:
        """What the price of a pair is the sum of; "transfer" is what is left, the hand-over included."""
        holder = decode if fleet.shares_memory(prefill, decode) else prefill
        cached, wait_s = float(self.ask.cached_tokens[holder]), float(fleet.wait_s[prefill])
        compute_s = float(fleet.prompt_s_at(prefill, self.ask.prompt_tokens - cached, cached))
        found = {
            "wait": wait_s + float(self.tie_s[prefill]),
            "prefill": compute_s + (float(self.ask.restore_s[prefill]) if holder == prefill else 0.0),
            "later prompts": float(self.pressure[prefill]) * compute_s * (wait_s + compute_s / 2),
            "delayed streams": float(self.delayed[prefill]) * compute_s,
            "decoding": float(self.decode_s[decode]),
        }
        return found if prefill == decode else {**found, "transfer": cost - sum(found.values())}


def is_worth_asking(here_tokens: int, there_tokens: int, streams: int, own_tokens_per_s: float, wait_s: float) -> bool:
    """Whether a decode worker that has looked into its cache should have a prompt computed elsewhere.

    It would have to compute `here_tokens`, beside `streams` others; a prefill worker, taken to be as fast, would have
    to compute `there_tokens` after `wait_s`.
    """
    rate = own_tokens_per_s or PRIOR_TOKENS_PER_S
    return wait_s + HANDOVER_S + there_tokens / rate < (streams + 2) * here_tokens / rate


def _in_place(fleet: Fleet, costs: Costs) -> Iterable[tuple[int, int, float]]:
    """The cheapest pair of each memory whose workers compute in each other's blocks: after what D has cached."""
    for prefillers, decoders in fleet.meeting.memories:
        rows = costs.elsewhere_s(fleet, prefillers[:, None], costs.ask.cached_tokens[decoders][None, :])
        rows += HANDOVER_S + costs.decode_s[decoders][None, :]
        rows[prefillers[:, None] == decoders[None, :]] = np.inf
        row, column = divmod(int(rows.argmin()), decoders.size)
        yield int(prefillers[row]), int(decoders[column]), float(rows[row, column])


def _over_links(fleet: Fleet, costs: Costs, below_s: float) -> Iterable[tuple[int, int, float]]:
    """The cheapest pair that moves KV. Where all do both it gains nothing, but copies: see bench/routing_quality.py."""
    if not fleet.is_split:
        return ()
    found = fleet.meeting.cheapest(costs.prefill_s, costs.decode_s, costs.moves, below_s)
    return () if found is None else (found,)


def _decoding_s(ask: Ask, fleet: Fleet) -> Floats:
    """What this stream's steps take longer on each worker for those who are there, and theirs for this one."""
    steps = min(ask.max_tokens, EXPECTED_OUTPUT_TOKENS)
    sequence_s, read_s = fleet.prices[2:]
    held_tokens = fleet.used_blocks * fleet.block_tokens
    shared_s = steps * (
        sequence_s * fleet.streams + read_s * held_tokens + fleet.streams * (sequence_s + read_s * ask.prompt_tokens)
    )
    lacking = np.maximum(0.0, (ask.prompt_tokens + steps) / fleet.block_tokens - (fleet.blocks - fleet.used_blocks))
    ends_s = steps * fleet.decode_step_s  # until as many blocks were freed as are held
    room_s = lacking / np.maximum(1.0, fleet.used_blocks) * ends_s
    return np.where(sequence_s > 0, shared_s, decode_s(ask, fleet)) + room_s


def _ties_for(workers: int, rng: Random) -> Floats:
    """[2, workers], up to `TIE_S`."""
    start = rng.randrange(max(1, _noise.size - 2 * workers))
    return np.resize(_noise[start : start + 2 * workers], (2, workers))


def _by_kind(fleet: Fleet, column: Floats) -> Floats:
    """Means over those who only prefill, and over all others."""
    means = np.empty_like(column)
    for kind in fleet.meeting.kinds:
        if kind.size:
            means[kind] = np.add.reduce(column.take(kind)) / kind.size  # what `mean` does, in a third of the time
    return means


def _describe(fleet: Fleet, costs: Costs, prefill: int, decode: int) -> Choice:
    itself_s, name = float(costs.alone_s[decode]), fleet.names[decode]
    if prefill == decode:
        parts = costs.parts(fleet, decode, decode, itself_s)
        return Choice(name, (), itself_s, 0.0, f"pairs: {name} prefills for itself: {itself_s:.4f} s", parts)
    able = fleet.reaching(decode)
    prices = _prices_for(fleet, costs, able, decode)
    cost, others = float(prices[able == prefill][0]), list[tuple[str, float]]()
    left_s = np.where(able == prefill, np.inf, prices)
    for _ in range(min(ALTERNATIVES, able.size) - 1):
        row = int(left_s.argmin())
        others.append((fleet.names[able[row]], float(left_s[row])))
        left_s[row] = np.inf
    names = (fleet.names[prefill], *(other for other, _ in others))
    why = f"pairs: {names[0]} prefills for {name}: {cost:.4f} s, against {itself_s:.4f} s by itself"
    runners_up = (*((name, other, price) for other, price in others), (name, "", itself_s))
    wait_s = float(fleet.wait_s[prefill])
    return Choice(name, names, cost, wait_s, why, costs.parts(fleet, prefill, decode, cost), runners_up)


def _prices_for(fleet: Fleet, costs: Costs, prefillers: Indices, decode: int) -> Floats:
    """Of `prefillers`, all of which reach `decode`."""
    cached = costs.ask.cached_tokens[decode]
    prices: Floats = costs.elsewhere_s(fleet, prefillers, cached) + HANDOVER_S
    shares = (fleet.memory[prefillers] == fleet.memory[decode]) & (fleet.memory[decode] >= 0)
    if not shares.all():
        moved = costs.prefill_s[prefillers] + costs.moves.seconds(fleet.ways, prefillers, decode)
        prices = np.where(shares, prices, moved)
    prices += costs.decode_s[decode]
    return prices


ROUTING = route
