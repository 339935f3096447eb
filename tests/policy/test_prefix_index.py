"""What workers are believed to hold: as a naive model has it, and gone when it should be."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.policy.prefix_index import PrefixIndex, prefix_hashes
from penstock.tokens import pack

A, B = ("a", 1), ("b", 1)


class Model:
    """The same by lists: blocks of each worker, the latest used last."""

    def __init__(self) -> None:
        self.held: dict[tuple[str, int], tuple[int, list[int]]] = {}

    def seat(self, workers: Sequence[tuple[str, int]], capacities: Sequence[int]) -> None:
        pairs = zip(workers, capacities, strict=True)
        self.held = {worker: self.held.get(worker, (capacity, [])) for worker, capacity in pairs}

    def learn(self, worker: tuple[str, int], hashes: Sequence[int]) -> None:
        capacity, held = self.held[worker]
        kept = [block for block in held if block not in hashes] + list(reversed(hashes))
        self.held[worker] = (capacity, kept[max(0, len(kept) - capacity) :])

    def longest(self, hashes: Sequence[int]) -> list[int]:
        lengths = []
        for _, held in self.held.values():
            missing = [number for number, block in enumerate(hashes) if block not in held]
            lengths.append(missing[0] if missing else len(hashes))
        return lengths


workers = st.tuples(st.sampled_from("abcdefgh"), st.integers(1, 3))
prompts = st.lists(st.integers(0, 1), max_size=6).map(lambda ids: prefix_hashes(pack(ids), 1))
events = st.lists(
    st.one_of(
        st.tuples(st.just("seat"), st.dictionaries(workers, st.integers(0, 8), max_size=8)),
        st.tuples(st.just("learn"), st.tuples(st.integers(0, 7), prompts)),
        st.tuples(st.just("ask"), prompts),
    ),
    max_size=40,
)


@settings(max_examples=300)
@given(events)
def test_it_believes_what_a_naive_model_does(history: list[tuple[str, object]]) -> None:
    index, model = PrefixIndex(), Model()
    for what, subject in history:
        if isinstance(subject, dict):
            index.seat(list(subject), list(subject.values()))
            model.seat(list(subject), list(subject.values()))
        elif isinstance(subject, tuple):
            if model.held:
                worker = list(model.held)[subject[0] % len(model.held)]
                index.learn(worker, subject[1])
                model.learn(worker, subject[1])
        else:
            assert what == "ask"
            assert isinstance(subject, list)
            assert index.longest(subject).tolist() == model.longest(subject)


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
