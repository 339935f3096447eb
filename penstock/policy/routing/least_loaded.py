"""The worker with the fewest requests, as load balancers for HTTP do it ("least request")."""

from __future__ import annotations

from random import Random

from penstock.policy.routing.api import Ask, Choice, Fleet, alone, handing_over


def route(now: float, ask: Ask, fleet: Fleet, rng: Random) -> Choice:
    """Fewest prompts to compute, then fewest streams."""
    if not fleet.is_split:
        return alone("least_loaded", fleet, fleet.streams, rng)
    return handing_over("least_loaded", fleet, fleet.prefills, fleet.streams, rng)


ROUTING = route
