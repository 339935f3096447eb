"""Lowest of scale x blocks to prefill + blocks in use: the linear cost of NVIDIA Dynamo's KV router.

Blocks to prefill are max(0, queued + prompt - cached) tokens over the tokens of a block. The scale is 1, Dynamo's
default. In its disaggregated mode prefill workers are chosen by tokens to prefill alone (`track_active_blocks` off),
decode workers by blocks alone; its levels of cache below the device (host 0.75, disk 0.25) have no counterpart here.
"""

from __future__ import annotations

from random import Random

from penstock.policy.routing.api import Ask, Choice, Fleet, Route, alone, handing_over

PREFILL_SCALE = 1.0


def scaled(prefill_scale: float) -> Route:
    """The sum where one worker does it all; else each of its parts for its role."""

    def route(now: float, ask: Ask, fleet: Fleet, rng: Random) -> Choice:
        blocks = prefill_scale * (fleet.queued_tokens + ask.uncached_tokens) / fleet.block_tokens
        if not fleet.is_split:
            return alone("dynamo", fleet, blocks + fleet.used_blocks, rng)
        return handing_over("dynamo", fleet, blocks, fleet.used_blocks, rng)

    return route


ROUTING = scaled(PREFILL_SCALE)
