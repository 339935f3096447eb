"""An engine's events as changes to the index: whatever is lost, repeated or late, it never says more than is true."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, EventBatch, KvEvent, encode_batch
from penstock.policy.kv_feed import Change, Cleared, KvFeed, Removed, Stored, apply, salt_of
from penstock.policy.prefix_index import PrefixIndex, prefix_hashes
from penstock.tokens import pack

WORKER = ("engine", 1)
SIZE = 2


class Engine:
    """Publishes what a cache does, under names of its own, and remembers it for replays."""

    def __init__(self, at_s: float = 0.0) -> None:
        self.at_s = at_s
        self.held: dict[tuple[int, ...], int] = {}  # prefixes to names
        self.messages: list[tuple[int, bytes]] = []
        self._named = 0

    def publish(self, *events: KvEvent) -> None:
        self.at_s += 1
        self.messages.append((len(self.messages), encode_batch(EventBatch(self.at_s, events))))

    def store(self, tokens: Sequence[int]) -> None:
        """Caches a prompt: the blocks that it does not have, as one event."""
        prefixes = [tuple(tokens[: end + SIZE]) for end in range(0, len(tokens) - SIZE + 1, SIZE)]
        known = [prefix for prefix in prefixes if prefix in self.held]
        new = prefixes[len(known) :]
        if not new or known != prefixes[: len(known)]:
            return
        parent = self.held[known[-1]] if known else None
        for prefix in new:
            self._named += 1
            self.held[prefix] = self._named
        ids = tuple(token for prefix in new for token in prefix[-SIZE:])
        self.publish(BlockStored(tuple(self.held[prefix] for prefix in new), parent, ids, SIZE, medium="GPU"))

    def evict(self, place: int) -> None:
        """One of the blocks that no other follows."""
        leaves = [one for one in self.held if not any(other[:-SIZE] == one for other in self.held)]
        if leaves:
            self.publish(BlockRemoved((self.held.pop(leaves[place % len(leaves)]),), medium="GPU"))

    def clear(self) -> None:
        self.held = {}
        self.publish(AllBlocksCleared())

    @property
    def truth(self) -> set[int]:
        """What an index should say it holds."""
        return {prefix_hashes(pack(prefix), SIZE)[-1] for prefix in self.held}


def held(changes: Sequence[Change], before: set[int]) -> set[int]:
    """What is held after these changes, by sets."""
    now = set(before)
    for change in changes:
        match change:
            case Stored(hashes, _):
                now |= set(hashes)
            case Removed(hashes, _):
                now -= set(hashes)
            case Cleared():
                now = set()
    return now


deeds = st.lists(
    st.one_of(
        st.lists(st.integers(0, 1), min_size=SIZE, max_size=8).map(lambda ids: ("store", ids)),
        st.integers(0, 7).map(lambda place: ("evict", place)),
        st.just(("clear", 0)),
    ),
    max_size=30,
)


def played(deeds: Sequence[tuple[str, object]], at_s: float = 0.0) -> Engine:
    engine = Engine(at_s)
    for name, argument in deeds:
        if name == "clear":
            engine.clear()
        else:
            getattr(engine, name)(argument)
    return engine


@st.composite
def deliveries(draw: st.DrawFn) -> tuple[Engine, list[tuple[int, bytes]]]:
    """An engine, and what comes of its messages: some never, some twice, some late."""
    engine = played(draw(deeds))
    order = [(number + draw(st.integers(0, 3)), number) for number in range(len(engine.messages))]
    arrived = [engine.messages[number] for _, number in sorted(order) for _ in range(draw(st.integers(0, 2)))]
    return engine, arrived


@given(deliveries())
def test_with_a_replay_nothing_is_missing(delivery: tuple[Engine, list[tuple[int, bytes]]]) -> None:
    engine, arrived = delivery
    feed, known = KvFeed(), set[int]()
    for message in arrived:
        known = held(feed.take(*message), known)
    known = held(feed.fill(engine.messages[feed.missing or 0 :]), known)
    assert known == engine.truth
    assert len(feed) == len(known)
    assert feed.missing is None


@given(deliveries())
def test_without_one_nothing_is_believed_that_could_be_gone(delivery: tuple[Engine, list[tuple[int, bytes]]]) -> None:
    engine, arrived = delivery
    feed, known = KvFeed(), set[int]()
    for message in arrived:
        known = held(feed.take(*message), known)
        if feed.missing is not None:
            known = held(feed.fill([]), known)
        assert known <= held(all_changes(engine.messages[: feed.expected]), set())


def all_changes(messages: Sequence[tuple[int, bytes]]) -> list[Change]:
    feed = KvFeed()
    return [change for message in messages for change in feed.take(*message)]


@given(deeds, deeds, st.integers(0, 3))
def test_a_restart_forgets_what_was_before(first: list, second: list, lost: int) -> None:
    engine = played(first)
    again = played(second, engine.at_s)
    feed = KvFeed()
    known = held([change for message in engine.messages for change in feed.take(*message)], set())
    for message in again.messages[lost:]:
        known = held(feed.take(*message), known)
        if feed.missing is not None:
            known = held(feed.fill(again.messages[feed.missing :]), known)
    if 0 < len(engine.messages) > lost < len(again.messages):  # its numbers went back, so it could be noticed
        assert feed.counts.restarts == 1
        assert known == again.truth


def stored(feed: KvFeed, *events: KvEvent) -> list[Change]:
    return feed.take(feed.counts.taken, encode_batch(EventBatch(float(feed.counts.taken), events)))


def test_changes_reach_an_index() -> None:
    index, feed = PrefixIndex(), KvFeed()
    index.seat([WORKER], [100])
    apply(stored(feed, BlockStored((7, 8), None, (1, 2, 3, 4), 2, medium="GPU")), index, WORKER)
    apply(stored(feed, BlockStored((9,), 8, (5, 6), 2, medium="CPU")), index, WORKER)
    prompt = prefix_hashes(pack([1, 2, 3, 4, 5, 6]), 2)
    assert list(index.longest(prompt)) == [3]
    assert list(index.longest(prompt, tiers=1)) == [2]
    apply(stored(feed, BlockRemoved((9,), medium="CPU"), BlockRemoved((8,), medium="GPU")), index, WORKER)
    assert list(index.longest(prompt)) == [1]
    apply(stored(feed, AllBlocksCleared()), index, WORKER)
    assert list(index.longest(prompt)) == [0]


def test_adapters_and_tenants_are_told_apart() -> None:
    plain, theirs = salt_of(None, None), salt_of("sql", "acme")
    feed = KvFeed()
    keys = (["sql", "acme"], ["sql"])
    (change,) = stored(feed, BlockStored((1, 2), None, (1, 2, 3, 4), 2, lora_name="sql", extra_keys=keys))
    assert isinstance(change, Stored)
    assert change.hashes == prefix_hashes(pack([1, 2, 3, 4]), 2, theirs) != prefix_hashes(pack([1, 2, 3, 4]), 2, plain)
    (change,) = stored(feed, BlockStored((3,), 2, (5, 6), 2, lora_name="sql", extra_keys=(["sql"],)))
    assert isinstance(change, Stored)
    assert change.hashes == prefix_hashes(pack([1, 2, 3, 4, 5, 6]), 2, theirs)[2:]


def test_an_image_matches_no_text() -> None:
    (change,) = stored(KvFeed(), BlockStored((1, 2), None, (1, 2, 3, 4), 2, extra_keys=(None, [("picture", 0)])))
    assert isinstance(change, Stored)
    text = prefix_hashes(pack([1, 2, 3, 4]), 2)
    assert change.hashes[0] == text[0]
    assert change.hashes[1] != text[1]


def test_what_says_nothing_about_a_prefix_is_counted_and_skipped() -> None:
    feed = KvFeed()
    assert stored(feed, BlockStored((1,), None, (1, 2), 2, group_idx=0, kv_cache_spec_kind="full_attention"))
    window = BlockStored((1,), None, (1, 2), 2, None, None, None, None, 1, "sliding_window", 128)
    assert stored(feed, window, BlockRemoved((1,), group_idx=1)) == []
    assert stored(feed, BlockStored((5,), None, (1, 2, 3, 4), 4, group_idx=0)) == []
    assert stored(feed, BlockStored((6,), 5, (1, 2), 2, group_idx=0)) == []
    counts = feed.counts
    assert (counts.other_groups, counts.other_sizes, counts.orphaned) == (2, 1, 1)
    assert len(feed) == 1


@pytest.mark.parametrize("event", [{"type": "BlockMigrated", "to": "moon"}, ["BlockMigrated", "moon"]])
def test_events_of_an_unknown_kind_are_counted_and_the_others_taken(event: object) -> None:
    feed = KvFeed()
    known = msgspec.to_builtins(BlockStored((1,), None, (1, 2), 2))
    assert len(feed.take(0, msgspec.msgpack.encode([1.0, [event, known]]))) == 1
    assert feed.counts.unknown == 1


def test_after_what_cannot_be_read_nothing_is_known() -> None:
    feed = KvFeed()
    stored(feed, BlockStored((1,), None, (1, 2), 2))
    assert feed.take(1, b"\xc1") == [Cleared()]
    assert feed.counts.unreadable == 1
    assert not len(feed)
