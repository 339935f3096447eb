"""Plans between layouts, against a plain reference: a dense array of [token, layer, side, head, dim] for each group.

A worker is some regions of bytes, one for each rank. Elements of the source are numbered, so that every byte that
arrives tells where it is from; every other byte of the target must stay as it was.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from penstock.blocks import DTYPE_BYTES, BlockId, KvGroup, KvLayout, Sharding
from penstock.errors import KvError
from penstock.kv.reshard import Plan, Ranges, check, plan

LAYERS, DIM = 2, 2
TP, HEADS, BLOCK_TOKENS = (1, 2, 4, 8), (1, 2, 8), (16, 32, 64)
NUMBERS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}  # what elements are numbered with, by their bytes


def full(heads: int, block_tokens: int, dtype: str = "float32") -> KvGroup:
    return KvGroup(KvLayout(LAYERS, heads, DIM, block_tokens, dtype))


def groups(heads: int, block_tokens: int) -> tuple[KvGroup, ...]:
    """One of each kind, with shapes of their own."""
    return (
        full(heads, block_tokens),
        KvGroup(KvLayout(1, heads, DIM, block_tokens, "bfloat16"), keeps=40),
        KvGroup(KvLayout(LAYERS, 1, DIM + 1, block_tokens, "float32", sides=1)),
        KvGroup(KvLayout(1, heads, 3 * DIM, 1, "float32", sides=1), keeps="state"),
    )


class Worker:
    """Regions of all ranks, the groups of a sharding one after the other in each, and random block tables."""

    def __init__(self, model: str, shapes: Sequence[KvGroup], tp: int, tokens: int, rng: Random) -> None:
        placed, self.tables, self.room, end = [], [], [], 0
        for group in shapes:
            needed = 1 if group.keeps == "state" else group.layout.blocks_for(tokens)
            room = needed + 3
            self.tables.append([BlockId(block) for block in rng.sample(range(room), needed)])
            self.room.append(room)
            placed.append(KvGroup(group.layout, group.keeps, end))
            end += room * Sharding(model, (group,), tp).layout(group).block_bytes
        self.sharding = Sharding(model, tuple(placed), tp)
        self.regions = np.full((tp, end), 0xEE, np.uint8)

    def elements(self, index: int) -> NDArray[np.generic]:
        """Group `index` as [rank, block, layer, side, head, token, dim], a view of the regions."""
        group = self.sharding.groups[index]
        layout = self.sharding.layout(group)
        stop = group.start_bytes + self.room[index] * layout.block_bytes
        numbers = self.regions[:, group.start_bytes : stop].view(NUMBERS[DTYPE_BYTES[layout.dtype]])
        shape = (layout.layers, layout.sides, layout.kv_heads, layout.block_tokens, layout.head_dim)
        return numbers.reshape(self.sharding.tp, self.room[index], *shape)

    def fill(self, index: int, dense: NDArray[np.generic], positions: range) -> None:
        """Puts `positions` of `dense`, [token, layer, side, head, dim], where they belong on every rank."""
        group, elements = self.sharding.groups[index], self.elements(index)
        for rank, position in itertools.product(range(self.sharding.tp), positions):
            block, token = divmod(position, group.layout.block_tokens)
            heads = self.sharding.heads(group, rank)
            elements[rank, self.tables[index][block], :, :, :, token] = dense[position, :, :, heads.start : heads.stop]


def numbered(group: KvGroup, tokens: int) -> NDArray[np.generic]:
    layout = group.layout
    shape = (tokens, layout.layers, layout.sides, layout.kv_heads, layout.head_dim)
    numbers = np.arange(np.prod(shape), dtype=np.uint64).reshape(shape)
    return numbers.astype(NUMBERS[DTYPE_BYTES[layout.dtype]])


def padded(group: KvGroup, other: KvGroup, positions: range, is_end: bool) -> range:
    """`positions` and, if they reach the prompt's end and blocks are of one size, the rest of the last block."""
    size = group.layout.block_tokens
    if not (positions and is_end and size == other.layout.block_tokens):
        return positions
    return range(positions.start, group.layout.blocks_for(positions.stop) * size)


def pairs(source: Worker, target: Worker) -> list[tuple[list[BlockId], list[BlockId]]]:
    return list(zip(source.tables, target.tables, strict=True))


def planned(source: Worker, target: Worker, tokens: range, prompt_tokens: int) -> Plan:
    return plan(source.sharding, target.sharding, pairs(source, target), tokens, prompt_tokens)


def everything(made: Plan) -> list[tuple[int, int, Ranges]]:
    """(source rank, target rank, ranges) of all."""
    return [(rank, *sent) for rank in range(made.source.tp) for sent in made.of(rank)]


def carry_out(made: Plan, source: Worker, target: Worker) -> None:
    """Copies what is planned. No byte of the target may be written twice."""
    written = np.zeros(target.regions.shape, np.bool_)
    for source_rank, target_rank, ranges in everything(made):
        for start, to, length in zip(ranges.source, ranges.target, ranges.length, strict=True):
            assert length > 0
            assert not written[target_rank, to : to + length].any()
            written[target_rank, to : to + length] = True
            target.regions[target_rank, to : to + length] = source.regions[source_rank, start : start + length]


def fewest(ranges: Ranges) -> int:
    """How many ranges there would be, had every byte been one and then been joined to its neighbour on both sides."""
    source = np.concatenate([np.arange(a, a + n) for a, n in zip(ranges.source, ranges.length, strict=True)])
    target = np.concatenate([np.arange(a, a + n) for a, n in zip(ranges.target, ranges.length, strict=True)])
    order = np.argsort(target)
    joined = (np.diff(target[order]) == 1) & (np.diff(source[order]) == 1)
    return len(target) - int(joined.sum())


def compare(shapes: Sequence[Sequence[KvGroup]], tp: Sequence[int], tokens: range, prompt: int, rng: Random) -> Plan:
    """Plans and carries out, and compares every byte of every target region with the reference."""
    source, target = (Worker("m", shape, ranks, prompt, rng) for shape, ranks in zip(shapes, tp, strict=True))
    expected = Worker("m", shapes[1], tp[1], prompt, rng)
    expected.tables = target.tables
    for index, (ours, theirs) in enumerate(zip(*shapes, strict=True)):
        positions = padded(ours, theirs, ours.kept(tokens, prompt), tokens.stop == prompt)
        dense = numbered(ours, len(source.tables[index]) * ours.layout.block_tokens)
        source.fill(index, dense, range(len(dense)))
        expected.fill(index, dense, positions)
    made = planned(source, target, tokens, prompt)
    carry_out(made, source, target)
    assert np.array_equal(target.regions, expected.regions)
    return made


@pytest.mark.parametrize(("source_tokens", "target_tokens"), list(itertools.product(BLOCK_TOKENS, repeat=2)))
@pytest.mark.parametrize("heads", HEADS)
def test_every_tensor_parallelism_and_block_size(heads: int, source_tokens: int, target_tokens: int) -> None:
    """With a group of each kind, a prompt that ends within a block on both sides, and random tables."""
    shapes = (groups(heads, source_tokens), groups(heads, target_tokens))
    for number, tp in enumerate(itertools.product(TP, repeat=2)):
        compare(shapes, tp, range(75), 75, Random(number))


sizes = st.sampled_from((1, 3, 16, 32, 48, 64))


@settings(max_examples=150, deadline=None)
@given(st.tuples(sizes, sizes), st.sampled_from(HEADS), st.tuples(*[st.sampled_from(TP)] * 2), st.data())
def test_any_part_of_any_prompt(
    block_tokens: tuple[int, int], heads: int, tp: tuple[int, int], data: st.DataObject
) -> None:
    prompt = data.draw(st.integers(0, 200), "prompt")
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, prompt)] * 2), "tokens"))
    shapes = [groups(heads, size) for size in block_tokens]
    made = compare(shapes, tp, range(start, stop), prompt, data.draw(st.randoms(use_true_random=False)))
    assert everything(made) or start == stop or stop <= 0


@settings(max_examples=150, deadline=None)
@given(
    st.tuples(sizes, sizes),
    st.sampled_from(HEADS),
    st.tuples(*[st.sampled_from(TP)] * 2),
    st.integers(1, 200),
    st.integers(1, LAYERS),
    st.randoms(use_true_random=False),
    st.booleans(),
)
def test_no_two_ranges_could_be_one(
    block_tokens: tuple[int, int],
    heads: int,
    tp: tuple[int, int],
    prompt: int,
    layers: int,
    rng: Random,
    is_in_order: bool,
) -> None:
    shapes = [KvGroup(KvLayout(layers, heads, DIM, size, "float16", sides=layers)) for size in block_tokens]
    source, target = (Worker("m", [shape], ranks, prompt, rng) for shape, ranks in zip(shapes, tp, strict=True))
    if is_in_order:  # neighbours are common then
        source.tables[0].sort()
        target.tables[0].sort()
    start = rng.randrange(prompt)
    for _, _, ranges in everything(planned(source, target, range(start, prompt), prompt)):
        assert len(ranges) == fewest(ranges)


def test_chunks_move_what_the_whole_does() -> None:
    shapes, rng = [groups(2, 48), groups(2, 16)], Random(3)
    source, whole, chunked = (Worker("m", shapes[side], 2, 150, rng) for side in (0, 1, 1))
    chunked.tables = whole.tables
    source.regions[:] = np.random.default_rng(3).integers(0, 255, source.regions.shape)
    carry_out(planned(source, whole, range(150), 150), source, whole)
    for chunk in (range(70), range(70, 96), range(96, 149), range(149, 150)):
        carry_out(planned(source, chunked, chunk, 150), source, chunked)
    assert np.array_equal(chunked.regions, whole.regions)


def test_nothing_to_move_moves_no_rest_of_a_block() -> None:
    one = Sharding("m", (full(8, 16), groups(8, 16)[1]), tp=2)
    assert everything(plan(one, one, [([0, 1], [0, 1])] * 2, range(20, 20), 20)) == []


def test_equal_layouts_move_whole_blocks_and_join_neighbours() -> None:
    one = Sharding("m", (full(8, 16),), tp=4)
    size = one.layout(one.groups[0]).block_bytes
    made = plan(one, one, [([5, 3, 4], [9, 6, 7])], range(33), 33)
    for rank in range(4):
        [(target_rank, ranges)] = made.of(rank)
        assert target_rank == rank
        assert ranges.source.tolist() == [3 * size, 5 * size]
        assert ranges.target.tolist() == [6 * size, 9 * size]
        assert ranges.length.tolist() == [2 * size, size]
        assert (len(ranges), ranges.bytes, ranges.conversion) == (2, 3 * size, None)


def test_shared_heads_of_blocks_of_one_size_stay_together() -> None:
    made = plan(Sharding("m", (full(8, 16),), 2), Sharding("m", (full(8, 16),), 4), [([0], [0])], range(16), 16)
    assert [(rank, to, len(ranges)) for rank, to, ranges in everything(made)] == [
        (0, 0, LAYERS * 2),
        (0, 1, LAYERS * 2),
        (1, 2, LAYERS * 2),
        (1, 3, LAYERS * 2),
    ]


@pytest.mark.parametrize(
    ("heads", "tp", "senders"),
    [
        (1, (8, 8), [0, 1, 2, 3, 4, 5, 6, 7]),  # a latent, for one
        (1, (8, 2), [0, 4]),
        (1, (2, 8), [0, 0, 0, 0, 1, 1, 1, 1]),
        (2, (8, 4), [0, 2, 4, 6]),
        (2, (4, 8), [0, 0, 1, 1, 2, 2, 3, 3]),
        (2, (8, 2), [0, 4]),
    ],
)
def test_copies_are_sent_once_and_by_turns(heads: int, tp: tuple[int, int], senders: list[int]) -> None:
    source, target = (Sharding("m", (full(heads, 16),), ranks) for ranks in tp)
    sent = everything(plan(source, target, [([0], [0])], range(16), 16))
    assert [rank for rank, _, _ in sorted(sent, key=lambda one: one[1])] == senders
    assert [to for _, to, _ in sent] == list(range(tp[1]))


def test_another_dtype_is_a_conversion_of_its_own() -> None:
    """The plain group and the one to convert arrive apart; lengths are what is read, offsets fit each side."""
    latent = KvGroup(KvLayout(1, 1, 4, 16, "bfloat16", sides=1), start_bytes=1 << 16)
    source = Sharding("m", (full(2, 16, "float32"), latent))
    target = Sharding("m", (full(2, 32, "float8_e4m3fn"), latent))
    made = list(plan(source, target, [([0, 2], [1]), ([0, 1], [0, 1])], range(32), 32).of(0))
    [(_, converted), (_, plain)] = made
    assert plain.conversion is None
    assert plain.written is plain.length
    assert converted.conversion is not None
    assert (converted.conversion.source, converted.conversion.target) == ("float32", "float8_e4m3fn")
    assert converted.written.tolist() == (converted.length // 4).tolist()
    block = target.groups[0].layout.block_bytes
    covered = [b for a, n in zip(converted.target, converted.written, strict=True) for b in range(a, a + n)]
    assert sorted(covered) == list(range(block, 2 * block))


def changed(group: KvGroup, **fields: object) -> KvGroup:
    layout = {name: getattr(group.layout, name) for name in KvLayout.__struct_fields__}
    return KvGroup(KvLayout(**{**layout, **fields}))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Sharding("n", (full(8, 16),)), "KV of m means nothing to n; let workers of one model"),
        (Sharding("m", groups(8, 16)), "m: 1 groups of layers at the source, 4 at the target; start both"),
        (Sharding("m", (KvGroup(full(8, 16).layout, keeps=9),)), "keeps all of the positions, the target 9; start"),
        (Sharding("m", (changed(full(8, 16), layers=3),)), "group 0: layers is 2 at the source and 3 at the target; "),
        (Sharding("m", (changed(full(8, 16), sides=1),)), "sides is 2 at the source and 1 at"),
        (Sharding("m", (changed(full(8, 16), kv_heads=4),)), "kv_heads is 8 at the source and 4 at"),
        (Sharding("m", (changed(full(8, 16), head_dim=4),)), "head_dim is 2 at the source and 4 at"),
        (Sharding("m", (changed(full(8, 16), packing="k_transposed"),)), "packing is plain at the source and k_tran"),
        (Sharding("m", (changed(full(8, 16), dtype="uint64"),)), "float32 cannot become uint64"),
    ],
)
def test_what_does_not_fit_is_refused(other: Sharding, message: str) -> None:
    with pytest.raises(KvError, match=message):
        plan(Sharding("m", (full(8, 16),)), other, [([0], [0])], range(16), 16)


def test_shuffled_elements_move_as_whole_blocks_or_not_at_all() -> None:
    shuffled = changed(full(8, 16), packing="k_transposed")
    ours, larger = Sharding("m", (shuffled,)), Sharding("m", (changed(shuffled, block_tokens=32),))
    [(_, ranges)] = plan(ours, ours, [([0, 1], [0, 1])], range(20), 20).of(0)
    assert len(ranges) == 1
    for other in (larger, Sharding("m", (shuffled,), 2), Sharding("m", (changed(shuffled, dtype="bfloat16"),))):
        with pytest.raises(
            KvError, match=r"k_transposed moves as whole blocks only, and they differ: .* make tensor par"
        ):
            check(ours, other)
    with pytest.raises(KvError, match=r"range\(0, 20\) cuts blocks of 16 tokens; move up to a block's end"):
        plan(ours, ours, [([0, 1], [0, 1])], range(20), 40)


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(KvError, match="m: 6 KV heads do not divide over 4 ranks; choose"):
        Sharding("m", (full(6, 16),), tp=4)


def test_a_state_of_many_tokens_is_refused() -> None:
    with pytest.raises(KvError, match="a state is a block of one token, not of 16: set block_tokens=1"):
        KvGroup(full(8, 16).layout, keeps="state")


@pytest.mark.parametrize(
    ("tables", "tokens", "message"),
    [
        ([([0], [0]), ([0], [0])], range(16), "2 pairs of block tables for 1 groups of m"),
        ([([0], [0])], range(17), r"range\(0, 17\) is no part of a prompt of 16 tokens"),
        ([([0], [0])], range(0, 16, 2), r"range\(0, 16, 2\) is no part"),
        ([([0], [])], range(8, 16), r"target's table has 0 blocks of 16 tokens, range\(8, 16\) needs 1; grant"),
        ([([], [0])], range(8, 16), "source's table has 0 blocks"),
    ],
)
def test_tables_that_do_not_reach_are_refused(
    tables: list[tuple[list[BlockId], list[BlockId]]], tokens: range, message: str
) -> None:
    one = Sharding("m", (full(8, 16),))
    with pytest.raises(KvError, match=message):
        plan(one, one, tables, tokens, 16)


def test_an_unknown_rank_is_refused() -> None:
    one = Sharding("m", (full(8, 16),), 2)
    with pytest.raises(KvError, match="m: no rank 2 among the source's 2"):
        next(plan(one, one, [([0], [0])], range(16), 16).of(2))
