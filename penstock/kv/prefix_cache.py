"""The prefix cache: full blocks stay after their sequence ends and serve the next prompt with the same beginning."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from penstock.blocks import BlockHash, BlockId
from penstock.errors import OutOfBlocks
from penstock.kv.journal import UNTOLD, Journal, Origin
from penstock.kv.pool import BlockPool


class PrefixCache:
    """All blocks of one region: handed out, found again by hash, evicted least recently used first.

    A block is findable from `publish` until it is evicted. Two sequences that computed the same block at the same
    time both keep theirs; only the first is findable. Owned by one worker. `journal` hears what can be found.
    """

    def __init__(self, blocks: int, journal: Journal | None = None) -> None:
        self.journal = journal
        self._pool = BlockPool(blocks)
        self._by_hash: dict[BlockHash, BlockId] = {}
        self._hash_of: dict[BlockId, BlockHash] = {}
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

    def match(self, hashes: Iterable[BlockHash]) -> list[BlockId]:
        """Blocks of the longest cached prefix, each held once more; give them back with `release`."""
        found: list[BlockId] = []
        for digest in hashes:
            block = self._by_hash.get(digest)
            if block is None:
                break
            self._hold(block)
            found.append(block)
        return found

    def count_cached(self, hashes: Iterable[BlockHash]) -> int:
        """How many blocks `match` would return."""
        count = 0
        for digest in hashes:
            if digest not in self._by_hash:
                break
            count += 1
        return count

    def hold(self, blocks: Sequence[BlockId]) -> None:
        """One reference more for each of these, which the caller holds already."""
        for block in blocks:
            self._pool.hold(block)

    def publish(self, block: BlockId, digest: BlockHash, route: int = 0, origin: Origin = UNTOLD) -> None:
        """`block`, held by the caller, is full, computed and will not change: others may find it.

        `route` and `origin` are what the journal is to say of it.
        """
        if digest not in self._by_hash and block not in self._hash_of:
            self._by_hash[digest] = block
            self._hash_of[block] = digest
            if self.journal is not None:
                self.journal.stored(block, route, origin)

    def release(self, blocks: Sequence[BlockId]) -> None:
        """One reference less for each. Findable ones are kept; of one sequence the tail is evicted first."""
        for block in reversed(blocks):
            if not self._pool.drop(block):
                continue
            if block in self._hash_of:
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
        if any(self._hash_of[block] != digest for digest, block in self._by_hash.items()):
            raise AssertionError("the cache finds a block under a hash that it does not carry")
        if any(block not in self._hash_of for block in self._idle):
            raise AssertionError("an idle block cannot be found")

    def _hold(self, block: BlockId) -> None:
        if self._pool.hold(block) == 1:
            del self._idle[block]

    def _evict_oldest(self) -> None:
        block, _ = self._idle.popitem(last=False)
        del self._by_hash[self._hash_of.pop(block)]
        if self.journal is not None:
            self.journal.evicted(block)
        self._pool.free_idle(block)
