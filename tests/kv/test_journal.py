"""The journal: who follows it from a snapshot on knows what the cache holds, whatever happens in between."""

from __future__ import annotations

from functools import reduce
from operator import xor

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from penstock.blocks import BlockHash, BlockId
from penstock.kv.journal import Journal, Origin
from penstock.kv.prefix_cache import PrefixCache

BLOCKS, MOST_PENDING = 8, 5

routes = st.integers(1, 12)


class Follower:
    """A set of route hashes, kept by snapshots and changes."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.calls = 0
        self.following = journal.follow()
        self.tail = self.following.__enter__()
        self.tail.on_change = self.on_change
        self.begin()

    def on_change(self) -> None:
        self.calls += 1

    def begin(self) -> None:
        self.held = set(self.journal.snapshot(self.tail).tolist())
        self.count, self.digest = self.journal.count, self.journal.digest

    def follow(self) -> None:
        if self.tail.is_cut:
            self.begin()
            return
        for route, origin in self.tail.take().items():
            if origin is None:
                self.held.discard(route)
            else:
                self.held.add(route)
        self.count, self.digest = self.journal.count, self.journal.digest


class Machine(RuleBasedStateMachine):
    """A plain set of what can be found, and followers who look now and then."""

    @initialize()
    def begin(self) -> None:
        self.journal = Journal(BLOCKS, most_pending=MOST_PENDING)
        self.by_block: dict[int, int] = {}
        self.followers = [Follower(self.journal)]

    @rule(block=st.integers(0, BLOCKS - 1), route=routes)
    def store(self, block: int, route: int) -> None:
        if block not in self.by_block:
            self.journal.stored(BlockId(block), route)
            self.by_block[block] = 0 if route in self.by_block.values() else route  # only the first is told of

    @rule(block=st.integers(0, BLOCKS - 1))
    def evict(self, block: int) -> None:
        if block in self.by_block:
            del self.by_block[block]
            self.journal.evicted(BlockId(block))

    @rule()
    def join(self) -> None:
        self.followers.append(Follower(self.journal))

    @rule(number=st.integers(0, 3))
    def look(self, number: int) -> None:
        follower = self.followers[number % len(self.followers)]
        follower.follow()
        assert follower.held == self.told()
        assert (follower.count, follower.digest) == (len(follower.held), reduce(xor, follower.held, 0))

    @invariant()
    def counts_are_right(self) -> None:
        assert (self.journal.count, self.journal.digest) == (len(self.told()), reduce(xor, self.told(), 0))
        for follower in self.followers:
            assert len(follower.tail) <= MOST_PENDING
            assert follower.tail.is_cut or len(follower.tail) or follower.held == self.told()

    def told(self) -> set[int]:
        return {route for route in self.by_block.values() if route}


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestJournal = Machine.TestCase


def test_only_the_last_change_of_a_block_counts_and_only_the_first_one_calls() -> None:
    journal = Journal(4, keeps_origins=True)
    calls: list[None] = []
    with journal.follow() as tail:
        tail.on_change = lambda: calls.append(None)
        journal.stored(BlockId(0), 7, Origin(None, b"one", "salt"))
        journal.stored(BlockId(1), 8, Origin(7, b"two", "salt"))
        journal.evicted(BlockId(1))
        journal.stored(BlockId(2), 9, Origin(7, b"three", "salt"))
        assert list(tail.take().items()) == [
            (7, Origin(None, b"one", "salt")),
            (8, None),
            (9, Origin(7, b"three", "salt")),
        ]
        assert len(calls) == 1
        journal.evicted(BlockId(0))
        assert len(calls) == 2
    journal.evicted(BlockId(2))
    assert len(tail) == 1  # whoever left is told nothing


def test_a_tail_that_nobody_reads_is_cut() -> None:
    journal = Journal(100, most_pending=10)
    with journal.follow() as tail:
        for block in range(50):
            journal.stored(BlockId(block), block + 1)
        assert tail.is_cut and not len(tail)
        assert sorted(journal.snapshot(tail).tolist()) == list(range(1, 51))
        assert not tail.is_cut
        journal.evicted(BlockId(0))
        assert tail.take() == {1: None}


def test_the_cache_tells_what_can_be_found() -> None:
    journal = Journal(2)
    cache = PrefixCache(2, journal)
    blocks = cache.take(2)
    for number, block in enumerate(blocks):
        cache.publish(block, BlockHash(bytes([number] * 16)), route=number + 1)
    cache.publish(blocks[1], BlockHash(bytes(16)), route=9)  # found under another name already
    assert (journal.count, journal.digest) == (2, 1 ^ 2)
    cache.release(blocks)
    cache.take(1)
    assert (journal.count, journal.digest) == (1, 1)
