"""A sequence whose KV is in this worker's own region: found in its cache, published there, released at its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from penstock.blocks import HOLE, BlockHash, BlockId, KvLayout, chain_hashes
from penstock.kv.journal import UNTOLD, Origin
from penstock.kv.prefix_cache import PrefixCache
from penstock.policy.prefix_index import prefix_hashes
from penstock.serve.stepper import Run, Stepper
from penstock.tokens import pack


class Resident:
    """What the cache knows of one run. `hashes` name what fills blocks, the first `published` of them findable."""

    def __init__(self, run: Run, cache: PrefixCache, layout: KvLayout, salt: str) -> None:
        self.run = run
        self.hashes: list[BlockHash] = []
        self.published = 0
        self._cache = cache
        self._layout = layout
        self._salt = salt
        self._width = len(layout.keeps)
        self._has_windows = layout.has_windows
        self._trimmed_tokens = 0  # what only tokens up to here read was given back
        self._routes: list[int] = []  # what routers call the blocks of `hashes`; empty where nobody is told
        self._hash_blocks()

    def cached_tokens(self) -> int:
        """How many tokens `match` would find now."""
        return self._cache.count_cached(self._reusable()) * self._layout.block_tokens

    def match(self) -> list[BlockId]:
        """The block table of its cached prefix, each block held once more."""
        return self._cache.match(self._reusable())

    def begin(self) -> None:
        """The run starts, or restarts, with what the cache holds of it."""
        self.run.blocks = self.match()
        self.published = len(self.run.blocks) // self._width
        self.run.computed = self._trimmed_tokens = self.published * self._layout.block_tokens

    def publish(self) -> None:
        """Makes blocks that became full findable, and gives back those that the run will not read again."""
        full = self.run.computed // self._layout.block_tokens
        if full > len(self.hashes):
            self._hash_blocks()
        for entry in range(self.published * self._width, full * self._width):
            self.publish_block(entry, self.run.blocks[entry])
        self.published = max(self.published, full)
        if self._has_windows:
            self._trim()

    def publish_block(self, entry: int, block: BlockId) -> None:
        """`block`, which the caller holds, holds what belongs to that entry of the block table: others may find it."""
        if block == HOLE:
            return
        index, group = divmod(entry, self._width)
        if not self._routes or group:
            self._cache.publish(block, self.hashes[index], group=group)
        else:
            self._cache.publish(block, self.hashes[index], self._routes[index], self._origin(index))

    def leave(self, stepper: Stepper, then: Callable[[], None] = lambda: None) -> None:
        """Takes the run out, and releases what it holds once no step touches it; `then` is called after that."""

        def release() -> None:
            self._cache.release(self.run.blocks)
            self.run.blocks = []
            stepper.wake()
            then()

        stepper.leave(self.run, release)

    def _trim(self) -> None:
        """Of windows that moved on, lets go of what they left behind. It stays cached, until its room is needed."""
        blocks = self.run.blocks
        gone = self._layout.forgotten(self._trimmed_tokens, self.run.computed)
        self._cache.release([blocks[entry] for entry in gone])
        for entry in gone:
            blocks[entry] = HOLE
        self._trimmed_tokens = self.run.computed

    def _reusable(self) -> Sequence[BlockHash]:
        """Blocks that may come from the cache: at least the last token must be computed, and what is to be scored."""
        if self.run.scores is not None:
            return ()
        return self.hashes[: (len(self.run.tokens) - 1) // self._layout.block_tokens]

    def _hash_blocks(self) -> None:
        """Extends `hashes` to all full blocks of the tokens so far."""
        size, known = self._layout.block_tokens, len(self.hashes)
        fresh = pack(self.run.tokens[known * size :])
        self.hashes += chain_hashes(fresh, size, self._salt, self.hashes[-1] if known else None)
        if self._cache.journal is not None:
            self._routes += prefix_hashes(fresh, size, self._salt, self._routes[-1] if known else None)

    def _origin(self, index: int) -> Origin:
        if self._cache.journal is None or not self._cache.journal.keeps_origins:
            return UNTOLD
        size = self._layout.block_tokens
        tokens = pack(self.run.tokens[index * size : (index + 1) * size])
        return Origin(self._routes[index - 1] if index else None, tokens, self._salt)
