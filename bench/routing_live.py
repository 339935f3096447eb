"""Routing live: `penstock serve` with four workers, chats of several turns from the `openai` client, policy by policy.

Every user shares the system prompt, and each turn repeats the chat so far. Policies get the same chats; their answers
must be the same, to the letter. Each row has the same figure of round robin beside it, from the same run. Hit rates and
TTFT are those of the server's own /metrics, its quantiles linear within a bucket; clients' TTFT is to the first event.
"believed, not found" are prompt tokens that the router took for cached where they were not.

The engine is the simulated one: prefill takes 0.3 ms a token, its answers depend on every block that they should have
read, and two cores are enough for four workers. `--engine embedded` takes the bundled model instead.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

from openai import AsyncOpenAI
from prometheus_client.parser import text_string_to_metric_families
from report import Row, emit

import penstock

BASELINE = "round_robin"
POLICIES = (BASELINE, "p_token", "pairs")
FLEETS = {
    "2 prefill + 2 decode": ("--prefill=2", "--decode=2"),
    "4 that do both": ("--workers=4",),
    "2 prefill + 2 decode over TCP": ("--prefill=2", "--decode=2", "--transport=tcp"),
}
ENGINES = {
    "simulated": ("--engine-option.prefill_token_s=0.0003", "--engine-option.step_s=0.004"),
    "embedded": (),
}
USERS = 12
SYSTEM_WORDS, MESSAGE_WORDS, ANSWER_TOKENS = 400, 80, 24
THINK_S = 0.15  # in the mean, before each turn
REPORTED_S = 1.2  # until every worker has reported what it did
WORDS = re.findall(r"[A-Za-z]+", (Path(penstock.__file__).parent / "models/demo/questions.txt").read_text())


@dataclass(frozen=True, slots=True)
class Chat:
    """What one user says, and how long it takes to think of it."""

    system: str
    messages: Sequence[str]
    think_s: Sequence[float]


@dataclass(frozen=True, slots=True)
class Turn:
    """An answer, as its client got it."""

    id: str
    text: str
    first_event_s: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """One server's run. `buckets` counts TTFTs up to a bound, by bound."""

    turns: Sequence[Turn]
    buckets: Mapping[float, float]
    ttft_sum_s: float
    prompt_tokens: float
    cached_tokens: float
    missed_tokens: float  # believed to be cached, and not found

    @classmethod
    def of(cls, runs: Sequence[Outcome]) -> Outcome:
        """All of them together."""
        return cls(
            [turn for run in runs for turn in run.turns],
            {bound: sum(run.buckets[bound] for run in runs) for bound in runs[0].buckets},
            *(sum(getattr(run, name) for run in runs) for name in cls.__slots__[2:]),
        )

    def figures(self) -> dict[str, tuple[float, str]]:
        """By name, each with its unit."""
        clients = [turn.first_event_s for turn in self.turns]
        return {
            "hit rate": (100 * self.cached_tokens / self.prompt_tokens, "%"),
            "believed, not found": (100 * self.missed_tokens / self.prompt_tokens, "%"),
            "TTFT mean": (1e3 * self.ttft_sum_s / len(self.turns), "ms"),
            "TTFT p50": (1e3 * quantile(self.buckets, 0.5), "ms"),
            "TTFT p99": (1e3 * quantile(self.buckets, 0.99), "ms"),
            "clients' TTFT mean": (1e3 * statistics.mean(clients), "ms"),
            "clients' TTFT p50": (1e3 * statistics.median(clients), "ms"),
            "clients' TTFT p99": (1e3 * statistics.quantiles(clients, n=100, method="inclusive")[98], "ms"),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    parser.add_argument("--quick", action="store_true", help="one round of four turns, without the fleet that moves KV")
    parser.add_argument("--engine", choices=list(ENGINES), default="simulated", help="what the workers compute with")
    arguments = parser.parse_args()
    fleets, turns, rounds = (list(FLEETS)[:2], 4, 1) if arguments.quick else (list(FLEETS), 6, 3)
    emit([row for fleet in fleets for row in compared(fleet, arguments.engine, turns, rounds)], arguments.json)


def compared(fleet: str, engine: str, turns: int, rounds: int) -> Iterator[Row]:
    """One fleet under each policy. Policies take turns, so that what else runs on this machine meets all of them."""
    runs: dict[str, list[Outcome]] = {policy: [] for policy in POLICIES}
    for seed in range(rounds):
        chats = some_chats(Random(seed), turns)
        for policy in POLICIES:
            runs[policy].append(run(fleet, engine, policy, chats))
            check_same([turn.text for turn in runs[BASELINE][seed].turns], runs[policy][seed], f"{fleet}, {policy}")
    baseline = Outcome.of(runs[BASELINE]).figures()
    for policy in POLICIES:
        for what, (value, unit) in Outcome.of(runs[policy]).figures().items():
            reference = (None, None) if policy == BASELINE else (BASELINE, baseline[what][0])
            yield Row(f"{fleet}, {policy}: {what}", value, unit, *reference, more_is_better=what == "hit rate")


def some_chats(rng: Random, turns: int) -> list[Chat]:
    system = some_words(rng, SYSTEM_WORDS)
    return [
        Chat(
            system,
            [some_words(rng, rng.randrange(MESSAGE_WORDS // 2, 2 * MESSAGE_WORDS)) for _ in range(turns)],
            [rng.expovariate(1 / THINK_S) for _ in range(turns)],
        )
        for _ in range(USERS)
    ]


def some_words(rng: Random, count: int) -> str:
    return " ".join(rng.choices(WORDS, k=count))


def check_same(texts: Sequence[str], outcome: Outcome, what: str) -> None:
    wrong = sum(text != turn.text for text, turn in zip(texts, outcome.turns, strict=True))
    if wrong:
        raise SystemExit(f"{what}: {wrong} of {len(texts)} answers differ from those under {BASELINE}")


def run(fleet: str, engine: str, policy: str, chats: Sequence[Chat]) -> Outcome:
    flags = [*FLEETS[fleet], f"--policy={policy}", f"--engine={engine}", *ENGINES[engine]]
    with serving(flags) as url:
        turns = asyncio.run(hold(url, chats))
        time.sleep(REPORTED_S)
        return seen(url, turns)


@contextmanager
def serving(flags: Sequence[str]) -> Iterator[str]:
    """A server of its own; yields its address once all workers are there."""
    command = [sys.executable, "-m", "penstock", "serve", "--port=0", "--json", "--no-ask", "--log-level=error", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield next(event["url"] for event in map(json.loads, process.stdout) if event["event"] == "ready")
        finally:
            process.terminate()


async def hold(url: str, chats: Sequence[Chat]) -> list[Turn]:
    """All chats at once; their turns, chat by chat."""
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client, asyncio.TaskGroup() as group:
        tasks = [group.create_task(hold_one(client, chat)) for chat in chats]
    return [turn for task in tasks for turn in task.result()]


async def hold_one(client: AsyncOpenAI, chat: Chat) -> list[Turn]:
    history: list[Any] = [{"role": "system", "content": chat.system}]
    turns: list[Turn] = []
    for message, think_s in zip(chat.messages, chat.think_s, strict=True):
        await asyncio.sleep(think_s)
        history.append({"role": "user", "content": message})
        turns.append(await ask(client, history))
        history.append({"role": "assistant", "content": turns[-1].text})
    return turns


async def ask(client: AsyncOpenAI, history: Sequence[Any]) -> Turn:
    """Raises openai.APIError for what the server refuses or fails at, SystemExit for an answer without an end."""
    begun_s = time.perf_counter()
    stream = await client.chat.completions.create(
        model="demo", messages=history, temperature=0, max_tokens=ANSWER_TOKENS, stream=True
    )
    pieces: list[str] = []
    first_event_s, id, reason = 0.0, "", None
    async for event in stream:
        first_event_s = first_event_s or time.perf_counter() - begun_s
        id, reason = event.id, event.choices[0].finish_reason
        pieces.append(event.choices[0].delta.content or "")
    if reason not in ("stop", "length"):
        raise SystemExit(f"the answer {id} ended by {reason} after {len(pieces)} events")
    return Turn(id, "".join(pieces), first_event_s)


def seen(url: str, turns: Sequence[Turn]) -> Outcome:
    """What the server says of these turns."""
    samples = [
        sample
        for family in text_string_to_metric_families(fetched(f"{url}/metrics").decode())
        for sample in family.samples
    ]

    def total(name: str) -> float:
        return sum(sample.value for sample in samples if sample.name == f"penstock_{name}")

    buckets = {
        float(sample.labels["le"]): sample.value
        for sample in samples
        if sample.name == "penstock_time_to_first_token_seconds_bucket"
    }
    return Outcome(
        turns,
        buckets,
        total("time_to_first_token_seconds_sum"),
        total("prefix_cache_queries_total"),
        total("prefix_cache_hits_total"),
        sum(missed_tokens(json.loads(fetched(f"{url}/debug/requests/{turn.id}"))) for turn in turns),
    )


def missed_tokens(record: dict[str, Any]) -> int:
    """What the router believed of the worker whose cache the prompt was computed after, less what was found."""
    decision = record["decisions"][-1]
    is_moved = record["timeline"]["path"] == "streamed"
    believed = max(decision["cached_at_decode"], decision["cached_at_prefill"] if is_moved else 0)
    return max(0, believed - record["timeline"]["cached_tokens"])


def fetched(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as page:
        content: bytes = page.read()
        return content


def quantile(buckets: Mapping[float, float], share: float) -> float:
    """As PromQL's histogram_quantile: linear within the bucket that it falls into."""
    wanted = share * buckets[float("inf")]
    for (low, below), (high, upto) in pairwise([(0.0, 0.0), *sorted(buckets.items())]):
        if upto >= wanted:
            return low if high == float("inf") else low + (high - low) * (wanted - below) / (upto - below)
    return float("nan")


if __name__ == "__main__":
    main()
