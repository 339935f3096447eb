"""Lowest of (queued prompt tokens + this request's uncached ones) x (streams + 1): LMetric, OSDI'26.

The second factor is for workers that decode as well as prefill: a long batch makes a step longer, and suffers more
from a prefill. Where prefill workers do nothing else it says nothing, and the first factor alone is P-token.
"""

from __future__ import annotations

from random import Random

from penstock.policy.routing.api import Ask, Choice, Fleet, alone, handing_over


def route(now: float, ask: Ask, fleet: Fleet, rng: Random) -> Choice:
    """The product where one worker does it all; else prefill by tokens and decode by streams."""
    tokens = fleet.queued_tokens + ask.uncached_tokens
    if not fleet.is_split:
        return alone("lmetric", fleet, tokens * (fleet.streams + 1), rng)
    return handing_over("lmetric", fleet, tokens, fleet.streams, rng)


ROUTING = route
