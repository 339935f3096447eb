"""What a routing policy is: a pure function of the time, a request, the fleet and a seed, in a file of its own.

    def route(now: float, ask: Ask, fleet: Fleet, rng: Random) -> Choice:
        return handing_over("shortest", fleet, fleet.prefills, fleet.streams, rng)

    ROUTING = route

`--policy` finds it by the name of its file. Fleets can be large: work on whole columns, not on worker after worker.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from penstock.policy.routing.meeting import HANDOVER_S, Meeting
from penstock.policy.routing.ways import Ways

Floats: TypeAlias = npt.NDArray[np.float64]
Indices: TypeAlias = npt.NDArray[np.intp]
Mask: TypeAlias = npt.NDArray[np.bool_]

PRIOR_TOKENS_PER_S = 2_000.0  # of prompts, until anybody has measured anything
EXPECTED_OUTPUT_TOKENS = 128
SATURATED_STREAMS = 32  # a decode step's time doubles about here
ALTERNATIVES = 3  # prefill workers that a choice names at most


@dataclass(frozen=True, slots=True, eq=False)
class Ask:
    """What a request wants, as far as routing cares.

    `number` counts what was routed before it, second attempts included. `cached_tokens` has for each worker how much
    of the prompt's beginning it is believed to hold; always less than the prompt. `restore_s` is how long it takes to
    bring there what of that lies in host memory or below.
    """

    number: int
    prompt_tokens: int
    max_tokens: int
    token_bytes: int  # of KV
    cached_tokens: Floats
    restore_s: Floats

    @property
    def uncached_tokens(self) -> Floats:
        """What each worker would have to compute, at least 1."""
        return self.prompt_tokens - self.cached_tokens


@dataclass(frozen=True, slots=True)
class Choice:
    """`prefill` is whom the decode worker should call, best first; empty: itself.

    `cost` is what the policy made small, in a unit of its own. `wait_s` is how long the first prefill worker is busy
    with others, 0 where the policy does not say: the decode worker weighs it against doing the work itself. `parts` are
    what `cost` is the sum of, by name and in seconds, and `others` the runners-up as (decode, prefill or "", cost):
    empty where the policy does not price in parts.
    """

    decode: str
    prefill: tuple[str, ...]
    cost: float
    wait_s: float = 0.0
    why: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)
    others: tuple[tuple[str, str, float], ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Path:
    """From one worker to each: seconds to hand over no KV at all, infinite where it cannot be; and per byte."""

    start_s: Floats
    byte_s: Floats


@dataclass(frozen=True, slots=True, eq=False)
class Fleet:
    """The workers of one model that take requests: one entry each in every column, in the order of `names`.

    Columns belong to the router, which keeps them up to date: a policy only reads them. Load is what the worker
    reported, or what this router has sent there, where that is more; waits are as of now, see `policy.ledger`.
    `decoders` and `prefillers` are positions of those to choose from: who prefers that role, or everybody where nobody
    does. A prefiller reaches some decoder.
    """

    names: Sequence[str]
    prefers_prefill: Mask
    prefers_decode: Mask
    memory: Indices  # equal: they compute in each other's KV blocks in place; -1: alone
    network: Indices  # equal: they can send KV to each other; -1: alone
    wait_s: Floats  # until the prompts that are queued there are computed
    queued_tokens: Floats  # that many at `prefill_tokens_per_s`
    prefills: Floats  # requests whose prompts are to be computed there
    streams: Floats  # requests that will decode or do decode there
    used_blocks: Floats
    blocks: Floats
    block_tokens: Floats
    prefill_tokens_per_s: Floats  # of those that have not measured it: the mean of the others
    decode_step_s: Floats
    # [4, workers]: seconds of a step for a prompt token, for a pair of one and a token before it, for a sequence that
    # decodes, and for a cached token that it reads; 0: unknown
    prices: Floats
    arrivals_per_s: Floats  # prompts that were computed there, lately
    busy_share: Floats  # of the time, with prompts, lately
    chunk_tokens: Floats  # of a prompt, computed in one step at most
    outgoing_bytes: Floats  # of transfers that are decided and not yet over
    incoming_bytes: Floats
    ways: Ways
    decoders: Indices = field(default_factory=lambda: np.empty(0, np.intp))
    prefillers: Indices = field(default_factory=lambda: np.empty(0, np.intp))
    is_split: bool = False  # some prefill for others; else every request stays on one of `decoders`
    usable: Mask = field(default_factory=lambda: np.empty(0, np.bool_))  # what `only` was called with
    _meeting: Meeting | None = None
    _paths: dict[int, Path] = field(default_factory=dict)  # rows that were asked for; masked copies share them

    def only(self, usable: Mask) -> Fleet:
        """The same columns with only `usable` workers to choose from."""
        decoders = _preferring(self.prefers_decode, usable)
        prefillers = _preferring(self.prefers_prefill, usable)
        prefillers = prefillers[self._helps(prefillers, decoders)]
        is_split = prefillers.size > 0 and not np.array_equal(prefillers, decoders)
        chosen = replace(self, decoders=decoders, prefillers=prefillers, is_split=is_split, usable=usable)
        only_prefill = self.prefers_prefill & ~self.prefers_decode
        return replace(chosen, _meeting=Meeting(self.ways, self.memory, only_prefill, prefillers, decoders))

    @property
    def meeting(self) -> Meeting:
        """Which of those to choose from meet where; `only` finds it."""
        assert self._meeting is not None
        return self._meeting

    def prompt_s(self, tokens: Floats | float, context: Floats | float) -> Floats:
        """Seconds that each worker takes to compute `tokens` of a prompt after `context` that are cached."""
        return self.prompt_s_at(slice(None), tokens, context)

    def prompt_s_at(self, workers: int | Indices | slice, tokens: Floats | float, context: Floats | float) -> Floats:
        """The same for some of them."""
        token_s, pair_s = self.prices[0, workers], self.prices[1, workers]
        exact = token_s * tokens + pair_s * (tokens * (context + np.multiply(tokens, 0.5)))
        return np.where(token_s > 0, exact, tokens / self.prefill_tokens_per_s[workers])

    def shares_memory(self, one: int, other: int) -> bool:
        """Whether they compute in each other's blocks."""
        return bool(self.memory[one] >= 0 and self.memory[one] == self.memory[other])

    def path(self, source: int) -> Path:
        """Prices of a hand-over from `source` to each worker; nothing is moved inside a memory."""
        if (path := self._paths.get(source)) is None:
            path = self._paths[source] = self._find_path(source)
        return path

    def reached_from(self, prefill: int) -> Indices:
        """The decoders that `prefill` can compute for: at least one, if it is one of `prefillers`."""
        reached = self._reached(prefill)
        reached[prefill] = True
        return self.decoders[reached[self.decoders]]

    def reaching(self, decode: int) -> Indices:
        """The prefillers that can compute for `decode`, without itself."""
        reached = self._reached(decode)
        reached[decode] = False
        return self.prefillers[reached[self.prefillers]]

    def _reached(self, worker: int) -> Mask:
        return _alike(self.memory, worker) | _alike(self.network, worker)

    def _helps(self, prefillers: Indices, decoders: Indices) -> Mask:
        helped = np.isin(prefillers, decoders)
        for domains in (self.memory, self.network):
            helped |= (domains[prefillers] >= 0) & np.isin(domains[prefillers], domains[decoders])
        return helped

    def _find_path(self, source: int) -> Path:
        start_s, byte_s = self.ways.row(source)
        in_place = _alike(self.memory, source)
        in_place[source] = True
        start_s[in_place], byte_s[in_place] = 0.0, 0.0
        return Path(start_s + HANDOVER_S, byte_s)


Route: TypeAlias = Callable[[float, Ask, Fleet, Random], Choice]


def least(costs: Floats, among: Indices, rng: Random) -> int:
    """Which of `among` costs least; equals are spread by `rng`."""
    chosen = costs[among]
    ties = np.flatnonzero(chosen == chosen.min())
    return int(among[ties[rng.randrange(ties.size) if ties.size > 1 else 0]])


def alone(policy: str, fleet: Fleet, costs: Floats, rng: Random) -> Choice:
    """The decoder that costs least does all of it."""
    return staying(policy, fleet, least(costs, fleet.decoders, rng), costs)


def handing_over(policy: str, fleet: Fleet, prefill_costs: Floats, decode_costs: Floats, rng: Random) -> Choice:
    """The prefiller that costs least, then the decoder that costs least of those it reaches."""
    prefill = least(prefill_costs, fleet.prefillers, rng)
    decode = least(decode_costs, fleet.reached_from(prefill), rng)
    return between(policy, fleet, prefill, decode, prefill_costs, rng)


def staying(policy: str, fleet: Fleet, worker: int, costs: Floats) -> Choice:
    """`worker` does all of it."""
    name, cost = fleet.names[worker], float(costs[worker])
    return Choice(name, (), cost, why=f"{policy}: all on {name}, at {cost:.4g}")


def between(policy: str, fleet: Fleet, prefill: int, decode: int, prefill_costs: Floats, rng: Random) -> Choice:
    """`prefill` computes for `decode`; whoever costs least of the others that could is named after it."""
    if prefill == decode:
        return staying(policy, fleet, decode, prefill_costs)
    others = cheapest(prefill_costs, fleet.reaching(decode), rng, ALTERNATIVES, first=prefill)
    names, cost = [fleet.names[worker] for worker in others], float(prefill_costs[prefill])
    why = f"{policy}: {names[0]}, at {cost:.4g}, prefills for {fleet.names[decode]}"
    return Choice(fleet.names[decode], tuple(names), cost, why=why)


def cheapest(costs: Floats, among: Indices, rng: Random, count: int, first: int) -> list[int]:
    """`first`, then the others of `among` in order of cost: at most `count` in all."""
    found = [first]
    left = among[among != first]
    while left.size and len(found) < count:
        found.append(least(costs, left, rng))
        left = left[left != found[-1]]
    return found


def decode_s(ask: Ask, fleet: Fleet) -> Floats:
    """Seconds that the streams already on each worker add to this one's output."""
    tokens = min(ask.max_tokens, EXPECTED_OUTPUT_TOKENS)
    return tokens / SATURATED_STREAMS * fleet.decode_step_s * fleet.streams


def _preferring(preferred: Mask, usable: Mask) -> Indices:
    """Usable workers that prefer a role; a role is a preference, so everybody if nobody does."""
    both = np.flatnonzero(preferred & usable)
    return both if both.size else np.flatnonzero(usable)


def _alike(domains: Indices, worker: int) -> Mask:
    own = domains[worker]
    return np.full(domains.size, False) if own < 0 else domains == own
