"""A stand-in for Mooncake's conversation trace (FAST'25 release), for use without the file.

The trace has 12,031 requests in 59 minutes, in ticks of 3 s. All prompts share the first block; otherwise two share
text only if one continues the other, by appending to it (87 %) or from some way back in it (13 %). That somebody goes
on is the likelier, the more turns there were. The tables below are quantiles measured on the trace and taken to be
independent of each other; the rate and the chances of going on are set so that the whole comes out as in the trace.
Over 16 seeds: mean input 12,250 tokens (trace 12,035), output 343 (343), 3,537 s (3,537), hits in an infinite cache
36.3 % of blocks (36.6), with 30,000, 10,000 and 1,000 blocks 33.6, 22.1 and 4.6 % (32.6, 21.2, 4.5).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count
from random import Random

from penstock.workloads.workload import BLOCK_TOKENS, BlockSupply, Session, Turn, Workload

TICK_S = 3.0
MAX_PROMPT_TOKENS = 126_195
CONVERSATIONS_PER_S = 2.13
APPENDED = 0.866
GOES_ON = (0.40, 0.44, 0.57, 0.65, 0.66, 0.70, 0.77)  # after the first turn, the second, ...; the last for all later
LONG_TOKENS = 50_000
LONG_GOES_ON = 0.4  # of that, after prompts longer than LONG_TOKENS

Quantiles = tuple[tuple[float, float], ...]  # (share of the values, below this value)

FIRST_TOKENS: Quantiles = (
    (0.00, 891), (0.05, 897), (0.10, 905), (0.15, 943), (0.20, 1092), (0.25, 1336), (0.30, 1757), (0.40, 3913),
    (0.50, 5264), (0.60, 7418), (0.70, 10771), (0.80, 15871), (0.85, 19700), (0.90, 25559), (0.95, 38494),
    (0.98, 67126), (0.99, 89868), (1.00, MAX_PROMPT_TOKENS),
)  # fmt: skip
OUTPUT_TOKENS: Quantiles = (
    (0.00, 1), (0.01, 3), (0.05, 10), (0.10, 24), (0.15, 46), (0.20, 100), (0.30, 213), (0.40, 291), (0.50, 350),
    (0.60, 399), (0.70, 447), (0.80, 504), (0.90, 597), (0.95, 698), (0.98, 892), (0.99, 1119), (0.999, 2000),
    (1.00, 2000),
)  # fmt: skip
ADDED_AT_FIRST: Quantiles = (
    (0.00, 1), (0.20, 7), (0.30, 11), (0.40, 18), (0.50, 30), (0.60, 106), (0.70, 484), (0.75, 1176), (0.80, 3070),
    (0.90, 5392), (0.95, 8469), (0.98, 13996), (0.99, 20538), (0.999, 48567), (1.00, 91467),
)  # fmt: skip
ADDED_LATER: Quantiles = (
    (0.00, 1), (0.20, 8), (0.30, 11), (0.40, 15), (0.50, 22), (0.60, 37), (0.70, 81), (0.75, 131), (0.80, 260),
    (0.90, 1986), (0.95, 5160), (0.98, 9046), (0.99, 13287), (0.999, 25004), (1.00, 38787),
)  # fmt: skip
KEPT_SHARE: Quantiles = (
    (0.00, 0.01), (0.10, 0.037), (0.20, 0.057), (0.30, 0.087), (0.40, 0.118), (0.50, 0.157), (0.60, 0.222),
    (0.70, 0.300), (0.80, 0.400), (0.90, 0.554), (0.95, 0.747), (1.00, 0.96),
)  # fmt: skip
REWRITTEN_TOKENS: Quantiles = (
    (0.00, 10), (0.05, 2827), (0.10, 4390), (0.20, 6244), (0.30, 8111), (0.50, 10177), (0.60, 11821), (0.70, 14428),
    (0.80, 16436), (0.90, 20906), (0.95, 26817), (0.98, 32449), (0.99, 42235), (1.00, 94968),
)  # fmt: skip
GAP_S: Quantiles = (
    (0.00, 3), (0.01, 12), (0.05, 30), (0.10, 42), (0.20, 60), (0.30, 75), (0.40, 96), (0.50, 123), (0.60, 162),
    (0.70, 222), (0.80, 318), (0.90, 483), (0.95, 615), (0.98, 1031), (0.99, 1477), (1.00, 3030),
)  # fmt: skip


def mooncake_like(seed: int, requests: int = 12_031) -> Workload:
    """A trace of so many requests. As in the file, each is a session of one turn; ids tell which continue which."""
    return Workload(lambda: _generate(seed)).limited(requests)


@dataclass(frozen=True, slots=True)
class _Ask:
    """One request of a conversation, `turn` counted from 0."""

    at_s: float
    conversation: int
    turn: int
    tokens: int
    blocks: tuple[int, ...]
    output_tokens: int


def _generate(seed: int) -> Iterator[Session]:
    writer = _Writer(seed)
    ahead: list[tuple[float, int, _Ask]] = []  # heap of (time, order, next request) of conversations that go on
    begins_s = 0.0
    for order in count():
        if ahead and ahead[0][0] < begins_s:
            ask = heappop(ahead)[2]
        else:
            ask = writer.begin(begins_s)
            begins_s += writer.rng.expovariate(CONVERSATIONS_PER_S)
        turn = Turn(ask.tokens, ask.blocks, ask.output_tokens)
        yield Session(f"{ask.conversation}:{ask.turn}", math.ceil(ask.at_s / TICK_S) * TICK_S, (turn,))
        if (later := writer.go_on(ask)) is not None:
            heappush(ahead, (later.at_s, order, later))


class _Writer:
    """Invents conversations."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(f"mooncake_like {seed}")
        self._supply = BlockSupply(f"mooncake_like {seed}")
        self._shared = tuple(self._supply.take(BLOCK_TOKENS))
        self._begun = 0

    def begin(self, at_s: float) -> _Ask:
        self._begun += 1
        return self._ask(at_s, self._begun, 0, self._draw(FIRST_TOKENS), self._shared)

    def go_on(self, ask: _Ask) -> _Ask | None:
        """The request that continues `ask`, if there is one."""
        full_blocks = ask.tokens // BLOCK_TOKENS
        chance = GOES_ON[min(ask.turn, len(GOES_ON) - 1)] * (LONG_GOES_ON if ask.tokens > LONG_TOKENS else 1)
        if full_blocks < 2 or self.rng.random() >= chance:
            return None  # what continues less than two blocks shares only the first, as everybody does
        if self.rng.random() < APPENDED:
            kept = full_blocks
            tokens = ask.tokens + ask.output_tokens + self._draw(ADDED_LATER if ask.turn else ADDED_AT_FIRST)
        else:
            kept = 1 + math.ceil(self._quantile(KEPT_SHARE) * (full_blocks - 1))
            tokens = kept * BLOCK_TOKENS + self._draw(REWRITTEN_TOKENS)
        if tokens > MAX_PROMPT_TOKENS:
            return None
        at_s = ask.at_s + self._quantile(GAP_S)
        return self._ask(at_s, ask.conversation, ask.turn + 1, tokens, ask.blocks[:kept])

    def _ask(self, at_s: float, conversation: int, turn: int, tokens: int, known: tuple[int, ...]) -> _Ask:
        blocks = (*known, *self._supply.take(tokens - len(known) * BLOCK_TOKENS))
        return _Ask(at_s, conversation, turn, tokens, blocks, self._draw(OUTPUT_TOKENS))

    def _draw(self, table: Quantiles) -> int:
        return round(self._quantile(table))

    def _quantile(self, table: Quantiles) -> float:
        """A value of which such is the distribution; geometric between the entries."""
        share = self.rng.random()
        above = bisect_right(table, share, key=lambda entry: entry[0])
        (low, least), (high, most) = table[above - 1], table[above]
        return least * math.pow(most / least, (share - low) / (high - low))
