"""The worker that holds most of the prompt, until load gets out of balance: SGLang's cache-aware router.

Out of balance is (max - min) > 64 requests and max > 1.5 min: then the least loaded worker. Else the worker with the
longest prefix if it is more than 0.3 of the prompt, else the one with the most room for something new: SGLang takes
the smallest tree of prefixes, this the least KV in use. Source: sglang's router, its default thresholds.

What all workers hold (a system prompt) says nothing about any of them, and routing by it sends everything to whoever
had it first. So it is taken off first, which SGLang does not do.
"""

from __future__ import annotations

from random import Random

from penstock.policy.routing.api import Ask, Choice, Fleet, Floats, Indices, alone, handing_over

IMBALANCE_REQUESTS = 64
IMBALANCE_RATIO = 1.5
MATCH_SHARE = 0.3


def route(now: float, ask: Ask, fleet: Fleet, rng: Random) -> Choice:
    """Affinity where prompts are computed; who decodes for others is chosen by load."""
    if not fleet.is_split:
        return alone("prefix_affinity", fleet, _costs(ask, fleet, fleet.streams, fleet.decoders), rng)
    prefill_costs = _costs(ask, fleet, fleet.prefills, fleet.prefillers)
    return handing_over("prefix_affinity", fleet, prefill_costs, fleet.streams, rng)


def _costs(ask: Ask, fleet: Fleet, load: Floats, among: Indices) -> Floats:
    """Least where SGLang would send it."""
    least, most = load[among].min(), load[among].max()
    if most - least > IMBALANCE_REQUESTS and most > IMBALANCE_RATIO * least:
        return load
    held = ask.cached_tokens[among]
    everywhere = held.min() if among.size > 1 else 0.0
    if held.max() - everywhere > MATCH_SHARE * (ask.prompt_tokens - everywhere):
        return ask.uncached_tokens
    return fleet.used_blocks


ROUTING = route
