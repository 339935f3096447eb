"""Any worker, each as likely as any other."""

from __future__ import annotations

from random import Random

from penstock.policy.routing.api import Ask, Choice, Fleet, Indices, between, staying


def route(now: float, ask: Ask, fleet: Fleet, rng: Random) -> Choice:
    """A prefill worker, then a decode worker that it reaches."""
    if not fleet.is_split:
        return staying("random", fleet, _any(fleet.decoders, rng), fleet.streams)
    prefill = _any(fleet.prefillers, rng)
    decode = _any(fleet.reached_from(prefill), rng)
    return between("random", fleet, prefill, decode, fleet.prefills, rng)


def _any(among: Indices, rng: Random) -> int:
    return int(among[rng.randrange(among.size)])


ROUTING = route
