"""Which worker holds which prefixes: as their KV events tell, and where prompts were sent that no event told of yet.

A block is known by the chained hash of the prompt up to its end; the index maps it to the set of its holders, as the
bits of an integer. The longest prefix of every worker is then found without looking at most of a prompt's blocks: who
holds a block holds what comes before it, so the blocks that a set of workers shares end where a search by doubling and
halving says. Events that were lost, or an engine that evicts from the front, break that assumption; `count_held` looks
at every block for one worker.

Workers that tell no events are believed to hold what they were sent, and to forget what was used longest ago once it
is more than they have room for. For the others that belief fills the time until the event.

Entries lie in many small tables instead of a large one, so that no change ever waits for one to grow: at a million
entries that would be 20 ms.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from penstock.tokens import TOKEN_BYTES

Incarnation: TypeAlias = tuple[str, int]  # a worker's name and epoch
Lengths: TypeAlias = npt.NDArray[np.int64]
_Plane: TypeAlias = list[dict[int, int]]  # hash to holders, in the table that the hash's lowest bits say
_Find: TypeAlias = Callable[[int], int]  # holders of a block

TIERS = ("device", "host", "disk", "remote")  # nearest first; events name them by their numbers here
DEVICE = 0

_SWEEP = 256  # entries of those who left to forget with every change
_BELIEF = len(TIERS)  # the plane of what is only believed
_TABLES = 1 << 10
_TABLE = _TABLES - 1
_INTERNED = 1 << 16
_HASH = (1 << 60) - 1  # integers up to here take 32 bytes, larger ones 48
_STRIDE = 16  # by how much the steps of a search grow


def prefix_hashes(
    prompt: bytes | memoryview, block_tokens: int, salt: str = "", parent: int | None = None
) -> list[int]:
    """Chained 60-bit hashes of the full blocks of a packed prompt. Unlike `blocks.chain_hashes`, not to be trusted.

    Equal prefixes under one salt have equal hashes. Others could be made to collide, which costs a wrong guess here.
    `parent` is the hash of the block before the first token.
    """
    size = block_tokens * TOKEN_BYTES
    packed, hashes = memoryview(prompt), list[int]()
    last = xxh3_64_intdigest(salt.encode()) if parent is None else parent
    for start in range(0, len(prompt) - size + 1, size):
        last = xxh3_64_intdigest(packed[start : start + size], last) & _HASH
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
        self._planes: dict[int, _Plane] = {}  # by tier, those that were ever needed
        self._finders: dict[int, _Find] = {}  # by how many tiers they look into
        self._seated: dict[Incarnation, _Holder] = {}
        self._order: npt.NDArray[np.intp] = np.empty(0, np.intp)  # numbers of the seated workers' bits
        self._alive = 0
        self._free_bits: list[int] = []
        self._dead = 0  # bits that no entry gets any more
        self._graves: list[OrderedDict[int, None]] = []  # what was believed of them
        self._sweeping: Iterator[None] | None = None  # of bits that were dead when it began
        self._sets: dict[int, int] = {}  # equal sets of holders are one object

    def __len__(self) -> int:
        """Entries: different blocks in each tier, those of workers that left included until they are swept."""
        return sum(len(table) for plane in self._planes.values() for table in plane)

    @property
    def is_sweeping(self) -> bool:
        """Whether entries of workers that left are still to be forgotten."""
        return bool(self._dead) or self._sweeping is not None

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
        plane, bit, sets = self._changed(tier), holder.bit, self._sets
        count = digest = 0
        before = after = -1  # neighbours often have one and the same set of holders
        for block in hashes:
            table = plane[block & _TABLE]
            holders = table.get(block)
            if holders is None:
                table[block] = bit
            elif holders is before:
                table[block] = after
            elif holders & bit:
                continue
            else:
                before, after = holders, sets.setdefault(holders | bit, holders | bit)
                table[block] = after
            count += 1
            digest ^= block
        if tier == DEVICE:
            holder.count += count
            holder.digest ^= digest

    def removed(self, worker: Incarnation, hashes: Sequence[int], tier: int = DEVICE) -> None:
        """It does not hold these blocks any more, whatever was believed. Idempotent."""
        holder = self._seated[worker]
        if holder.believed:
            beliefs = self._changed(_BELIEF)
            for block in filter(holder.believed.__contains__, hashes):
                self._disbelieve(beliefs, holder, block)
        plane, bit, sets = self._changed(tier), holder.bit, self._sets
        count = digest = 0
        for block in hashes:
            table = plane[block & _TABLE]
            holders = table.get(block, 0)
            if not holders & bit:
                continue
            if holders == bit:
                del table[block]
            else:
                table[block] = sets.setdefault(holders ^ bit, holders ^ bit)
            count += 1
            digest ^= block
        if tier == DEVICE:
            holder.count -= count
            holder.digest ^= digest

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

    def learn(self, worker: Incarnation, hashes: Sequence[int], held: int = 0) -> Sequence[int]:
        """A prompt of these blocks goes there, which is just found to hold the first so many.

        Returns what of it should end with `doubt`: all that is news of it.

        Raises KeyError for a worker without a seat.
        """
        holder = self._seated[worker]
        if holder.tells:
            hashes = hashes[held:]
            hashes = hashes[self._count(hashes, holder.bit) :]
        plane, believed, bit, sets = self._changed(_BELIEF), holder.believed, holder.bit, self._sets
        before = after = -1
        for block in reversed(hashes):  # the last first, so that a prefix is forgotten from its end
            if block in believed:
                believed.move_to_end(block)
                continue
            believed[block] = None
            table = plane[block & _TABLE]
            holders = table.get(block)
            if holders is None:
                table[block] = bit
            elif holders is before:
                table[block] = after
            elif not holders & bit:
                before, after = holders, sets.setdefault(holders | bit, holders | bit)
                table[block] = after
        while len(believed) > holder.capacity:
            self._disbelieve(plane, holder, next(iter(believed)))
        return hashes if holder.tells else ()

    def doubt(self, worker: Incarnation, hashes: Sequence[int]) -> None:
        """If it tells events they have told of these blocks by now, or never will. Idempotent."""
        holder = self._seated.get(worker)
        if holder is not None and holder.tells:
            plane = self._changed(_BELIEF)
            for block in hashes:
                if block in holder.believed:
                    self._disbelieve(plane, holder, block)

    # Questions

    def longest(self, hashes: Sequence[int], tiers: int = len(TIERS)) -> Lengths:
        """For each worker, in the order of its seat: of how many blocks it holds this prefix.

        In the first so many tiers, beliefs included.
        """
        lengths, find = np.zeros(self.bits, np.int64), self._finder(tiers)
        live, end = self._alive, 0
        while end < len(hashes) and (live := live & find(hashes[end])):
            end = _reach(hashes, end, live, find)
            if live.bit_count() > 4:
                np.putmask(lengths, _as_mask(live, self.bits), end)
            else:
                lengths[_numbers(live)] = end
        return lengths.take(self._order)

    def count_held(self, worker: Incarnation, hashes: Sequence[int]) -> int:
        """The same for one worker, with a look at every block. Raises KeyError for one without a seat."""
        return self._count(hashes, self._seated[worker].bit)

    @property
    def has_lower_tiers(self) -> bool:
        """Whether anything was ever known to be held elsewhere than on a device."""
        return any(0 < tier < _BELIEF for tier in self._planes)

    def _count(self, hashes: Sequence[int], bit: int) -> int:
        if not self._planes:
            return 0
        first, *others = self._planes.values()
        seen = bit  # holders with `bit` among them; neighbours often have one and the same set
        for number, block in enumerate(hashes):
            holders = first[block & _TABLE].get(block, 0)
            if holders is seen:
                continue
            if holders & bit:
                seen = holders
                continue
            for plane in others:
                if plane[block & _TABLE].get(block, 0) & bit:
                    break
            else:
                return number
        return len(hashes)

    def _finder(self, tiers: int) -> _Find:
        if (find := self._finders.get(tiers)) is None:
            planes = [plane for tier, plane in self._planes.items() if tier < tiers or tier == _BELIEF]
            find = self._finders[tiers] = _finder(planes)
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

    # Changes

    def _changed(self, tier: int) -> _Plane:
        """The plane of `tier`, which is about to be changed."""
        if self._dead and self._sweeping is None:
            self._sweeping = self._sweep(self._dead, self._graves)
            self._dead, self._graves = 0, []
        if self._sweeping is not None and sum(1 for _ in islice(self._sweeping, _SWEEP)) < _SWEEP:
            self._sweeping = None
        if len(self._sets) > _INTERNED:
            self._sets.clear()
        if (plane := self._planes.get(tier)) is None:
            plane = self._planes[tier] = [{} for _ in range(_TABLES)]
            self._finders.clear()
        return plane

    def _sweep(self, dying: int, graves: list[OrderedDict[int, None]]) -> Iterator[None]:
        """Takes these bits out of all entries, one entry or table a step, and gives them back."""
        for table in [table for plane in self._planes.values() for table in plane]:
            for block in list(table):
                if table.get(block, 0) & dying:
                    self._strike(table, block, dying)
                yield
            yield
        for believed in graves:
            while believed:
                believed.popitem()
                yield
        self._free_bits += [1 << number for number in _numbers(dying)]

    def _strike(self, table: dict[int, int], block: int, bits: int) -> None:
        """They hold it no more; the entry is there."""
        if left := table[block] & ~bits:
            table[block] = self._sets.setdefault(left, left)
        else:
            del table[block]

    def _disbelieve(self, plane: _Plane, holder: _Holder, block: int) -> None:
        del holder.believed[block]
        self._strike(plane[block & _TABLE], block, holder.bit)


def _reach(hashes: Sequence[int], start: int, live: int, find: _Find) -> int:
    """The first block after `start`, which they hold, that not all of `live` hold; as if they held no block later."""
    held, lost = start, len(hashes)
    if find(hashes[lost - 1]) & live == live:
        return lost
    lost, step = lost - 1, 1
    while held + step < lost:
        if find(hashes[held + step]) & live == live:
            held, step = held + step, _STRIDE * step
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


def _finder(planes: Sequence[_Plane]) -> _Find:
    if len(planes) == 1:
        (only,) = planes
        return lambda block: only[block & _TABLE].get(block, 0)
    if len(planes) == 2:
        one, other = planes
        return lambda block: one[block & _TABLE].get(block, 0) | other[block & _TABLE].get(block, 0)

    def find(block: int) -> int:
        holders = 0
        for plane in planes:
            holders |= plane[block & _TABLE].get(block, 0)
        return holders

    return find


def _numbers(bits: int) -> list[int]:
    found = []
    while bits:
        lowest = bits & -bits
        found.append(lowest.bit_length() - 1)
        bits ^= lowest
    return found


def _as_mask(bits: int, size: int) -> npt.NDArray[np.bool_]:
    packed = np.frombuffer(bits.to_bytes(-(-size // 8), "little"), np.uint8)
    return np.unpackbits(packed, count=size, bitorder="little").view(np.bool_)
