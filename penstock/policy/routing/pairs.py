"""The cheapest pair of workers. Every candidate is priced in seconds; the default policy.

A pair (P, D) costs the wait at P, the prefill, the hand-over, what the prefill does to streams that decode on the same
worker, and what the streams on D add to the output. (D, D), where D prefills for itself, is one of the pairs, so
aggregated and disaggregated serving are one decision. Rates come from the workers' own reports.
"""

from __future__ import annotations

from random import Random

import numpy as np

from penstock.policy.routing.api import (
    ALTERNATIVES,
    HANDOVER_S,
    PRIOR_TOKENS_PER_S,
    Ask,
    Choice,
    Fleet,
    Floats,
    Indices,
    cheapest,
    decode_s,
    least,
)

SHORTLIST = 64  # of each role: in larger fleets only the cheapest by their own prices are paired


def route(now: float, ask: Ask, fleet: Fleet, rng: Random) -> Choice:
    """The cheapest pair: of all pairs up to `SHORTLIST` workers of a role, else of the most promising ones."""
    later_s = decode_s(ask, fleet)
    own_s = alone_s(ask, fleet) + later_s
    itself = least(own_s, fleet.decoders, rng)
    itself_s, name = float(own_s[itself]), fleet.names[itself]
    prefillers = _shortlist(wait_s(fleet) + ask.uncached_tokens / fleet.prefill_tokens_per_s, fleet.prefillers)
    decoders = _shortlist(later_s, fleet.decoders)
    costs = pairs_s(ask, fleet, prefillers, decoders) + later_s[decoders]
    if costs.size and (best_s := float(costs.min())) < itself_s:
        ties = np.flatnonzero(costs == best_s)
        column = int(ties[rng.randrange(ties.size)]) % decoders.size
        return _pair(fleet, prefillers, int(decoders[column]), costs[:, column], float(own_s[decoders[column]]), rng)
    return Choice(name, (), itself_s, why=f"pairs: {name} prefills for itself: {itself_s:.4f} s")


def alone_s(ask: Ask, fleet: Fleet) -> Floats:
    """Seconds until the first token where each worker prefills for itself, plus those its prefill takes from others.

    It counts one stream more than are there: whoever arrives while this prompt is computed waits as well.
    """
    return wait_s(fleet) + (fleet.streams + 2) * ask.uncached_tokens / fleet.prefill_tokens_per_s


def pairs_s(ask: Ask, fleet: Fleet, prefillers: Indices, decoders: Indices) -> Floats:
    """The same where a worker of `prefillers` (rows) does it for one of `decoders` (columns); infinite for itself.

    In place it reads what the decoder holds; else it uses its own cache, and moves what the decoder lacks.
    """
    if not prefillers.size:
        return np.empty((0, decoders.size))
    paths = [fleet.path(int(worker)) for worker in prefillers]
    start_s = np.array([path.start_s[decoders] for path in paths])
    byte_s = np.array([path.byte_s[decoders] for path in paths])
    start_s[prefillers[:, None] == decoders] = np.inf
    domains = fleet.memory[prefillers][:, None]
    in_place = (domains >= 0) & (domains == fleet.memory[decoders])
    uncached = ask.uncached_tokens
    tokens = np.where(in_place, uncached[decoders], uncached[prefillers][:, None])
    compute_s = tokens * ((fleet.streams + 1) / fleet.prefill_tokens_per_s)[prefillers][:, None]
    move_s = start_s + byte_s * ask.token_bytes * uncached[decoders]
    return wait_s(fleet)[prefillers][:, None] + compute_s + move_s


def wait_s(fleet: Fleet) -> Floats:
    """Until each worker has computed the prompts that are queued there."""
    return fleet.queued_tokens / fleet.prefill_tokens_per_s


def is_worth_asking(here_tokens: int, there_tokens: int, streams: int, own_tokens_per_s: float, wait_s: float) -> bool:
    """Whether a decode worker that has looked into its cache should have a prompt computed elsewhere.

    It would have to compute `here_tokens`, beside `streams` others; a prefill worker, taken to be as fast, would have
    to compute `there_tokens` after `wait_s`. The prices are those of `alone_s` and `pairs_s`.
    """
    rate = own_tokens_per_s or PRIOR_TOKENS_PER_S
    return wait_s + HANDOVER_S + there_tokens / rate < (streams + 2) * here_tokens / rate


def _pair(fleet: Fleet, prefillers: Indices, decode: int, costs: Floats, itself_s: float, rng: Random) -> Choice:
    rows = np.flatnonzero(np.isfinite(costs))
    ranked = cheapest(costs, rows, rng, ALTERNATIVES, first=least(costs, rows, rng))
    names, best = tuple(fleet.names[prefillers[row]] for row in ranked), int(prefillers[ranked[0]])
    cost, name = float(costs[ranked[0]]), fleet.names[decode]
    why = f"pairs: {names[0]} prefills for {name}: {cost:.4f} s, against {itself_s:.4f} s by itself"
    return Choice(name, names, cost, float(wait_s(fleet)[best]), why)


def _shortlist(costs: Floats, among: Indices) -> Indices:
    if among.size <= SHORTLIST:
        return among
    return among[np.sort(np.argpartition(costs[among], SHORTLIST)[:SHORTLIST])]


ROUTING = route
