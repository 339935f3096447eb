"""Which bytes of a prompt's KV go where, between workers that lay it out differently.

    source, 16 tokens a block           target, 64 tokens a block
    rank 0: heads 0 1 2 3   ------->    rank 0: heads 0 1
                            `------>    rank 1: heads 2 3
    rank 1: heads 4 5 6 7   ------->    rank 2: heads 4 5
                            `------>    rank 3: heads 6 7

Tensor parallelism, block size, where a table's blocks lie, and the storage format may differ; the model may not. A
block is `[layer, side, head, token, dim]`, so what stays together in both layouts is, at best, a whole block; then, if
blocks are of one size, the heads of a (layer, side) that two ranks share; and else the tokens of one head that one
source block and one target block share. Whatever touches on both sides is one range.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from penstock.blocks import BlockId, KvGroup, KvLayout, Sharding
from penstock.errors import KvError
from penstock.kv.conversion import Conversion

_Offsets = NDArray[np.int64]

Tables = tuple[Sequence[BlockId], Sequence[BlockId]]  # a group's block table at the source, and at the target


@dataclass(frozen=True, slots=True, eq=False)
class Ranges:
    """Ranges of bytes from one rank's region into another's, which overlap nowhere in the target.

    Columns of offsets into the regions and of lengths. `length` is what is read; with a `conversion` `written` differs,
    and somebody must convert on the way.
    """

    source: _Offsets
    target: _Offsets
    length: _Offsets
    conversion: Conversion | None = None

    def __len__(self) -> int:
        return len(self.source)

    @property
    def bytes(self) -> int:
        """What is read."""
        return int(self.length.sum())

    @property
    def written(self) -> _Offsets:
        """Of each range, the bytes written."""
        return self.length if self.conversion is None else self.conversion.target_bytes(self.length)


class _Expanded(NamedTuple):
    """Ranges of pieces that are alike, piece after piece, each of so many `parts`."""

    ranges: Ranges
    parts: int


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What every source rank has to send. Made by `plan`."""

    source: Sharding
    target: Sharding
    moves: tuple[_Move, ...]

    def of(self, source_rank: int) -> Iterator[tuple[int, Ranges]]:
        """(target rank, ranges) for each target rank that `source_rank` sends to, and again for each conversion.

        O(s log s + r), for s pieces of the prompt that one block on each side holds, and r ranges before merging.
        """
        if source_rank not in range(self.source.tp):
            raise KvError(f"{self.source.model}: no rank {source_rank} among the source's {self.source.tp}")
        for target_rank in range(self.target.tp):
            found: dict[Conversion | None, list[_Expanded]] = {}
            for move in self.moves:
                found.setdefault(move.conversion, []).extend(move.between(source_rank, target_rank))
            for expanded in found.values():
                if expanded:
                    yield target_rank, _joined(expanded)


def plan(source: Sharding, target: Sharding, tables: Sequence[Tables], tokens: range, prompt_tokens: int) -> Plan:
    """How to move KV of `tokens`, positions of a prompt of `prompt_tokens`, with a pair of `tables` for each group.

    Tables begin at position 0 and reach `tokens.stop`; entries that hold nothing to be moved are not read. A window
    moves what the prompt's end still sees, a state goes with the prompt's last token. What several ranks hold copies of
    is sent by one of them, and its receivers are spread over them. Nothing is written outside the target's blocks, nor
    to positions before `tokens`. With the prompt's last token goes the unused rest of its block, where both sides have
    blocks of one size: so a last block is one range too.

    Raises KvError if the two do not hold the same, or if what holds it cannot be taken apart.
    """
    check(source, target)
    if len(tables) != len(source.groups):
        raise KvError(f"{len(tables)} pairs of block tables for {len(source.groups)} groups of {source.model}")
    if tokens.step != 1 or not 0 <= tokens.start <= tokens.stop <= prompt_tokens:
        raise KvError(f"{tokens} is no part of a prompt of {prompt_tokens} tokens")
    moves = []
    for source_group, target_group, pair in zip(source.groups, target.groups, tables, strict=True):
        kept = source_group.kept(tokens, prompt_tokens)
        pieces = _pieces(source_group.layout, target_group.layout, pair, kept, tokens.stop == prompt_tokens)
        moves.append(_Move(_Side(source, source_group), _Side(target, target_group), pieces))
    return Plan(source, target, tuple(moves))


def check(source: Sharding, target: Sharding) -> None:
    """Raises KvError, naming both sides, unless KV of `source` can be moved to `target`."""
    if source.model != target.model:
        raise KvError(f"KV of {source.model} means nothing to {target.model}; let workers of one model hand over")
    if len(source.groups) != len(target.groups):
        raise KvError(
            f"{source.model}: {len(source.groups)} groups of layers at the source, {len(target.groups)} at the target; "
            "start both with the same engine"
        )
    for index, (ours, theirs) in enumerate(zip(source.groups, target.groups, strict=True)):
        where = f"{source.model}, group {index}"
        _check_groups(where, ours, theirs)
        if ours.layout.packing != "plain" and source.layout(ours) != target.layout(theirs):
            raise KvError(
                f"{where}: packing {ours.layout.packing} moves as whole blocks only, and they differ: "
                f"{source.layout(ours)} at the source, {target.layout(theirs)} at the target; "
                "make tensor parallelism, block size and dtype equal"
            )


def _check_groups(where: str, source: KvGroup, target: KvGroup) -> None:
    if source.keeps != target.keeps:
        raise KvError(
            f"{where}: the source keeps {source.keeps} of the positions, the target {target.keeps}; "
            "start both with the same engine"
        )
    for what in ("layers", "sides", "kv_heads", "head_dim", "packing"):
        ours, theirs = getattr(source.layout, what), getattr(target.layout, what)
        if ours != theirs:
            raise KvError(
                f"{where}: {what} is {ours} at the source and {theirs} at the target; "
                "start both with the same model and the same KV layout"
            )
    if source.layout.dtype != target.layout.dtype:
        Conversion(source.layout.dtype, target.layout.dtype)  # raises if there is none


@dataclass(frozen=True, slots=True, eq=False)
class _Pieces:
    """Runs of tokens that one source block and one target block share, in the order in which they lie in the target.

    Columns: the blocks, the token within each at which a run begins, and its tokens.
    """

    source_block: _Offsets
    source_token: _Offsets
    target_block: _Offsets
    target_token: _Offsets
    tokens: _Offsets
    is_whole: NDArray[np.bool_]  # fills both blocks

    def rows(self, rows: slice | _Offsets) -> _Pieces:
        return _Pieces(
            self.source_block[rows],
            self.source_token[rows],
            self.target_block[rows],
            self.target_token[rows],
            self.tokens[rows],
            self.is_whole[rows],
        )

    def alike(self) -> Iterator[_Pieces]:
        """In order: neighbours that are all whole, or all not."""
        if len(self.tokens):
            edges = np.flatnonzero(np.diff(self.is_whole)) + 1
            yield from (self.rows(slice(*ends)) for ends in pairwise([0, *edges.tolist(), len(self.tokens)]))


def _pieces(source: KvLayout, target: KvLayout, tables: Tables, positions: range, is_end: bool) -> _Pieces:
    """Cuts `positions`, which reach the prompt's end or not, where a block begins on either side."""
    start, stop = positions.start, positions.stop
    if positions and is_end and source.block_tokens == target.block_tokens:
        stop = source.blocks_for(stop) * source.block_tokens
    cuts = np.unique(np.concatenate([[start], *(np.arange(0, stop, side.block_tokens) for side in (source, target))]))
    first = cuts[(cuts >= start) & (cuts < stop)].astype(np.int64)
    tokens = np.diff(first, append=stop)
    source_block, source_token = _find("source", source, tables[0], first, positions)
    target_block, target_token = _find("target", target, tables[1], first, positions)
    is_whole = (tokens == source.block_tokens) & (tokens == target.block_tokens)
    if source.packing != "plain" and not is_whole.all():
        raise KvError(
            f"packing {source.packing} moves as whole blocks only: {positions} cuts blocks of {source.block_tokens} "
            "tokens; move up to a block's end"
        )
    pieces = _Pieces(source_block, source_token, target_block, target_token, tokens, is_whole)
    return pieces.rows(np.argsort(target_block * target.block_tokens + target_token))


def _find(
    side: str, layout: KvLayout, table: Sequence[BlockId], first: _Offsets, positions: range
) -> tuple[_Offsets, _Offsets]:
    """The block of each position in `first`, and the token in it."""
    index, token = np.divmod(first, layout.block_tokens)
    if len(first) and index[-1] >= len(table):
        raise KvError(
            f"the {side}'s table has {len(table)} blocks of {layout.block_tokens} tokens, {positions} needs "
            f"{layout.blocks_for(positions.stop)}; grant the rest first"
        )
    return np.asarray(table, np.int64)[index], token


@dataclass(frozen=True, slots=True)
class _Side:
    """One group at one of the two workers."""

    sharding: Sharding
    group: KvGroup

    def first_bytes(self, blocks: _Offsets, tokens: _Offsets) -> _Offsets:
        """Where these tokens of these blocks lie in a rank's region: of the first head, side and layer."""
        layout = self.sharding.layout(self.group)
        return self.group.start_bytes + blocks * layout.block_bytes + tokens * layout.row_bytes

    def parts_bytes(self, heads: range, rank: int) -> _Offsets:
        """Where in a block of `rank` its first token lies: for each layer, side and one of `heads`."""
        layout = self.sharding.layout(self.group)
        head_bytes = layout.block_tokens * layout.row_bytes
        first = heads.start - self.sharding.heads(self.group, rank).start
        slabs = np.arange(layout.layers * layout.sides, dtype=np.int64) * (layout.kv_heads * head_bytes)
        return np.add.outer(slabs, np.arange(first, first + len(heads)) * head_bytes).ravel()


@dataclass(frozen=True, slots=True, eq=False)
class _Move:
    """A group's share of a plan."""

    source: _Side
    target: _Side
    pieces: _Pieces

    @property
    def conversion(self) -> Conversion | None:
        ours, theirs = self.source.group.layout.dtype, self.target.group.layout.dtype
        return None if ours == theirs else Conversion(ours, theirs)

    def between(self, source_rank: int, target_rank: int) -> list[_Expanded]:
        """The group's ranges from one rank to another, for each run of pieces that are alike."""
        heads = self.heads(source_rank, target_rank)
        if not heads:
            return []
        parts = self._parts(heads, source_rank, target_rank)
        whole = _merged(parts, np.arange(1, len(parts)))
        return [self._at(some, whole if some.is_whole[0] else parts) for some in self.pieces.alike()]

    def _parts(self, heads: range, source_rank: int, target_rank: int) -> Ranges:
        """The heads of every layer and side in a block of each rank, from their first token to the source's last."""
        source = self.source.parts_bytes(heads, source_rank)
        target = self.target.parts_bytes(heads, target_rank)
        layout = self.source.group.layout
        length = np.full(len(source), layout.block_tokens * layout.row_bytes, np.int64)
        return Ranges(source, target, length, self.conversion)

    def _at(self, pieces: _Pieces, parts: Ranges) -> _Expanded:
        """Every part of every piece. Of pieces that are not whole, a part is as long as their tokens are."""
        source = np.add.outer(self.source.first_bytes(pieces.source_block, pieces.source_token), parts.source)
        target = np.add.outer(self.target.first_bytes(pieces.target_block, pieces.target_token), parts.target)
        row_bytes = self.source.group.layout.row_bytes
        length = parts.length if pieces.is_whole[0] else pieces.tokens[:, np.newaxis] * row_bytes
        length = np.broadcast_to(length, source.shape).ravel()
        return _Expanded(Ranges(source.ravel(), target.ravel(), length, parts.conversion), len(parts))

    def heads(self, source_rank: int, target_rank: int) -> range:
        """The model's heads that `source_rank` sends to `target_rank`. Copies of them serve receivers by turns."""
        held = self.source.sharding.heads(self.source.group, source_rank)
        wanted = self.target.sharding.heads(self.target.group, target_rank)
        senders = self.source.sharding.copies(self.source.group)
        receivers = self.target.sharding.copies(self.target.group)
        if source_rank % senders != target_rank % receivers * senders // receivers:
            return range(0)
        return range(max(held.start, wanted.start), min(held.stop, wanted.stop))


def _joined(expanded: Sequence[_Expanded]) -> Ranges:
    """All ranges of one conversion as one value, neighbours made one where they touch on both sides.

    Only where a piece begins can they: pieces lie in the order of the target, and within one, parts were joined or are
    apart. A part that ends where one of another piece begins is the last of its block, and that one the first of its.
    """
    ends = accumulate((len(some.ranges) for some in expanded), initial=0)
    begins = [np.arange(end, end + len(some.ranges), some.parts) for end, some in zip(ends, expanded, strict=False)]
    return _merged(_concatenated([some.ranges for some in expanded]), np.concatenate(begins)[1:])


def _concatenated(ranges: Sequence[Ranges]) -> Ranges:
    if len(ranges) == 1:
        return ranges[0]  # the usual case, and copies would cost more than the plan
    source, target, length = (
        np.concatenate([getattr(some, column) for some in ranges]) for column in ("source", "target", "length")
    )
    return Ranges(source, target, length, ranges[0].conversion)


def _merged(ranges: Ranges, begins: _Offsets) -> Ranges:
    """`ranges` with those at the indices `begins`, none of them 0, joined to the one before if they touch it."""
    before = begins - 1
    touches = ranges.source[begins] == ranges.source[before] + ranges.length[before]
    touches &= ranges.target[begins] == ranges.target[before] + ranges.written[before]
    if not touches.any():
        return ranges
    first = np.delete(np.arange(len(ranges)), begins[touches])
    length = np.add.reduceat(ranges.length, first)
    return Ranges(ranges.source[first], ranges.target[first], length, ranges.conversion)
