"""Which worker is believed to hold which prefixes: learned from where this router sent prompts, nothing else.

A worker forgets what was used longest ago once it is believed to hold more than it has room for, as its own cache
does. The beliefs err: a request may have been served otherwise, a worker may keep something longer. Output tokens
extend a prefix too, but the router does not keep them; a next turn that repeats them teaches the index then.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from penstock.tokens import TOKEN_BYTES

SWEEP = 64  # blocks of a worker that left to forget with every prompt that is learned


def prefix_hashes(prompt: bytes, block_tokens: int, salt: str = "") -> list[int]:
    """Chained 64-bit hashes of the full blocks of a packed prompt. Unlike `blocks.chain_hashes`, not to be trusted.

    Equal prefixes under one salt have equal hashes. Others could be made to collide, which costs a wrong guess here.
    """
    size = block_tokens * TOKEN_BYTES
    packed, parent, hashes = memoryview(prompt), xxh3_64_intdigest(salt.encode()), list[int]()
    for start in range(0, len(prompt) - size + 1, size):
        parent = xxh3_64_intdigest(packed[start : start + size], parent)
        hashes.append(parent)
    return hashes


@dataclass(slots=True, eq=False)
class _Holder:
    """One incarnation of a worker. `held` is in order of use, the latest last."""

    bit: int
    capacity: int
    held: OrderedDict[int, None] = field(default_factory=OrderedDict)


class PrefixIndex:
    """Blocks to the workers that hold them, as the bits of an integer. Owned by one router.

    A worker that leaves is forgotten at once: its bit counts no more. The bit is given to another when every block
    that has it was swept, a few with every prompt that is learned. `bits` is how many were ever needed.
    """

    def __init__(self) -> None:
        self._holders: dict[int, int] = {}  # by hash: one bit for each worker
        self._seated: dict[tuple[str, int], _Holder] = {}
        self._order: npt.NDArray[np.intp] = np.empty(0, np.intp)  # bits of the seated workers
        self._alive = 0
        self.bits = 0
        self._free_bits: list[int] = []
        self._leaving: list[_Holder] = []

    def seat(self, workers: Sequence[tuple[str, int]], capacities: Sequence[int]) -> None:
        """These incarnations (name, epoch) are there now, with room for so many blocks; the others are forgotten."""
        before, self._seated = self._seated, {}
        for worker, capacity in zip(workers, capacities, strict=True):
            holder = before.pop(worker, None) or _Holder(self._take_bit(), capacity)
            self._seated[worker] = holder
        self._leaving += before.values()
        self._order = np.array([holder.bit for holder in self._seated.values()], np.intp)
        self._alive = sum(1 << holder.bit for holder in self._seated.values())

    def learn(self, worker: tuple[str, int], hashes: Sequence[int]) -> None:
        """`worker` holds the prefix of these blocks from now on. Raises KeyError for one without a seat."""
        self._sweep()
        holder = self._seated[worker]
        bit, held, holders = 1 << holder.bit, holder.held, self._holders
        for block in reversed(hashes):  # the last first, so that a prefix is forgotten from its end
            held[block] = None
            held.move_to_end(block)
            holders[block] = holders.get(block, 0) | bit
        while len(held) > holder.capacity:
            self._forget(holder, next(iter(held)))

    def longest(self, hashes: Sequence[int]) -> npt.NDArray[np.int64]:
        """For each worker, in the order of its seat: how many blocks of this prefix it holds."""
        lengths = np.zeros(self.bits, np.int64)
        for live, blocks in self._runs(hashes):
            if live.bit_count() <= 4:
                while live:
                    lowest = live & -live
                    lengths[lowest.bit_length() - 1] += blocks
                    live ^= lowest
            else:
                lengths[_as_mask(live, self.bits)] += blocks
        return lengths[self._order]

    def __len__(self) -> int:
        """How many different blocks it knows of, those of workers that left included until they are swept."""
        return len(self._holders)

    def _runs(self, hashes: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Those who hold everything so far, and for how many more blocks it stays these."""
        live, blocks = self._alive, 0
        for block in hashes:
            left = live & self._holders.get(block, 0)
            if left != live:
                if blocks:
                    yield live, blocks
                live, blocks = left, 0
                if not live:
                    return
            blocks += 1
        if blocks and live:
            yield live, blocks

    def _take_bit(self) -> int:
        if self._free_bits:
            return self._free_bits.pop()
        self.bits += 1
        return self.bits - 1

    def _sweep(self) -> None:
        for _ in range(SWEEP):
            if not self._leaving:
                return
            holder = self._leaving[-1]
            if holder.held:
                self._forget(holder, next(iter(holder.held)))
            else:
                self._free_bits.append(self._leaving.pop().bit)

    def _forget(self, holder: _Holder, block: int) -> None:
        del holder.held[block]
        left = self._holders[block] & ~(1 << holder.bit)
        if left:
            self._holders[block] = left
        else:
            del self._holders[block]


def _as_mask(bits: int, size: int) -> npt.NDArray[np.bool_]:
    packed = np.frombuffer(bits.to_bytes(-(-size // 8), "little"), np.uint8)
    return np.unpackbits(packed, count=size, bitorder="little").astype(np.bool_)
