"""One worker after the other, whatever is asked and however busy they are. What every policy must beat."""

from __future__ import annotations

from random import Random

from penstock.policy.routing.api import Ask, Choice, Fleet, between, staying


def route(now: float, ask: Ask, fleet: Fleet, rng: Random) -> Choice:
    """Prefill and decode workers each in turn; every round is shifted by one, so that all of them meet."""
    if not fleet.is_split:
        return staying("round_robin", fleet, int(fleet.decoders[ask.number % fleet.decoders.size]), fleet.streams)
    rounds, turn = divmod(ask.number, fleet.prefillers.size)
    prefill = int(fleet.prefillers[turn])
    decoders = fleet.reached_from(prefill)
    decode = int(decoders[(ask.number + rounds) % decoders.size])
    return between("round_robin", fleet, prefill, decode, fleet.prefills, rng)


ROUTING = route
