"""Which pair of workers serves a request. Every candidate is priced in seconds; the cheapest wins.

A pair (P, D) costs the wait at P, the prefill, the hand-over, and what the prefill does to streams that decode on the
same worker; (D, D), where D prefills for itself, is one of the pairs. The prices come from the workers' own reports.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from penstock.cluster import Role
from penstock.errors import NoWorker

HANDOVER_S = 0.002  # two messages and a step's delay on one host, see bench/handoff.py
PRIOR_TOKENS_PER_S = 2_000.0  # until anybody has measured anything
PRIOR_STEP_S = 0.02
SATURATED_STREAMS = 32  # a decode step's time doubles about here
EXPECTED_OUTPUT_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Facts:
    """What a router knows of one worker: its report, or this router's own bookings where they say more.

    Rates are 0 until the worker has measured them.
    """

    worker: str
    role: Role
    shares_with: str  # workers with equal, non-empty values can prefill for each other in place
    queued_tokens: int
    streams: int
    prefill_tokens_per_s: float = 0.0
    decode_step_s: float = 0.0
    is_draining: bool = False


@dataclass(frozen=True, slots=True)
class Ask:
    """What a request wants, as far as routing cares."""

    prompt_tokens: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Choice:
    """`prefill` is whom the decode worker should call, best first; empty: itself. `wait_s` is the first one's queue."""

    decode: str
    prefill: tuple[str, ...]
    seconds: float
    wait_s: float
    why: str


def choose(ask: Ask, fleet: Sequence[Facts], rng: Random) -> Choice:
    """The cheapest pair; ties are broken by `rng`. Raises NoWorker if nobody takes requests."""
    ready = [facts for facts in with_priors(fleet) if not facts.is_draining]
    if not ready:
        raise NoWorker("no worker takes requests now; start one with `penstock worker --join HOST:PORT`")
    decoders = _with_role(ready, "decode")
    prefillers = _with_role(ready, "prefill")
    pairs = [
        (pair_s(ask, p, d) + decode_s(ask, d), rng.random(), p, d)
        for d in decoders
        for p in (d, *(p for p in prefillers if p is not d and _in_reach(p, d)))
    ]
    seconds, _, best, decode = min(pairs, key=lambda pair: pair[:2])
    if best is decode:
        return Choice(decode.worker, (), seconds, 0.0, f"{decode.worker} prefills for itself: {seconds:.4f} s")
    others = sorted((pair for pair in pairs if pair[3] is decode and pair[2] is not decode), key=lambda pair: pair[:2])
    itself = next(pair[0] for pair in pairs if pair[2] is pair[3] is decode)
    why = f"{best.worker} prefills for {decode.worker}: {seconds:.4f} s, against {itself:.4f} s by itself"
    return Choice(decode.worker, tuple(pair[2].worker for pair in others), seconds, wait_s(best), why)


def with_priors(fleet: Sequence[Facts]) -> list[Facts]:
    """Workers that have not measured themselves count as being like the others, so that newcomers get work."""
    rate = _mean([facts.prefill_tokens_per_s for facts in fleet]) or PRIOR_TOKENS_PER_S
    step_s = _mean([facts.decode_step_s for facts in fleet]) or PRIOR_STEP_S
    return [
        replace(
            facts,
            prefill_tokens_per_s=facts.prefill_tokens_per_s or rate,
            decode_step_s=facts.decode_step_s or step_s,
        )
        for facts in fleet
    ]


def pair_s(ask: Ask, prefill: Facts, decode: Facts) -> float:
    """Seconds until the first token, plus the seconds that this prefill takes from streams already decoding."""
    compute_s = ask.prompt_tokens / prefill.prefill_tokens_per_s
    if prefill is decode:
        # One stream more than are there now: whoever arrives while this prompt is computed waits as well.
        return wait_s(decode) + compute_s + (decode.streams + 1) * compute_s
    return wait_s(prefill) + compute_s + HANDOVER_S + prefill.streams * compute_s


def decode_s(ask: Ask, decode: Facts) -> float:
    """Seconds that the streams already on `decode` add to this one's output."""
    tokens = min(ask.max_tokens, EXPECTED_OUTPUT_TOKENS)
    return tokens * decode.decode_step_s * decode.streams / SATURATED_STREAMS


def wait_s(prefill: Facts) -> float:
    return prefill.queued_tokens / prefill.prefill_tokens_per_s


def is_worth_asking(uncached_tokens: int, streams: int, own_tokens_per_s: float, wait_s: float) -> bool:
    """Whether a decode worker that found part of a prompt in its cache should have the rest computed elsewhere."""
    compute_s = uncached_tokens / (own_tokens_per_s or PRIOR_TOKENS_PER_S)
    return wait_s + HANDOVER_S < (streams + 1) * compute_s


def _mean(samples: Sequence[float]) -> float:
    """Of the samples that are not 0; 0 if all are."""
    known = [sample for sample in samples if sample]
    return sum(known) / len(known) if known else 0.0


def _with_role(fleet: Sequence[Facts], role: Role) -> Sequence[Facts]:
    """Workers that prefer `role`; a role is a preference, so everybody if nobody does."""
    return [facts for facts in fleet if facts.role in (role, "any")] or fleet


def _in_reach(prefill: Facts, decode: Facts) -> bool:
    return bool(prefill.shares_with) and prefill.shares_with == decode.shares_with
