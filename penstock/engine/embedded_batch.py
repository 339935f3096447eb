"""What one step computes, as index tensors: where each token's keys and values go, and what it attends to.

The tokens of all slices lie end to end in one row. Decoding sequences come first; those of like context form one
group, which is attended to at once. Every other slice is a group by itself:

    tokens   d d d d | d d | p p p p p p p | p p p
    groups    many    many        one         one

The region is seen as rows: a block row is one head's keys (or values, or latents) of one block, a token row those of
one token. Row numbers are those of the first layer's keys; for the others `Pool` shifts its view, not the numbers.
Layers that keep the same share a block table (see `blocks`); a table here is one of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.blocks import KvLayout
from penstock.engine.api import Slice

_PADDING_TOKENS = 256  # a decode group may pad a sequence by this many tokens, or by a quarter of its longest
_GROUP_BYTES = 8 << 20  # of a layer, read by a decode group on the CPU: what is gathered is read again from the cache
_TILE_QUERIES = 128
_TILE_SCORES = 1 << 22  # attention scores computed at once, over all heads: bounds memory at long contexts

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Geometry:
    """What index building must know of model and region."""

    layout: KvLayout
    query_heads: int
    dtype: torch.dtype
    device: torch.device
    places: Sequence[
        tuple[int, int]
    ] = ()  # by layer: its table, and its place in the blocks; none: one table, in order

    def place_of(self, layer: int) -> tuple[int, int]:
        return self.places[layer] if self.places else (0, layer)

    @property
    def block_rows(self) -> int:
        """Block rows per block."""
        return self.layout.layers * self.layout.sides * self.layout.kv_heads

    def tensor(self, numbers: Ints | list[int]) -> Tensor:
        return torch.from_numpy(np.asarray(numbers, np.int64)).to(self.device)

    def bias(self, is_hidden: npt.NDArray[np.bool_]) -> Tensor:
        """What is added to scores: 0 where a query looks, -inf where it may not."""
        hidden = torch.from_numpy(is_hidden).to(self.device)
        return torch.zeros(is_hidden.shape, dtype=self.dtype, device=self.device).masked_fill_(hidden, -torch.inf)


@dataclass(frozen=True, slots=True)
class Piece:
    """A slice in the step's row, its first token at `at`; `tables` [tables, blocks] reach up to its last token."""

    tokens: Sequence[int]
    start: int  # the first token's position in its sequence
    at: int
    tables: Ints

    @property
    def count(self) -> int:
        return len(self.tokens)

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


@dataclass(frozen=True, slots=True)
class Tile:
    """Queries attended to together, and the columns of the gathered keys that any of them sees.

    `hidden` holds the columns of `keys` that some query may not see, with a bias [sequences, 1, queries, 1, columns].
    """

    queries: slice
    keys: slice
    hidden: tuple[tuple[slice, Tensor], ...]


@dataclass(frozen=True, slots=True)
class Span:
    """What a group reads in layers of one window: block rows, by sequence, head and block; then tile by tile."""

    rows: Tensor
    tiles: tuple[Tile, ...]


class Group:
    """Slices attended to at once: `tokens` of the step's row. Spans are built when a layer first asks."""

    def __init__(self, pieces: Sequence[Piece], geometry: Geometry) -> None:
        self.tokens = slice(pieces[0].at, pieces[-1].at + pieces[-1].count)
        self.sequences = len(pieces)
        self._pieces = pieces
        self._geometry = geometry
        self._context = max(piece.end for piece in pieces)
        self._tiles: dict[int, tuple[Tile, ...]] = {}
        self._rows: dict[tuple[int, int], Tensor] = {}

    def span(self, window: int | None, table: int) -> Span:
        """`window` is how many tokens a query sees, itself included; None: all before it."""
        reach = min(window or self._context, self._context)
        if reach not in self._tiles:
            build = _tiles_of_one if self.sequences == 1 else _tiles_of_many
            self._tiles[reach] = build(self._pieces, reach, self._geometry)
        if (reach, table) not in self._rows:
            self._rows[reach, table] = _block_rows(
                _read_blocks(self._pieces, reach, table, self._geometry), self._geometry
            )
        return Span(self._rows[reach, table], self._tiles[reach])


@dataclass(frozen=True, slots=True)
class Batch:
    """One step. `writes` are token rows, by token and head; `fresh` are blocks to clear before they are written."""

    geometry: Geometry
    input_ids: Tensor  # [1, tokens]
    position_ids: Tensor  # [1, tokens]
    writes: tuple[Tensor, ...]  # by table: [tokens * kv_heads]
    fresh: Tensor | None
    groups: tuple[Group, ...]
    sampled: Tensor  # the row's tokens after which one is sampled, in the order of the slices


def build(slices: Sequence[Slice], geometry: Geometry) -> Batch:
    """The step's row, its groups, and where its keys and values go."""
    block_tokens = geometry.layout.block_tokens
    arranged = _arrange(slices, geometry)
    pieces: dict[int, Piece] = {}  # by slice, in the order of the row
    at = 0
    for i in chain.from_iterable(arranged):
        pieces[i] = _piece(slices[i], at, geometry.layout)
        at += pieces[i].count
    row = list(pieces.values())
    fresh = [block for piece in row if _opens_its_last_block(piece, block_tokens) for block in piece.tables[:, -1]]
    sampled = [pieces[i].at + pieces[i].count - 1 for i, s in enumerate(slices) if s.sampling is not None]
    positions = _positions(row)
    return Batch(
        geometry=geometry,
        input_ids=geometry.tensor(list(chain.from_iterable(piece.tokens for piece in row)))[None],
        position_ids=geometry.tensor(positions)[None],
        writes=geometry.tensor(_token_rows(row, positions, geometry)).unbind(),
        fresh=geometry.tensor(fresh) if fresh else None,
        groups=tuple(Group([pieces[i] for i in members], geometry) for members in arranged),
        sampled=geometry.tensor(sampled),
    )


def _arrange(slices: Sequence[Slice], geometry: Geometry) -> list[list[int]]:
    """Indices of the slices, group by group."""
    decoding = sorted((i for i, s in enumerate(slices) if len(s.tokens) == 1), key=lambda i: -slices[i].start)
    groups: list[list[int]] = []
    for i in decoding:
        longest = slices[groups[-1][0]].start if groups else 0
        if groups and longest - slices[i].start <= max(_PADDING_TOKENS, longest // 4):
            groups[-1].append(i)
        else:
            groups.append([i])
    parts = [part for group in groups for part in _parts(group, slices[group[0]].start + 1, geometry)]
    return parts + [[i] for i, s in enumerate(slices) if len(s.tokens) > 1]


def _parts(group: list[int], context: int, geometry: Geometry) -> list[list[int]]:
    """A decode group whose longest sequence has `context` tokens, in even parts of `_GROUP_BYTES` at most."""
    if geometry.device.type != "cpu":
        return [group]
    layout = geometry.layout
    size = len(group) * context * layout.block_bytes // (layout.block_tokens * layout.layers)
    parts = min(len(group), 1 + size // _GROUP_BYTES)
    each = -(-len(group) // parts)
    return [group[at : at + each] for at in range(0, len(group), each)]


def _piece(part: Slice, at: int, layout: KvLayout) -> Piece:
    entries = layout.entries_for(part.start + len(part.tokens))
    tables = np.array(part.blocks[:entries], np.int64).reshape(-1, len(layout.keeps)).T
    return Piece(part.tokens, part.start, at, tables)


def _opens_its_last_block(piece: Piece, block_tokens: int) -> bool:
    """Whether the piece writes the first token of its last block, and does not fill it.

    What lies behind it in that block is read, with weight 0, until it is written: NaN left there would spread.
    """
    filled = piece.end % block_tokens
    return 0 < filled <= piece.count


def _positions(row: Sequence[Piece]) -> Ints:
    """Of the row's tokens, each in its sequence."""
    shifts = np.repeat([piece.start - piece.at for piece in row], [piece.count for piece in row])
    return shifts + np.arange(len(shifts))


def _token_rows(row: Sequence[Piece], positions: Ints, geometry: Geometry) -> Ints:
    """[tables, tokens * kv_heads]: where the row's keys and values are written."""
    tokens = geometry.layout.block_tokens
    tables = np.concatenate([piece.tables for piece in row], axis=1)
    widths = [piece.tables.shape[1] for piece in row]
    firsts = np.repeat(np.cumsum(widths) - widths, [piece.count for piece in row])
    blocks = tables[:, firsts + positions // tokens]
    heads = np.arange(geometry.layout.kv_heads) * tokens
    rows: Ints = (blocks * geometry.block_rows * tokens + positions % tokens)[:, :, None] + heads
    return rows.reshape(len(rows), -1)


def _block_rows(blocks: Ints, geometry: Geometry) -> Tensor:
    """[sequences, blocks] to block rows by sequence, head and block."""
    heads = np.arange(geometry.layout.kv_heads)[:, None]
    return geometry.tensor((blocks[:, None, :] * geometry.block_rows + heads).reshape(-1))


def _first_read(piece: Piece, reach: int, geometry: Geometry) -> int:
    """The first block of its table that the piece's first query sees."""
    return max(0, piece.start + 1 - reach) // geometry.layout.block_tokens


def _read_blocks(pieces: Sequence[Piece], reach: int, table: int, geometry: Geometry) -> Ints:
    """[sequences, blocks], side by side; a shorter one is padded with its own last block."""
    read = [piece.tables[table, _first_read(piece, reach, geometry) :] for piece in pieces]
    if len(read) == 1:
        return read[0][None]
    blocks = np.empty((len(read), max(map(len, read))), np.int64)
    for row, own in zip(blocks, read, strict=True):
        row[: len(own)] = own
        row[len(own) :] = own[-1]
    return blocks


def _tiles_of_many(pieces: Sequence[Piece], reach: int, geometry: Geometry) -> tuple[Tile, ...]:
    """Sequences of one query each, beside each other in one tile."""
    tokens = geometry.layout.block_tokens
    firsts = [_first_read(piece, reach, geometry) for piece in pieces]
    width = max(piece.tables.shape[1] - first for piece, first in zip(pieces, firsts, strict=True))
    positions = np.array(firsts)[:, None] * tokens + np.arange(width * tokens)
    ends = np.array([piece.end for piece in pieces])[:, None]
    bias = geometry.bias((positions >= ends) | (positions < ends - reach))
    return (Tile(slice(0, len(pieces)), slice(None), ((slice(None), bias[:, None, None, None, :]),)),)


def _tiles_of_one(pieces: Sequence[Piece], reach: int, geometry: Geometry) -> tuple[Tile, ...]:
    """A sequence of any number of queries, in tiles that read only what their queries see."""
    (piece,) = pieces
    origin = _first_read(piece, reach, geometry) * geometry.layout.block_tokens
    most = max(1, min(_TILE_QUERIES, _TILE_SCORES // (geometry.query_heads * (piece.end - origin))))
    return tuple(
        Tile(
            queries=slice(start - piece.start, end - piece.start),
            keys=slice(max(0, start + 1 - reach) - origin, end - origin),
            hidden=_hidden(start, end, reach, geometry),
        )
        for start, end in pairwise([*range(piece.start, piece.end, most), piece.end])
    )


def _hidden(start: int, end: int, reach: int, geometry: Geometry) -> tuple[tuple[slice, Tensor], ...]:
    """For queries at `start` to `end`: only the columns at either edge are hidden, from some of them.

    Columns count from the lowest position that any of the queries sees.
    """
    lowest = max(0, start + 1 - reach)
    queries = np.arange(start, end)[:, None]
    hidden = []
    if end - start > 1:
        later = geometry.bias(np.arange(start, end) > queries)
        hidden.append((slice(start - lowest, None), later[None, None, :, None, :]))
    if end - reach > lowest:
        forgotten = geometry.bias(np.arange(lowest, end - reach) <= queries - reach)
        hidden.append((slice(0, end - reach - lowest), forgotten[None, None, :, None, :]))
    return tuple(hidden)
