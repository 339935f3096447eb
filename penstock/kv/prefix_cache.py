"""The prefix cache: full blocks stay after their sequence ends and serve the next prompt with the same beginning.

Of a group that keeps a window only the last blocks of a prefix are needed. So a long prefix may be found where none
shorter is, and it is looked for from its end.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import chain

from penstock.blocks import HOLE, BlockHash, BlockId
from penstock.errors import OutOfBlocks
from penstock.kv.journal import UNTOLD, Journal, Origin
from penstock.kv.pool import BlockPool


class PrefixCache:
    """All blocks of one region: handed out, found again by hash, evicted least recently used first.

    A block is findable from `publish` until it is evicted. Two sequences that computed the same block at the same
    time both keep theirs; only the first is findable. Owned by one worker. `reads` is that of the layout, see `blocks`.
    `journal` hears what can be found of the first group. Holes of block tables are passed over.
    """

    def __init__(self, blocks: int, journal: Journal | None = None, reads: Sequence[int | None] = (None,)) -> None:
        self.journal = journal
        self._pool = BlockPool(blocks)
        self._reads = reads
        self._by_hash: list[dict[BlockHash, BlockId]] = [{} for _ in reads]  # by group
        self._name_of: dict[BlockId, tuple[int, BlockHash]] = {}  # group, and hash in it
        self._whole = [found for found, count in zip(self._by_hash, reads, strict=True) if count is None]
        self._windows = [(found, count) for found, count in zip(self._by_hash, reads, strict=True) if count is not None]
        # Findable, held by nobody; oldest first. The first of a plain dict takes ever longer to find as others went.
        self._idle: OrderedDict[BlockId, None] = OrderedDict()

    @property
    def blocks(self) -> int:
        return self._pool.blocks

    @property
    def available(self) -> int:
        """Blocks that `take` can give: free ones and those it may evict."""
        return self._pool.free + len(self._idle)

    @property
    def quarantined(self) -> int:
        return self._pool.quarantined

    def take(self, count: int) -> list[BlockId]:
        """`count` blocks for writing, evicting where needed. Raises OutOfBlocks and takes none if too few."""
        if count > self.available:
            raise OutOfBlocks(
                f"{count} blocks wanted, {self.available} of {self.blocks} are free or evictable; "
                "wait for running requests, or raise --kv-gib"
            )
        while self._pool.free < count:
            self._evict_oldest()
        return self._pool.take(count)

    def match(self, hashes: Sequence[BlockHash]) -> list[BlockId]:
        """The block table of the longest cached prefix, each block held once more; give them back with `release`."""
        length = self.count_cached(hashes)
        columns = [
            [HOLE] * first + [found[digest] for digest in hashes[first:length]]
            for found, first in zip(self._by_hash, self._first_read(length), strict=True)
        ]
        table = columns[0] if len(columns) == 1 else list(chain.from_iterable(zip(*columns, strict=True)))
        for block in table:
            if block != HOLE:
                self._hold(block)
        return table

    def count_cached(self, hashes: Sequence[BlockHash]) -> int:
        """Of how many hashes `match` would return blocks."""
        length = len(hashes)
        for found in self._whole:
            length = next((index for index in range(length) if hashes[index] not in found), length)
        while (lacking := self._find_lacking(hashes, length)) is not None:
            length = lacking  # whatever is longer, up to here, needs that one too
        return length

    def hold(self, blocks: Sequence[BlockId]) -> None:
        """One reference more for each of these, which the caller holds already."""
        for block in blocks:
            if block != HOLE:
                self._pool.hold(block)

    def publish(
        self, block: BlockId, digest: BlockHash, route: int = 0, origin: Origin = UNTOLD, group: int = 0
    ) -> None:
        """`block` of `group`, held by the caller, is full, computed and will not change: others may find it.

        `route` and `origin` are what the journal is to say of it.
        """
        if digest not in self._by_hash[group] and block not in self._name_of:
            self._by_hash[group][digest] = block
            self._name_of[block] = (group, digest)
            if self.journal is not None and group == 0:
                self.journal.stored(block, route, origin)

    def release(self, blocks: Sequence[BlockId]) -> None:
        """One reference less for each. Findable ones are kept; of one sequence the tail is evicted first."""
        for block in reversed(blocks):
            if block == HOLE or not self._pool.drop(block):
                continue
            if block in self._name_of:
                self._idle[block] = None
            else:
                self._pool.free_idle(block)

    def quarantine(self, blocks: Sequence[BlockId]) -> None:
        """Takes blocks out of circulation: held once, never published, and perhaps still being written."""
        self._pool.quarantine(blocks)

    def readmit(self, blocks: Sequence[BlockId]) -> None:
        """Ends the quarantine of blocks that nobody can write any more."""
        self._pool.readmit(blocks)

    def check_integrity(self) -> None:
        """Raises AssertionError unless every block is accounted for exactly once."""
        self._pool.check_integrity(idle=len(self._idle))
        named = {block: (group, digest) for group, found in enumerate(self._by_hash) for digest, block in found.items()}
        if named != self._name_of:
            raise AssertionError("the cache finds a block under a hash that it does not carry")
        if any(block not in self._name_of for block in self._idle):
            raise AssertionError("an idle block cannot be found")

    def _first_read(self, length: int) -> list[int]:
        """By group, the first of a prefix of so many blocks that what follows reads."""
        return [0 if count is None else max(0, length - count) for count in self._reads]

    def _find_lacking(self, hashes: Sequence[BlockHash], length: int) -> int | None:
        """A block that windows read after a prefix of so many, and that is not cached."""
        for found, count in self._windows:
            for index in range(length - 1, max(0, length - count) - 1, -1):
                if hashes[index] not in found:
                    return index
        return None

    def _hold(self, block: BlockId) -> None:
        if self._pool.hold(block) == 1:
            del self._idle[block]

    def _evict_oldest(self) -> None:
        block, _ = self._idle.popitem(last=False)
        group, digest = self._name_of.pop(block)
        del self._by_hash[group][digest]
        if self.journal is not None:
            self.journal.evicted(block)
        self._pool.free_idle(block)
