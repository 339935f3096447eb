"""The less loaded of two workers drawn by chance: little herding where many routers see the same old reports.

Mitzenmacher, "The power of two choices in randomized load balancing", 2001; SGLang's router has it too.
"""

from __future__ import annotations

from random import Random

from penstock.policy.routing.api import Ask, Choice, Fleet, Floats, Indices, between, least, staying


def route(now: float, ask: Ask, fleet: Fleet, rng: Random) -> Choice:
    """Two prefill workers, then two decode workers that the better one reaches. Load is a count of requests."""
    if not fleet.is_split:
        return staying("power_of_two", fleet, _better(fleet.streams, fleet.decoders, rng), fleet.streams)
    prefill = _better(fleet.prefills, fleet.prefillers, rng)
    decode = _better(fleet.streams, fleet.reached_from(prefill), rng)
    return between("power_of_two", fleet, prefill, decode, fleet.prefills, rng)


def _better(costs: Floats, among: Indices, rng: Random) -> int:
    drawn = rng.sample(range(among.size), min(2, among.size))
    return least(costs, among[drawn], rng)


ROUTING = route
