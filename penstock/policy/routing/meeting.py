"""The cheapest pair among very many, without a look at most of them, and no other than a look at all would find.

A pair (P, D) that meets at a level costs prefill[P] + decode[D] + the move between them, and the move is bounded from
below by the best that any P of that domain offers. So each D and level has a bound, found by minima over domains; they
are looked into in rising order, until no bound is below the best pair found. A near pair seen from a farther level is
only dearer there, so domains may contain each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from penstock.policy.routing.ways import Floats, Indices, Ways

HANDOVER_S = 0.002  # two messages and a step's delay on one host, see bench/handoff.py
_LOOKS = 6  # domains that are looked into one by one, before all that are left are taken together


@dataclass(frozen=True, slots=True, eq=False)
class Moves:
    """Of one request's KV: what D lacks goes to it while P computes, all but the last step's part at least.

    Columns are workers.
    """

    lacking_bytes: Floats  # at D
    step_bytes: Floats  # that P makes in its last step
    hidden_s: Floats  # P computes after its first step
    counts_others: bool = True  # what it costs others that share a link

    @classmethod
    def of(
        cls, uncached: Floats, token_bytes: int, chunk_tokens: Floats, compute_s: Floats, counts_others: bool = True
    ) -> Moves:
        """`uncached` tokens, of which each worker computes `chunk_tokens` in a step and all in `compute_s`."""
        return cls(
            uncached * token_bytes,
            np.minimum(uncached, chunk_tokens) * token_bytes,
            compute_s * (1 - np.minimum(1.0, chunk_tokens / uncached)),
            counts_others,
        )

    def seconds(self, ways: Ways, prefillers: Indices, decode: int) -> Floats:
        """From each of `prefillers` to `decode`; infinite where they do not meet."""
        meets = ways.domains[:, prefillers] == ways.domains[:, decode, None]
        nearest = meets.argmax(axis=0)
        return np.where(meets.any(axis=0), self.at(ways, nearest, prefillers, decode), np.inf)

    def prices(self, ways: Ways) -> tuple[Floats, Floats]:
        """Those of `ways`."""
        now_s, others_s = ways.prices()
        return now_s, others_s if self.counts_others else np.zeros_like(others_s)

    def at(self, ways: Ways, level: int | Indices, prefillers: Indices, decode: int | Indices) -> Floats:
        """The same for those who meet at `level`."""
        now_s, others_s = self.prices(ways)
        byte_s = np.maximum(now_s[0, level, prefillers], now_s[1, level, decode])
        lacking = self.lacking_bytes[decode]
        last = np.minimum(lacking, self.step_bytes[prefillers])
        waited_s = np.maximum(byte_s * last, byte_s * lacking - self.hidden_s[prefillers])
        latency_s = ways.latency_s[level, prefillers] + ways.latency_s[level, decode]
        others = others_s[0, level, prefillers] + others_s[1, level, decode]
        seconds: Floats = waited_s + latency_s + HANDOVER_S + lacking * others
        return seconds


@dataclass(frozen=True, slots=True, eq=False)
class _Domains:
    """Of all levels, numbered through, the smallest level first.

    `prefillers` has all of them once for each level; those of a domain are in `starts[domain]:ends[domain]`. `of` is
    [levels, decoders]: the domain of each, if there are prefillers in it; else -1, and `is_empty`.
    """

    prefillers: Indices
    starts: Indices
    ends: Indices
    of: Indices
    is_empty: npt.NDArray[np.bool_]


class Meeting:
    """Which workers to choose from meet where. Made once for each set of them."""

    kinds: Sequence[Indices]
    """Workers that only prefill, and all others."""

    def __init__(
        self, ways: Ways, memory: Indices, only_prefill: npt.NDArray[np.bool_], prefillers: Indices, decoders: Indices
    ) -> None:
        """`memory` is of all workers, and equal where they compute in each other's; the last two are positions."""
        self.kinds = np.flatnonzero(only_prefill), np.flatnonzero(~only_prefill)
        order = np.lexsort(ways.domains[:, prefillers])  # the last row, of the largest domains, counts most
        self._prefillers = prefillers[order]
        self._decoders = decoders
        self._memory = memory
        self._ways = ways

    @cached_property
    def memories(self) -> Sequence[tuple[Indices, Indices]]:
        """Prefillers and decoders of each memory in which they could compute for each other."""
        found = []
        for memory in np.unique(self._memory[self._prefillers]):
            prefillers = self._prefillers[self._memory[self._prefillers] == memory]
            decoders = self._decoders[self._memory[self._decoders] == memory]
            if memory >= 0 and np.union1d(prefillers, decoders).size > 1 and decoders.size:
                found.append((prefillers, decoders))
        return found

    @cached_property
    def _domains(self) -> _Domains:
        """There is a prefiller."""
        domains, decoders = self._ways.domains, self._decoders
        starts, of = list[int](), []
        for level, ours in enumerate(domains[:, self._prefillers]):
            firsts = np.flatnonzero(np.r_[True, ours[1:] != ours[:-1]]).tolist()
            numbers = {int(ours[first]): len(starts) + number for number, first in enumerate(firsts)}
            starts += [level * ours.size + first for first in firsts]
            of.append([numbers.get(int(domain), -1) for domain in domains[level, decoders]])
        everybody, by_decoder = np.tile(self._prefillers, len(domains)), np.array(of, np.intp)
        return _Domains(
            everybody, np.array(starts, np.intp), np.array([*starts[1:], everybody.size]), by_decoder, by_decoder < 0
        )

    def cheapest(
        self, prefill_s: Floats, decode_s: Floats, moves: Moves, below_s: float
    ) -> tuple[int, int, float] | None:
        """The cheapest pair of two that is cheaper than `below_s`, with its price."""
        decoders = self._decoders
        if not self._prefillers.size:
            return None
        bounds = self._bounds(prefill_s, decode_s[decoders], moves)
        best: tuple[int, int, float] | None = None
        flat = bounds.ravel()
        for looked in range(flat.size):
            if looked == _LOOKS:
                return self._of_all(np.flatnonzero(flat < below_s), prefill_s, decode_s, moves, below_s) or best
            at = int(flat.argmin())
            if not flat[at] < below_s:
                break
            flat[at] = np.inf
            if (found := self._look(at, prefill_s, decode_s, moves)) is not None and found[2] < below_s:
                best, below_s = found, found[2]
        return best

    def _bounds(self, prefill_s: Floats, decode_s: Floats, moves: Moves) -> Floats:
        """[levels, decoders]: less than any P of that domain can cost; infinite where there is none."""
        ours, decoders, domains = self._prefillers, self._decoders, self._domains
        now_s, others_s = moves.prices(self._ways)
        lacking = moves.lacking_bytes[decoders]
        last = np.minimum(lacking, moves.step_bytes[ours].min())
        exposed_s = prefill_s - moves.hidden_s

        def least(column: Floats) -> Floats:
            return np.minimum.reduceat(column, domains.starts)[domains.of]

        slowest_s = np.maximum(least(now_s[0].take(ours, axis=1).ravel()), now_s[1].take(decoders, axis=1))
        bounds: Floats = np.maximum(
            least(prefill_s[domains.prefillers]) + slowest_s * last,
            least(exposed_s[domains.prefillers]) + slowest_s * lacking,
        )
        others = least(others_s[0].take(ours, axis=1).ravel()) + others_s[1].take(decoders, axis=1)
        bounds += lacking * others + HANDOVER_S + decode_s
        bounds[domains.is_empty] = np.inf
        return bounds

    def _look(self, at: int, prefill_s: Floats, decode_s: Floats, moves: Moves) -> tuple[int, int, float] | None:
        """The cheapest pair of one decoder at one level."""
        level, column = divmod(at, self._decoders.size)
        decode, domains = int(self._decoders[column]), self._domains
        domain = domains.of[level, column]
        able = domains.prefillers[domains.starts[domain] : domains.ends[domain]]
        costs = prefill_s[able] + moves.at(self._ways, level, able, decode) + decode_s[decode]
        costs[self._need_no_link(able, decode)] = np.inf
        row = int(costs.argmin())
        return (int(able[row]), decode, float(costs[row])) if np.isfinite(costs[row]) else None

    def _need_no_link(self, prefillers: Indices, decoders: int | Indices) -> npt.NDArray[np.bool_]:
        """A worker and itself, and those that compute in one memory."""
        ours, theirs = self._memory[prefillers], self._memory[decoders]
        needless: npt.NDArray[np.bool_] = (prefillers == decoders) | ((ours == theirs) & (theirs >= 0))
        return needless

    def _of_all(
        self, left: Indices, prefill_s: Floats, decode_s: Floats, moves: Moves, below_s: float
    ) -> tuple[int, int, float] | None:
        """The cheapest of all the decoders and levels that are left, in one matrix for each level."""
        best: tuple[int, int, float] | None = None
        levels, columns = np.divmod(left, self._decoders.size)
        for level in np.unique(levels):
            here = columns[levels == level]
            decoders = self._decoders[here]
            rows = np.flatnonzero(prefill_s[self._prefillers] + decode_s[decoders].min() < below_s)
            if not rows.size:
                continue
            able, domain, places = (
                self._prefillers[rows],
                self._domains.of[level, here],
                rows[:, None] + level * self._prefillers.size,
            )
            costs = prefill_s[able][:, None] + moves.at(self._ways, int(level), able[:, None], decoders[None, :])
            costs += decode_s[decoders]
            outside = (places < self._domains.starts[domain]) | (places >= self._domains.ends[domain])
            costs[outside | self._need_no_link(able[:, None], decoders)] = np.inf
            row, column = divmod(int(costs.argmin()), decoders.size)
            if costs[row, column] < below_s:
                below_s = float(costs[row, column])
                best = int(able[row]), int(decoders[column]), below_s
        return best
