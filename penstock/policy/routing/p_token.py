"""Fewest prompt tokens to compute before this request's first token: those queued, and its own that are not cached.

The bar for every policy on a pool of prefill workers, see LMetric (OSDI'26), section 7.
"""

from __future__ import annotations

from random import Random

from penstock.policy.routing.api import Ask, Choice, Fleet, alone, handing_over


def route(now: float, ask: Ask, fleet: Fleet, rng: Random) -> Choice:
    """Fewest tokens, then fewest streams."""
    tokens = fleet.queued_tokens + ask.uncached_tokens
    if not fleet.is_split:
        return alone("p_token", fleet, tokens, rng)
    return handing_over("p_token", fleet, tokens, fleet.streams, rng)


ROUTING = route
