"""Block tables of layers that keep a window: what is held, what is found again, and what that takes."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from penstock.blocks import HOLE, MOST_GROUPS, BlockHash, BlockId, Keeps, KvLayout, deal_layers
from penstock.errors import OutOfBlocks
from penstock.kv.prefix_cache import PrefixCache

BLOCK = 4

keeps = st.one_of(st.just("all"), st.integers(1, 20))
layouts = st.lists(keeps, min_size=1, max_size=4).map(
    lambda groups: KvLayout(1, 1, 1, BLOCK, "float32", keeps=tuple(groups))
)


def is_read(layout: KvLayout, entry: int, tokens: int) -> bool:
    """By definition: whether some position of this entry is among those kept for the token after `tokens` others."""
    column, group = divmod(entry, len(layout.keeps))
    kept = layout.keeps[group]
    return kept == "all" or any(tokens - kept <= at < tokens for at in range(column * BLOCK, (column + 1) * BLOCK))


@given(layouts, st.integers(0, 90), st.integers(0, 90))
def test_entries_are_kept_while_a_token_may_read_them(layout: KvLayout, tokens: int, later: int) -> None:
    table = range(layout.entries_for(tokens))
    kept = [entry for entry in table if is_read(layout, entry, tokens)]
    assert list(layout.kept(table, tokens)) == kept
    assert layout.holes(tokens) == len(table) - len(kept)
    if later >= tokens:
        gone = [entry for entry in table if entry in kept and not is_read(layout, entry, later)]
        assert sorted(entry for entry in layout.forgotten(tokens, later) if entry in table) == gone


@given(layouts, st.integers(1, 90), st.integers(1, 30), st.integers(0, 5), st.data())
def test_a_sequence_never_holds_more_blocks_than_are_counted_for_it(
    layout: KvLayout, tokens: int, step: int, cached: int, data: st.DataObject
) -> None:
    computed = after = min(cached * BLOCK, tokens // BLOCK * BLOCK)
    most = layout.blocks_for(tokens, step, after)
    mine = set(range(layout.entries_for(after), layout.entries_for(tokens)))
    while computed < tokens:
        end = min(tokens, computed + data.draw(st.integers(1, step)))
        held = layout.kept(range(layout.entries_for(end)), computed)
        assert len(mine.intersection(held)) <= most
        computed = end


@given(layouts, st.integers(1, 200), st.integers(1, 30), st.integers(1, 300))
def test_the_longest_sequence_that_fits(layout: KvLayout, blocks: int, step: int, most: int) -> None:
    longest = layout.tokens_in(blocks, step, most)
    assert longest <= most
    assert longest == 0 or layout.blocks_for(longest, step) <= blocks
    assert longest == most or layout.blocks_for(longest + 1, step) > blocks


@pytest.mark.parametrize(
    ("kinds", "groups", "layers"),
    [
        (["all"] * 8, ("all",), 8),
        ([128, "all"] * 12, ("all", 128), 12),  # gpt-oss
        (([512] * 5 + ["all"]) * 4 + [512] * 2, ("all", *[512] * 6), 4),  # Gemma 3 of 26 layers
        ([4096] * 32, (4096,), 32),
        ([128] * 47 + ["all"], ("all",), 48),  # would be 48 groups of a layer each
    ],
)
def test_layers_are_dealt_into_groups(kinds: list[Keeps], groups: tuple[Keeps, ...], layers: int) -> None:
    dealt = deal_layers(kinds)
    assert (dealt.keeps, dealt.layers) == (groups, layers)


@given(st.lists(st.sampled_from(["all", 8, 16]), min_size=1, max_size=40))
def test_every_layer_has_a_place_of_its_own_among_its_like(kinds: list[Keeps]) -> None:
    layers, keeps, places = deal_layers(kinds)
    assert len(set(places)) == len(kinds)
    assert len(keeps) <= MOST_GROUPS
    assert all(place < layers for _, place in places)
    if len(keeps) > 1 or keeps != ("all",):
        assert [keeps[group] for group, _ in places] == kinds
        assert layers == min(Counter(kinds).values())


def digest(*path: int) -> BlockHash:
    return BlockHash(bytes(path).rjust(16, b"\0"))


WINDOWED = KvLayout(1, 1, 1, BLOCK, "float32", keeps=("all", 6, 6, 10))
BLOCKS = 60


class WindowedCache(RuleBasedStateMachine):
    """Sequences that grow block by block and let go of what their windows left behind, against a plain record."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.cache = PrefixCache(BLOCKS, reads=WINDOWED.reads)
        self.content: dict[BlockId, tuple[int, BlockHash]] = {}  # what was written last
        self.references: Counter[BlockId] = Counter()

    def findable(self, hashes: list[BlockHash]) -> int:
        """The longest prefix of which everything that the next token reads is in the cache, by trying all."""
        lengths = range(len(hashes), 0, -1)
        return next((length for length in lengths if self.has_all(hashes, length)), 0)

    def has_all(self, hashes: list[BlockHash], length: int) -> bool:
        width = len(WINDOWED.keeps)
        return all(
            hashes[entry // width] in self.cache._by_hash[entry % width]
            for entry in range(length * width)
            if is_read(WINDOWED, entry, length * BLOCK)
        )

    @rule(target=held, family=st.integers(0, 2), columns=st.integers(1, 8))
    def serve(self, family: int, columns: int) -> list[BlockId]:
        width = len(WINDOWED.keeps)
        hashes = [digest(family, index) for index in range(columns)]
        longest = self.findable(hashes)
        assert self.cache.count_cached(hashes) == longest
        table = self.cache.match(hashes)
        assert len(table) == longest * width
        for entry, block in enumerate(table):
            assert (block != HOLE) == is_read(WINDOWED, entry, longest * BLOCK)
            if block != HOLE:
                assert self.content[block] == (entry % width, hashes[entry // width])
                self.references[block] += 1
        for column in range(longest, columns):
            try:
                table += self.take(hashes[column])
            except OutOfBlocks:
                assert self.cache.available < width
                break
            self.forget(table, column * BLOCK, (column + 1) * BLOCK)
        return table

    def take(self, name: BlockHash) -> list[BlockId]:
        fresh = self.cache.take(len(WINDOWED.keeps))
        for group, block in enumerate(fresh):
            assert not self.references[block], "a block somebody holds was given away"
            self.references[block] = 1
            self.content[block] = (group, name)
            self.cache.publish(block, name, group=group)
        return fresh

    def forget(self, table: list[BlockId], before: int, tokens: int) -> None:
        gone = WINDOWED.forgotten(before, tokens)
        self.cache.release([table[entry] for entry in gone])
        for entry in gone:
            if table[entry] != HOLE:
                self.references[table[entry]] -= 1
            table[entry] = HOLE

    @rule(table=consumes(held))
    def release(self, table: list[BlockId]) -> None:
        self.cache.release(table)
        self.references.subtract(block for block in table if block != HOLE)

    @invariant()
    def accounts_balance(self) -> None:
        self.cache.check_integrity()
        assert self.cache.available == BLOCKS - sum(1 for count in self.references.values() if count)


TestWindowedCache = WindowedCache.TestCase


def test_a_prompt_may_be_found_at_its_end_where_its_beginning_alone_is_not() -> None:
    """Of one group with a window of two blocks, the second block was evicted."""
    cache = PrefixCache(6, reads=(2,))
    names = [digest(index) for index in range(4)]
    table = cache.take(4)
    for block, name in zip(table, names, strict=True):
        cache.publish(block, name)
    cache.release(table[:2])  # what the window left behind, and then the rest
    cache.release(table[2:])
    others = cache.take(3)  # the two that were free, and the oldest
    assert [cache.count_cached(names[:length]) for length in range(5)] == [0, 1, 1, 1, 4]
    assert cache.match(names) == [HOLE, HOLE, *table[2:]]
    cache.release([*table[2:], *others])
    cache.check_integrity()
