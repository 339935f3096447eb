"""Why requests went where they went: every decision as it was made, kept for a while and told on demand.

On the path of a request a decision is only stored; what is shown is made of it when somebody asks.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

import msgspec

from penstock.policy.routing.api import Choice
from penstock.request import Timeline

KEPT_REQUESTS = 1000


@dataclass(frozen=True, slots=True)
class Decision:
    """One choice of `policy` among `workers` workers, and what was believed then.

    `passed_over` were tried before, stood still, or had just lost a request: they count only where nobody else is left.
    `cached_at_prefill` is 0 where the decode worker prefills. `at_s` is on this process's clock.
    """

    at_s: float
    policy: str
    choice: Choice
    prompt_tokens: int
    cached_at_decode: int
    cached_at_prefill: int
    workers: int
    passed_over: tuple[str, ...]


class RunnerUp(msgspec.Struct, frozen=True):
    """A pair that was not chosen; without `prefill` the decode worker would have done all."""

    decode: str
    prefill: str
    cost: float


class Decided(msgspec.Struct, frozen=True):
    """A decision as it is told. `cost` and `parts` are seconds where the policy counts in them.

    `prompt_tokens` counts what a stream that moved had put out until then, too. `gave_first_token`: it was in force
    when the first token came, so the request's timeline tells how it turned out.
    """

    after_s: float  # after the request's first decision
    policy: str
    decode: str
    prefill: tuple[str, ...]  # whom the decode worker was to call, best first; none: itself
    cost: float
    parts: dict[str, float]
    wait_s: float
    runners_up: list[RunnerUp]
    prompt_tokens: int
    cached_at_decode: int
    cached_at_prefill: int
    workers: int
    passed_over: tuple[str, ...]
    why: str
    gave_first_token: bool


class Compared(msgspec.Struct, frozen=True):
    """What was predicted of one part and what it took; None where nobody said, or it did not come to it."""

    part: str
    predicted_s: float | None
    actual_s: float | None


@dataclass(slots=True)
class _Entry:
    decisions: list[Decision] = field(default_factory=list)
    first_token: int = -1  # which of them was in force when it came


class Journal:
    """The decisions on the last `requests` requests. Owned by a router."""

    def __init__(self, requests: int = KEPT_REQUESTS) -> None:
        self._requests = requests
        self._entries: OrderedDict[str, _Entry] = OrderedDict()

    def note(self, request_id: str, decision: Decision) -> None:
        """A request that had a decision before gets one more; the oldest request is forgotten for a new one."""
        entry = self._entries.get(request_id)
        if entry is None:
            entry = self._entries[request_id] = _Entry()
            if len(self._entries) > self._requests:
                self._entries.popitem(last=False)
        entry.decisions.append(decision)

    def prefilled(self, request_id: str) -> None:
        """A worker's first token of it came; who goes on with a stream changes nothing."""
        if (entry := self._entries.get(request_id)) is not None and entry.first_token < 0:
            entry.first_token = len(entry.decisions) - 1

    def tell(self, request_id: str) -> list[Decided]:
        """All decisions on a request, in order; none if it is not known (any more)."""
        entry = self._entries.get(request_id, _Entry())
        return [
            _told(decision, decision.at_s - entry.decisions[0].at_s, index == entry.first_token)
            for index, decision in enumerate(entry.decisions)
        ]


def compare(decided: Decided, timeline: Timeline) -> list[Compared]:
    """What a decision predicted beside what happened. A transfer lasts until the first step that read its KV ended."""
    started_s, ended_s = timeline.prefill_started_s, timeline.prefill_ended_s
    actual = {
        "wait": _between(timeline.reached_worker_s, started_s),
        "prefill": _between(started_s, ended_s),
        "transfer": _between(ended_s, timeline.decoding_s) if timeline.moved_tokens else None,
    }
    predicted: dict[str, float | None] = {**dict.fromkeys(actual), **decided.parts}
    if "wait" not in decided.parts and decided.prefill:
        predicted["wait"] = decided.wait_s
    return [Compared(part, predicted_s, actual.get(part)) for part, predicted_s in predicted.items()]


def _told(decision: Decision, after_s: float, gave_first_token: bool) -> Decided:
    choice = decision.choice
    return Decided(
        after_s=after_s,
        policy=decision.policy,
        decode=choice.decode,
        prefill=choice.prefill,
        cost=float(choice.cost),  # policies reckon with numpy's numbers
        parts={part: float(seconds) for part, seconds in choice.parts.items()},
        wait_s=float(choice.wait_s),
        runners_up=[RunnerUp(decode, prefill, float(cost)) for decode, prefill, cost in choice.others],
        prompt_tokens=decision.prompt_tokens,
        cached_at_decode=decision.cached_at_decode,
        cached_at_prefill=decision.cached_at_prefill,
        workers=decision.workers,
        passed_over=decision.passed_over,
        why=choice.why,
        gave_first_token=gave_first_token,
    )


def _between(began_s: float | None, ended_s: float | None) -> float | None:
    return None if began_s is None or ended_s is None else ended_s - began_s
