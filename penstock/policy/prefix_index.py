"""Which worker holds which prefixes: as their KV events tell, and where prompts were sent that no event told of yet.

A block is known by the chained hash of the prompt up to its end; the index maps it to the set of its holders, as the
bits of an integer. The longest prefix of every worker is then found without looking at most of a prompt's blocks: who
holds a block holds what comes before it, so the blocks that a set of workers shares end where a search by doubling and
halving says. Events that were lost, or an engine that evicts from the front, break that assumption; `count_held` looks
at every block for one worker.

Workers that tell no events are believed to hold what they were sent, and to forget what was used longest ago once it
is more than they have room for. For the others that belief fills the time until the event.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from penstock.tokens import TOKEN_BYTES

Incarnation: TypeAlias = tuple[str, int]  # a worker's name and epoch
Lengths: TypeAlias = npt.NDArray[np.int64]

TIERS = ("device", "host", "disk", "remote")  # nearest first; events name them by their numbers here
DEVICE = 0

_SWEEP = 256  # entries of those who left to forget with every change
_BELIEF = len(TIERS)  # the plane of what is only believed
_INTERNED = 1 << 16


def prefix_hashes(
    prompt: bytes | memoryview, block_tokens: int, salt: str = "", parent: int | None = None
) -> list[int]:
    """Chained 64-bit hashes of the full blocks of a packed prompt. Unlike `blocks.chain_hashes`, not to be trusted.

    Equal prefixes under one salt have equal hashes. Others could be made to collide, which costs a wrong guess here.
    `parent` is the hash of the block before the first token.
    """
    size = block_tokens * TOKEN_BYTES
    packed, hashes = memoryview(prompt), list[int]()
    last = xxh3_64_intdigest(salt.encode()) if parent is None else parent
    for start in range(0, len(prompt) - size + 1, size):
        last = xxh3_64_intdigest(packed[start : start + size], last)
        hashes.append(last)
    return hashes


@dataclass(slots=True, eq=False)
class _Holder:
    """One incarnation of a worker. `bit` is a power of two; `believed` is in order of use, the latest last."""

    bit: int
    capacity: int
    count: int = 0
    digest: int = 0
    tells: bool = False
    believed: OrderedDict[int, None] = field(default_factory=OrderedDict)


class PrefixIndex:
    """Blocks of one size to the workers that hold them. Owned by one router.

    A worker that leaves, or whose entries are to be replaced, is forgotten at once: its bit counts no more. It is given
    to another when every entry that has it was swept, a few with every change. `bits` is how many were ever needed.
    """

    def __init__(self) -> None:
        self.bits = 0
        self._planes: list[dict[int, int]] = [{} for _ in range(len(TIERS) + 1)]  # hash to holders
        self._swept: list[dict[int, int]] = [{} for _ in self._planes]  # the same, of entries still to be looked at
        self._seated: dict[Incarnation, _Holder] = {}
        self._order: npt.NDArray[np.intp] = np.empty(0, np.intp)  # numbers of the seated workers' bits
        self._alive = 0
        self._free_bits: list[int] = []
        self._dead = 0  # bits that no entry of `_planes` gets any more
        self._dying = 0  # those that are being swept
        self._graves: list[OrderedDict[int, None]] = []
        self._sets: dict[int, int] = {}  # equal sets of holders are one object

    def __len__(self) -> int:
        """Entries: different blocks in each tier, those of workers that left included until they are swept."""
        return sum(len(plane) for plane in (*self._planes, *self._swept))

    def seat(self, workers: Sequence[Incarnation], capacities: Sequence[int]) -> None:
        """These incarnations are there now, with room for so many blocks; the others are forgotten."""
        before, self._seated = self._seated, {}
        for worker, capacity in zip(workers, capacities, strict=True):
            known = before.pop(worker) if worker in before else None
            self._seated[worker] = known or _Holder(self._take_bit(), capacity)
        for holder in before.values():
            self._bury(holder)
        self._seat_bits()

    def __contains__(self, worker: Incarnation) -> bool:
        """Whether it has a seat."""
        return worker in self._seated

    # Events. All raise KeyError for a worker without a seat.

    def stored(self, worker: Incarnation, hashes: Sequence[int], tier: int = DEVICE) -> None:
        """It holds these blocks. Idempotent."""
        holder = self._seated[worker]
        plane, bit, sets = self._changed(tier, hashes), holder.bit, self._sets
        for block in hashes:
            holders = plane.get(block)
            if holders is None:
                plane[block] = bit
            elif holders & bit:
                continue
            else:
                plane[block] = sets.setdefault(holders | bit, holders | bit)
            if not tier:
                holder.count += 1
                holder.digest ^= block
        if len(sets) > _INTERNED:
            sets.clear()

    def removed(self, worker: Incarnation, hashes: Sequence[int], tier: int = DEVICE) -> None:
        """It does not hold these blocks any more, whatever was believed. Idempotent."""
        holder = self._seated[worker]
        for block in filter(holder.believed.__contains__, hashes):
            self._disbelieve(holder, block)
        plane, bit = self._changed(tier, hashes), holder.bit
        for block in hashes:
            holders = plane.get(block, 0)
            if not holders & bit:
                continue
            if holders == bit:
                del plane[block]
            else:
                plane[block] = holders ^ bit
            if not tier:
                holder.count -= 1
                holder.digest ^= block

    def cleared(self, worker: Incarnation) -> None:
        """It holds nothing, in any tier."""
        holder = self._seated[worker]
        self._bury(holder)
        self._seated[worker] = _Holder(self._take_bit(), holder.capacity, tells=holder.tells)
        self._seat_bits()

    def tell(self, worker: Incarnation, tells: bool) -> None:
        """Whether events say from now on what it holds: beliefs about it then end with `doubt`."""
        self._seated[worker].tells = tells

    def digest(self, worker: Incarnation) -> tuple[int, int]:
        """How many blocks it holds in its device tier as far as events told, and the XOR of their hashes."""
        holder = self._seated[worker]
        return holder.count, holder.digest

    # Beliefs

    def learn(self, worker: Incarnation, hashes: Sequence[int]) -> Sequence[int]:
        """A prompt of these blocks goes there. Returns what of it should end with `doubt`: all that is news of it.

        Raises KeyError for a worker without a seat.
        """
        holder = self._seated[worker]
        if holder.tells:
            hashes = hashes[self._count(hashes, holder.bit) :]
        plane, believed, bit, sets = self._changed(_BELIEF, hashes), holder.believed, holder.bit, self._sets
        for block in reversed(hashes):  # the last first, so that a prefix is forgotten from its end
            believed[block] = None
            believed.move_to_end(block)
            holders = plane.get(block, 0)
            if not holders & bit:
                plane[block] = sets.setdefault(holders | bit, holders | bit)
        while len(believed) > holder.capacity:
            self._disbelieve(holder, next(iter(believed)))
        return hashes if holder.tells else ()

    def doubt(self, worker: Incarnation, hashes: Sequence[int]) -> None:
        """If it tells events they have told of these blocks by now, or never will. Idempotent."""
        holder = self._seated.get(worker)
        if holder is not None and holder.tells:
            for block in hashes:
                if block in holder.believed:
                    self._disbelieve(holder, block)

    # Questions

    def longest(self, hashes: Sequence[int], tiers: int = len(TIERS)) -> Lengths:
        """For each worker, in the order of its seat: of how many blocks it holds this prefix.

        In the first so many tiers, beliefs included.
        """
        lengths = np.zeros(self.bits, np.int64)
        for live, blocks in self._runs(hashes, self._finder(tiers)):
            if live.bit_count() <= 4:
                while live:
                    lowest = live & -live
                    lengths[lowest.bit_length() - 1] += blocks
                    live ^= lowest
            else:
                lengths[_as_mask(live, self.bits)] += blocks
        return lengths[self._order]

    def count_held(self, worker: Incarnation, hashes: Sequence[int]) -> int:
        """The same for one worker, with a look at every block. Raises KeyError for one without a seat."""
        return self._count(hashes, self._seated[worker].bit)

    @property
    def has_lower_tiers(self) -> bool:
        """Whether anything is known to be held elsewhere than on a device."""
        return any(self._planes[1:_BELIEF]) or any(self._swept[1:_BELIEF])

    def _runs(self, hashes: Sequence[int], find: Callable[[int], int]) -> Iterator[tuple[int, int]]:
        """Those who hold everything so far, and for how many more blocks it stays these."""
        live, start, blocks = self._alive, 0, len(hashes)
        while start < blocks:
            live &= find(hashes[start])
            if not live:
                return
            end = _reach(hashes, start, live, find)
            yield live, end - start
            start = end

    def _count(self, hashes: Sequence[int], bit: int) -> int:
        find = self._finder(len(TIERS))
        for number, block in enumerate(hashes):
            if not find(block) & bit:
                return number
        return len(hashes)

    def _finder(self, tiers: int) -> Callable[[int], int]:
        """Holders of a block in these tiers."""
        planes = [*self._planes[:tiers], self._planes[_BELIEF], *self._swept[:tiers], self._swept[_BELIEF]]
        gets = [plane.get for plane in planes if plane]
        if len(gets) == 1:
            only = gets[0]
            return lambda block: only(block, 0)
        if len(gets) == 2:
            one, other = gets
            return lambda block: one(block, 0) | other(block, 0)

        def find(block: int) -> int:
            holders = 0
            for get in gets:
                holders |= get(block, 0)
            return holders

        return find

    # Bits

    def _seat_bits(self) -> None:
        self._order = np.array([holder.bit.bit_length() - 1 for holder in self._seated.values()], np.intp)
        self._alive = sum(holder.bit for holder in self._seated.values())

    def _take_bit(self) -> int:
        if self._free_bits:
            return self._free_bits.pop()
        self.bits += 1
        return 1 << (self.bits - 1)

    def _bury(self, holder: _Holder) -> None:
        self._dead |= holder.bit
        self._graves.append(holder.believed)

    # Sweeping: entries move from a plane's old table to its new one, which leaves out who died before that began.

    def _changed(self, tier: int, hashes: Sequence[int]) -> dict[int, int]:
        """The plane of `tier`, in which entries of these blocks may be changed now."""
        if self._dead and not self._dying:
            self._dying, self._dead = self._dead, 0
            self._planes, self._swept = self._swept, self._planes
        if self._dying:
            old, plane, kept = self._swept[tier], self._planes[tier], ~self._dying
            for block in hashes:
                if holders := old.pop(block, 0) & kept:
                    plane[block] = holders
            self._sweep(_SWEEP + len(hashes))
        return self._planes[tier]

    def _sweep(self, entries: int) -> None:
        kept = ~self._dying
        for plane, old in zip(self._planes, self._swept, strict=True):
            while old and entries:
                block, holders = old.popitem()
                entries -= 1
                if holders & kept:
                    plane[block] = holders & kept
        while self._graves and entries:
            entries -= 1
            if self._graves[-1]:
                self._graves[-1].popitem()
            else:
                self._graves.pop()
        if entries:
            self._free_bits += [1 << number for number in range(self.bits) if self._dying >> number & 1]
            self._dying = 0

    def _disbelieve(self, holder: _Holder, block: int) -> None:
        del holder.believed[block]
        plane = self._changed(_BELIEF, (block,))
        if left := plane.get(block, 0) & ~holder.bit:
            plane[block] = left
        else:
            plane.pop(block, None)


def _reach(hashes: Sequence[int], start: int, live: int, find: Callable[[int], int]) -> int:
    """The first block after `start`, which they hold, that not all of `live` hold; as if they held no block later."""
    held, lost = start, len(hashes)
    if find(hashes[lost - 1]) & live == live:
        return lost
    lost, step = lost - 1, 1
    while held + step < lost:
        if find(hashes[held + step]) & live == live:
            held, step = held + step, 2 * step
        else:
            lost = held + step
            break
    while held + 1 < lost:
        middle = (held + lost) // 2
        if find(hashes[middle]) & live == live:
            held = middle
        else:
            lost = middle
    return lost


def _as_mask(bits: int, size: int) -> npt.NDArray[np.bool_]:
    packed = np.frombuffer(bits.to_bytes(-(-size // 8), "little"), np.uint8)
    return np.unpackbits(packed, count=size, bitorder="little").astype(np.bool_)
