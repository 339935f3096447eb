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
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from penstock.policy.routing.ways import Floats, Indices, Ways

if TYPE_CHECKING:
    from penstock.policy.routing.api import Ask, Fleet

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
    def of(cls, ask: Ask, fleet: Fleet, compute_s: Floats, counts_others: bool = True) -> Moves:
        uncached = ask.uncached_tokens
        return cls(
            uncached * ask.token_bytes,
            np.minimum(uncached, fleet.chunk_tokens) * ask.token_bytes,
            compute_s * (1 - np.minimum(1.0, fleet.chunk_tokens / uncached)),
            counts_others,
        )

    def seconds(self, ways: Ways, prefillers: Indices, decode: int) -> Floats:
        """From each of `prefillers` to `decode`; infinite where they do not meet."""
        meets = ways.domains[:, prefillers] == ways.domains[:, decode, None]
        seconds = np.full(prefillers.size, np.inf)
        for level in reversed(range(len(meets))):
            here = np.flatnonzero(meets[level])
            if here.size:
                seconds[here] = self.at(ways, level, prefillers[here], decode)
        return seconds

    def prices(self, ways: Ways) -> tuple[Floats, Floats]:
        """Those of `ways`."""
        now_s, others_s = ways.prices()
        return now_s, others_s if self.counts_others else np.zeros_like(others_s)

    def at(self, ways: Ways, level: int, prefillers: Indices, decode: int | Indices) -> Floats:
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


class Meeting:
    """Which workers to choose from meet where. Made once for each set of them."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        order = np.lexsort(fleet.ways.domains[:, fleet.prefillers])  # the last row, of the largest domains, counts most
        self._prefillers = fleet.prefillers[order]

    @cached_property
    def kinds(self) -> Sequence[Indices]:
        """Workers that only prefill, and all others."""
        only = self._fleet.prefers_prefill & ~self._fleet.prefers_decode
        return np.flatnonzero(only), np.flatnonzero(~only)

    @cached_property
    def memories(self) -> Sequence[tuple[Indices, Indices]]:
        """Prefillers and decoders of each memory in which they could compute for each other."""
        fleet, found = self._fleet, []
        for memory in np.unique(fleet.memory[fleet.prefillers]):
            prefillers = fleet.prefillers[fleet.memory[fleet.prefillers] == memory]
            decoders = fleet.decoders[fleet.memory[fleet.decoders] == memory]
            if memory >= 0 and np.union1d(prefillers, decoders).size > 1 and decoders.size:
                found.append((prefillers, decoders))
        return found

    @cached_property
    def _groups(self) -> list[tuple[Indices, Indices, Indices]]:
        """By level: where each domain of prefillers begins and ends, and the number of each decoder's; -1: none."""
        found, domains = [], self._fleet.ways.domains
        for level in range(len(domains)):
            ours = domains[level, self._prefillers]
            starts = np.flatnonzero(np.r_[True, ours[1:] != ours[:-1]]) if ours.size else np.empty(0, np.intp)
            numbers = {int(ours[start]): number for number, start in enumerate(starts)}
            of = [numbers.get(int(domain), -1) for domain in domains[level, self._fleet.decoders]]
            found.append((starts, np.r_[starts[1:], ours.size], np.array(of, np.intp)))
        return found

    def cheapest(
        self, ways: Ways, prefill_s: Floats, decode_s: Floats, moves: Moves, below_s: float
    ) -> tuple[int, int, float] | None:
        """The cheapest pair of two that is cheaper than `below_s`, with its price."""
        decoders = self._fleet.decoders
        if not self._prefillers.size:
            return None
        bounds = self._bounds(ways, prefill_s, decode_s[decoders], moves)
        best: tuple[int, int, float] | None = None
        flat = bounds.ravel()
        for looked in range(flat.size):
            if looked == _LOOKS:
                return self._of_all(np.flatnonzero(flat < below_s), ways, prefill_s, decode_s, moves, below_s) or best
            at = int(flat.argmin())
            if not flat[at] < below_s:
                break
            flat[at] = np.inf
            if (found := self._look(at, ways, prefill_s, decode_s, moves)) is not None and found[2] < below_s:
                best, below_s = found, found[2]
        return best

    def _bounds(self, ways: Ways, prefill_s: Floats, decode_s: Floats, moves: Moves) -> Floats:
        """[levels, decoders]: less than any P of that domain can cost; infinite where there is none."""
        ours, decoders = self._prefillers, self._fleet.decoders
        now_s, others_s = moves.prices(ways)
        lacking = moves.lacking_bytes[decoders]
        last = np.minimum(lacking, moves.step_bytes[ours].min())
        mine = prefill_s[ours]
        exposed = mine - moves.hidden_s[ours]
        bounds = np.full((len(self._groups), decoders.size), np.inf)
        for level, (starts, _, of) in enumerate(self._groups):
            byte_s, price_s = now_s[0, level, ours], others_s[0, level, ours]
            least = [np.minimum.reduceat(column, starts)[of] for column in (mine, exposed, byte_s, price_s)]
            slowest_s = np.maximum(least[2], now_s[1, level, decoders])
            moved_s = np.maximum(least[0] + slowest_s * last, least[1] + slowest_s * lacking)
            moved_s += lacking * (least[3] + others_s[1, level, decoders]) + HANDOVER_S + decode_s
            bounds[level] = np.where(of >= 0, moved_s, np.inf)
        return bounds

    def _look(
        self, at: int, ways: Ways, prefill_s: Floats, decode_s: Floats, moves: Moves
    ) -> tuple[int, int, float] | None:
        """The cheapest pair of one decoder at one level."""
        level, column = divmod(at, self._fleet.decoders.size)
        starts, ends, of = self._groups[level]
        decode = int(self._fleet.decoders[column])
        able = self._prefillers[starts[of[column]] : ends[of[column]]]
        costs = prefill_s[able] + moves.at(ways, level, able, decode) + decode_s[decode]
        costs[self._need_no_link(able, decode)] = np.inf
        row = int(costs.argmin())
        return (int(able[row]), decode, float(costs[row])) if np.isfinite(costs[row]) else None

    def _need_no_link(self, prefillers: Indices, decoders: int | Indices) -> npt.NDArray[np.bool_]:
        """A worker and itself, and those that compute in one memory."""
        ours, theirs = self._fleet.memory[prefillers], self._fleet.memory[decoders]
        needless: npt.NDArray[np.bool_] = (prefillers == decoders) | ((ours == theirs) & (theirs >= 0))
        return needless

    def _of_all(
        self, left: Indices, ways: Ways, prefill_s: Floats, decode_s: Floats, moves: Moves, below_s: float
    ) -> tuple[int, int, float] | None:
        """The cheapest of all the decoders and levels that are left, in one matrix for each level."""
        best: tuple[int, int, float] | None = None
        levels, columns = np.divmod(left, self._fleet.decoders.size)
        for level in np.unique(levels):
            starts, ends, of = self._groups[level]
            here = columns[levels == level]
            decoders = self._fleet.decoders[here]
            rows = np.flatnonzero(prefill_s[self._prefillers] + decode_s[decoders].min() < below_s)
            if not rows.size:
                continue
            able, domain = self._prefillers[rows], of[here]
            costs = prefill_s[able][:, None] + moves.at(ways, int(level), able[:, None], decoders[None, :])
            costs += decode_s[decoders]
            outside = (rows[:, None] < starts[domain]) | (rows[:, None] >= ends[domain])
            costs[outside | self._need_no_link(able[:, None], decoders)] = np.inf
            row, column = divmod(int(costs.argmin()), decoders.size)
            if costs[row, column] < below_s:
                below_s = float(costs[row, column])
                best = int(able[row]), int(decoders[column]), below_s
        return best
