"""The prefix cache: what is held is never given away, what is findable is right, and nothing leaks."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from penstock.blocks import BlockHash, BlockId
from penstock.errors import OutOfBlocks
from penstock.kv.prefix_cache import PrefixCache

BLOCKS = 12


def digest(*path: int) -> BlockHash:
    return BlockHash(bytes(path).rjust(16, b"\0"))


def test_released_blocks_are_found_again_and_evicted_tail_first() -> None:
    cache = PrefixCache(4)
    blocks = cache.take(3)
    hashes = [digest(1), digest(1, 2), digest(1, 2, 3)]
    for block, name in zip(blocks, hashes, strict=True):
        cache.publish(block, name)
    cache.release(blocks)
    assert cache.available == 4
    assert cache.match(hashes) == blocks
    cache.release(blocks)
    taken = cache.take(2)
    assert cache.count_cached(hashes) == 2  # the free block went first, then the tail of the sequence
    cache.release(taken)
    cache.check_integrity()


def test_taking_too_many_takes_none_and_says_what_to_do() -> None:
    cache = PrefixCache(3)
    held = cache.take(2)
    with pytest.raises(OutOfBlocks, match=r"2 blocks wanted, 1 of 3 .* raise --kv-gib"):
        cache.take(2)
    assert cache.available == 1
    cache.release(held)


def test_dropping_more_often_than_held_is_a_bug_that_shows() -> None:
    cache = PrefixCache(2)
    blocks = cache.take(1)
    cache.release(blocks)
    with pytest.raises(AssertionError, match="dropped more often"):
        cache.release(blocks)


def test_a_shared_block_cannot_be_quarantined() -> None:
    cache = PrefixCache(2)
    (block,) = cache.take(1)
    cache.publish(block, digest(1))
    assert cache.match([digest(1)]) == [block]
    with pytest.raises(AssertionError, match="shared"):
        cache.quarantine([block])


class CacheMachine(RuleBasedStateMachine):
    """Compares the cache with a plain record of who holds what and what each block contains."""

    held = Bundle("held")
    lent = Bundle("lent")

    def __init__(self) -> None:
        super().__init__()
        self.cache = PrefixCache(BLOCKS)
        self.references: dict[BlockId, int] = {}
        self.content: dict[BlockId, BlockHash] = {}
        self.quarantined = 0

    @rule(target=held, family=st.integers(0, 2), count=st.integers(1, 5))
    def take(self, family: int, count: int) -> list[BlockId]:
        """A sequence of one of three prompts: finds its prefix, takes the rest, computes and publishes it."""
        hashes = [digest(family, index) for index in range(count)]
        found = self.cache.match(hashes)
        for index, block in enumerate(found):
            assert self.content[block] == hashes[index]
        try:
            fresh = self.cache.take(count - len(found))
        except OutOfBlocks:
            assert self.cache.available < count - len(found)
            self.cache.release(found)
            return []
        for index, block in enumerate(fresh, start=len(found)):
            assert self.references.get(block, 0) == 0, "a block somebody holds was given away"
            self.content[block] = hashes[index]
            self.cache.publish(block, hashes[index])
        for block in found + fresh:
            self.references[block] = self.references.get(block, 0) + 1
        return found + fresh

    @rule(blocks=consumes(held))
    def release(self, blocks: list[BlockId]) -> None:
        self.cache.release(blocks)
        for block in blocks:
            self.references[block] -= 1

    @rule(target=lent, count=st.integers(1, 3))
    def lend_and_abort(self, count: int) -> list[BlockId]:
        if count > self.cache.available:
            return []
        blocks = self.cache.take(count)
        for block in blocks:
            assert self.references.get(block, 0) == 0
            self.content.pop(block, None)
        self.cache.quarantine(blocks)
        self.quarantined += count
        for block in blocks:
            self.references[block] = 1_000_000  # nobody may get it
        return blocks

    @rule(blocks=consumes(lent))
    def settle(self, blocks: list[BlockId]) -> None:
        self.cache.readmit(blocks)
        self.quarantined -= len(blocks)
        for block in blocks:
            self.references[block] = 0

    @invariant()
    def accounts_balance(self) -> None:
        self.cache.check_integrity()
        busy = sum(1 for count in self.references.values() if count > 0)
        assert self.cache.available == BLOCKS - busy
        assert self.cache.quarantined == self.quarantined


TestCacheMachine = CacheMachine.TestCase
