"""A router's decision: CPU time of each policy, and of what every decision needs beside it, by size of the fleet.

Half of the workers prefill, half decode, all in one network. Prompts are of 12,288 tokens and share the first of 24
blocks; fifty of them come again and again, so the index of believed prefixes is warm. "whole decision" is the columns,
the prompt's hashes and holders, P-token, and the booking. The reference is P-token in plain Python over a list of
objects, the tokens each has cached at hand.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from report import Row, emit

from penstock import plugin
from penstock.blocks import KvLayout
from penstock.cluster import Load, Member, Role, Standing
from penstock.policy.routing.api import Ask, Choice, Fleet, Route
from penstock.policy.routing.roster import Roster
from penstock.request import Request, Sampling
from penstock.tokens import pack

LAYOUT = KvLayout(layers=80, kv_heads=8, head_dim=128, block_tokens=512, dtype="bfloat16")
BLOCKS = 900
PROMPT_TOKENS = 24 * 512
PROMPTS = 50
AIM_US = {8: 60.0, 64: 60.0, 1_000: 300.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    parser.add_argument("--quick", action="store_true", help="fewer decisions")
    arguments = parser.parse_args()
    decisions = 200 if arguments.quick else 2_000
    rows = [row for workers in AIM_US for row in measured(workers, decisions)]
    emit(rows, arguments.json)


def measured(workers: int, decisions: int) -> list[Row]:
    """One row for each policy, and one for the whole of a decision."""
    rng = Random(1)
    roster, requests = warm_roster(workers, rng), some_requests(rng)
    p_token = policy("p_token")
    for request in requests * (1 + workers // PROMPTS):
        decide(roster, request, p_token, rng)
        roster.release(request.id, 0.0)
    fleet, (ask, _) = roster.fleet(), roster.ask(requests[0])
    listed = [Plain(*facts) for facts in zip(fleet.names, fleet.queued_tokens, ask.cached_tokens, strict=True)]
    halves = [listed[column] for column in fleet.prefillers], [listed[column] for column in fleet.decoders]
    plain_us = per_call_us(lambda: plain_p_token(*halves), decisions)

    def row(name: str, value: float) -> Row:
        reference = ("plain P-token", plain_us)
        return Row(f"{workers} workers, {name}", value, "us", *reference, AIM_US[workers], aim_is_for_value=True)

    rows = [row(name, policy_us(policy(name), ask, fleet, decisions)) for name in plugin.names("policy.routing")]
    turns = iter(requests * (decisions // PROMPTS + 1))
    return [*rows, row("whole decision", per_call_us(lambda: decide(roster, next(turns), p_token, rng), decisions))]


def policy(name: str) -> Route:
    route: Route = plugin.find("policy.routing", name).ROUTING
    return route


def policy_us(route: Route, ask: Ask, fleet: Fleet, decisions: int) -> float:
    rng = Random(2)
    route(0.0, ask, fleet, rng)  # finds the paths, once for a fleet
    return per_call_us(lambda: route(0.0, ask, fleet, rng), decisions)


def decide(roster: Roster, request: Request, route: Route, rng: Random) -> Choice:
    """What a router does for a request."""
    fleet = roster.fleet()
    ask, hashes = roster.ask(request)
    choice = route(0.0, ask, fleet, rng)
    roster.book(request.id, ask, hashes, choice)
    return choice


def per_call_us(call: Callable[[], object], calls: int) -> float:
    """CPU time of this process."""
    begun_s = time.process_time()
    for _ in range(calls):
        call()
    return (time.process_time() - begun_s) / calls * 1e6


def warm_roster(workers: int, rng: Random) -> Roster:
    roster = Roster(wiring=None)
    names = [f"w{number}" for number in range(workers)]
    roster.update(
        {name: standing(name, "prefill" if number % 2 else "decode", rng) for number, name in enumerate(names)}
    )
    return roster


def standing(name: str, role: Role, rng: Random) -> Standing:
    load = Load(
        queued_tokens=rng.randrange(20_000),
        running=rng.randrange(64),
        blocks=BLOCKS,
        free_blocks=rng.randrange(BLOCKS),
        prefill_tokens_per_s=14_000.0,
        decode_step_s=0.02,
    )
    return Standing(Member(name, 1, role, "m", (), LAYOUT, BLOCKS, 100_000, domain="network"), load)


def some_requests(rng: Random) -> list[Request]:
    head = pack(range(LAYOUT.block_tokens))
    size = PROMPT_TOKENS - LAYOUT.block_tokens
    texts = [pack(rng.randrange(1 << 16) for _ in range(size)) for _ in range(PROMPTS)]
    return [Request(f"r{number}", "m", head + text, Sampling(256)) for number, text in enumerate(texts)]


@dataclass(frozen=True, slots=True)
class Plain:
    """A worker as an object; streams do not matter to what is measured."""

    name: str
    queued_tokens: float
    cached_tokens: float


def plain_p_token(prefillers: Sequence[Plain], decoders: Sequence[Plain]) -> tuple[str, str]:
    prefill = min(prefillers, key=lambda worker: worker.queued_tokens + PROMPT_TOKENS - worker.cached_tokens)
    return prefill.name, min(decoders, key=lambda worker: worker.queued_tokens).name


if __name__ == "__main__":
    main()
