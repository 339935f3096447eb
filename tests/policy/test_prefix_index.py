"""What workers tell and what is believed of them: as a naive model has it, and gone when it should be."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import reduce
from operator import xor

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from penstock.policy.prefix_index import DEVICE, TIERS, Incarnation, PrefixIndex, prefix_hashes
from penstock.tokens import pack

A, B = ("a", 1), ("b", 1)


workers = st.tuples(st.sampled_from("abcdefgh"), st.integers(1, 3))
prompts = st.lists(st.integers(0, 1), max_size=6).map(lambda ids: prefix_hashes(pack(ids), 1))


class Model:
    """The same by lists and sets: what workers tell, and what they are believed to hold, the latest used last."""

    def __init__(self) -> None:
        self.capacity: dict[Incarnation, int] = {}
        self.told: dict[Incarnation, list[set[int]]] = {}
        self.believed: dict[Incarnation, list[int]] = {}
        self.tells: set[Incarnation] = set()

    def seat(self, workers: Sequence[Incarnation], capacities: Sequence[int]) -> None:
        before = self.capacity
        self.capacity = {who: before.get(who, room) for who, room in zip(workers, capacities, strict=True)}
        self.told = {who: self.told.get(who) or [set() for _ in TIERS] for who in workers}
        self.believed = {who: self.believed.get(who, []) for who in workers}
        self.tells &= set(workers)

    def holds(self, who: Incarnation, block: int, tiers: int = len(TIERS)) -> bool:
        return block in self.believed[who] or any(block in tier for tier in self.told[who][:tiers])

    def count(self, who: Incarnation, hashes: Sequence[int], tiers: int = len(TIERS)) -> int:
        missing = [number for number, block in enumerate(hashes) if not self.holds(who, block, tiers)]
        return missing[0] if missing else len(hashes)

    def learn(self, who: Incarnation, hashes: Sequence[int]) -> Sequence[int]:
        if who in self.tells:
            hashes = hashes[self.count(who, hashes) :]
        kept = [block for block in self.believed[who] if block not in hashes] + list(reversed(hashes))
        self.believed[who] = kept[max(0, len(kept) - self.capacity[who]) :]
        return hashes if who in self.tells else ()


class Machine(RuleBasedStateMachine):
    """Whatever happens, the index says what the lists do, as long as who holds a block holds what is before it."""

    def __init__(self) -> None:
        super().__init__()
        self.index, self.model = PrefixIndex(), Model()
        self.news: list[tuple[Incarnation, Sequence[int]]] = []

    def who(self, number: int) -> Incarnation | None:
        seated = list(self.model.capacity)
        return seated[number % len(seated)] if seated else None

    @rule(workers=st.dictionaries(workers, st.integers(0, 8), max_size=8))
    def seat(self, workers: dict[Incarnation, int]) -> None:
        self.index.seat(list(workers), list(workers.values()))
        self.model.seat(list(workers), list(workers.values()))

    @rule(number=st.integers(0, 7), hashes=prompts, tier=st.integers(0, len(TIERS) - 1))
    def stored(self, number: int, hashes: list[int], tier: int) -> None:
        if who := self.who(number):
            self.index.stored(who, hashes, tier)
            self.model.told[who][tier].update(hashes)

    @rule(number=st.integers(0, 7), hashes=prompts, kept=st.integers(0, 6), tier=st.integers(0, len(TIERS) - 1))
    def removed(self, number: int, hashes: list[int], kept: int, tier: int) -> None:
        if who := self.who(number):
            self.index.removed(who, hashes[kept:], tier)
            self.model.told[who][tier].difference_update(hashes[kept:])
            self.model.believed[who] = [block for block in self.model.believed[who] if block not in hashes[kept:]]

    @rule(number=st.integers(0, 7))
    def cleared(self, number: int) -> None:
        if who := self.who(number):
            self.index.cleared(who)
            self.model.told[who] = [set() for _ in TIERS]
            self.model.believed[who] = []

    @rule(number=st.integers(0, 7), tells=st.booleans())
    def tell(self, number: int, tells: bool) -> None:
        if who := self.who(number):
            self.index.tell(who, tells)
            self.model.tells = self.model.tells | {who} if tells else self.model.tells - {who}

    @rule(number=st.integers(0, 7), hashes=prompts)
    def learn(self, number: int, hashes: list[int]) -> None:
        if who := self.who(number):
            news = self.index.learn(who, hashes)
            assert list(news) == list(self.model.learn(who, hashes))
            self.news.append((who, news))

    @precondition(lambda self: self.news)
    @rule()
    def doubt(self) -> None:
        who, news = self.news.pop(0)
        self.index.doubt(who, news)
        if who in self.model.tells:
            self.model.believed[who] = [block for block in self.model.believed[who] if block not in news]

    @rule(hashes=prompts, tiers=st.sampled_from([1, len(TIERS)]))
    def ask(self, hashes: list[int], tiers: int) -> None:
        lengths = dict(zip(self.model.capacity, self.index.longest(hashes, tiers).tolist(), strict=True))
        for who, length in lengths.items():
            assert self.index.count_held(who, hashes) == self.model.count(who, hashes)
            held = [self.model.holds(who, block, tiers) for block in hashes]
            if held == sorted(held, reverse=True):
                assert length == sum(held)

    @invariant()
    def digests_are_those_of_what_was_told(self) -> None:
        for who, tiers in self.model.told.items():
            assert self.index.digest(who) == (len(tiers[DEVICE]), reduce(xor, tiers[DEVICE], 0))


TestIndex = Machine.TestCase
TestIndex.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def test_a_prompt_is_known_as_far_as_it_is_shared() -> None:
    index = PrefixIndex()
    index.seat([A, B], [100, 100])
    index.learn(A, prefix_hashes(pack(range(64)), 16))
    asked = prefix_hashes(pack([*range(32), *range(32)]), 16)
    assert index.longest(asked).tolist() == [2, 0]
    index.learn(B, asked)
    assert index.longest(asked).tolist() == [2, 4]


def test_tenants_share_nothing() -> None:
    prompt = pack(range(64))
    assert not set(prefix_hashes(prompt, 16, "one")) & set(prefix_hashes(prompt, 16, "other"))
    assert len(prefix_hashes(prompt, 16)) == 4
    assert len(prefix_hashes(prompt[:-4], 16)) == 3


def test_hashes_go_on_after_a_block_and_take_little_memory() -> None:
    whole = prefix_hashes(pack(range(2_000)), 1)
    assert prefix_hashes(pack(range(1_000, 2_000)), 1, parent=whole[999]) == whole[1_000:]
    assert max(map(sys.getsizeof, whole)) == sys.getsizeof(1 << 59)


def test_equal_blocks_after_different_ones_differ() -> None:
    one, other = prefix_hashes(pack([1, 2]), 1), prefix_hashes(pack([3, 2]), 1)
    assert not set(one) & set(other)


def test_a_prefix_is_forgotten_from_its_end() -> None:
    index = PrefixIndex()
    index.seat([A], [4])
    old, new = prefix_hashes(pack(range(4)), 1), prefix_hashes(pack(range(10, 12)), 1)
    index.learn(A, old)
    index.learn(A, new)
    assert index.longest(old).tolist() == [2]
    assert index.longest(new).tolist() == [2]


def test_a_worker_that_was_restarted_holds_nothing() -> None:
    index, hashes = PrefixIndex(), prefix_hashes(pack(range(300)), 1)
    index.seat([A, B], [1_000, 1_000])
    index.learn(A, hashes)
    index.seat([B, ("a", 2)], [1_000, 1_000])
    assert index.longest(hashes).tolist() == [0, 0]


def test_what_left_is_swept_away_in_time_and_its_bit_used_again() -> None:
    index, hashes = PrefixIndex(), prefix_hashes(pack(range(300)), 1)
    for epoch in range(1, 50):
        index.seat([("a", epoch)], [1_000])
        index.learn(("a", epoch), hashes)
        for _ in range(10):
            index.learn(("a", epoch), hashes[:1])
    assert len(index) == len(hashes)
    assert index.bits <= 2


def test_long_prefixes_that_many_workers_hold_are_counted_in_full() -> None:
    index, workers = PrefixIndex(), [(f"w{number}", 1) for number in range(8)]
    hashes = prefix_hashes(pack(range(1_000)), 1)
    index.seat(workers, [2_000] * 8)
    for worker in workers:
        index.learn(worker, hashes)

    assert index.longest(hashes).tolist() == [1_000] * 8
