"""Decode workers by load, cache and the way to them: NetKV (arXiv 2606.03910), with costs in seconds.

Prefill by P-token. Then the decode worker d with the least of

    what its streams add to this output  +  start[p, d]  +  byte_s[p, d] x (bytes it lacks + bytes p and d already move)

The last term stands for NetKV's oracle of distance and congestion: what is still to leave p or to arrive at d goes
first. Without wiring every way costs the same, and load alone decides.
"""

from __future__ import annotations

from random import Random

from penstock.policy.routing.api import Ask, Choice, Fleet, alone, between, decode_s, least


def route(now: float, ask: Ask, fleet: Fleet, rng: Random) -> Choice:
    """Fewest tokens to prefill, then the decode worker that is soonest ready and quickest."""
    tokens = fleet.queued_tokens + ask.uncached_tokens
    if not fleet.is_split:
        return alone("netkv", fleet, tokens, rng)
    prefill = least(tokens, fleet.prefillers, rng)
    path = fleet.path(prefill)
    under_way = fleet.outgoing_bytes[prefill] + fleet.incoming_bytes
    seconds = decode_s(ask, fleet) + path.start_s + path.byte_s * (ask.token_bytes * ask.uncached_tokens + under_way)
    decode = least(seconds, fleet.reached_from(prefill), rng)
    return between("netkv", fleet, prefill, decode, tokens, rng)


ROUTING = route
