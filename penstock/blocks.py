"""KV blocks: how they are named, laid out and held in memory.

A block holds the keys and values of `block_tokens` consecutive tokens over all layers of a group, as one contiguous
range, so that moving it is one descriptor. Memory of many blocks is a `Region`. Layers that attend to a window form
groups of their own, and give back what no later token reads; blocks of all groups have one size and one pool:

    tokens           0..15     16..31    32..47    48..55       one group keeps all, two a window of 20
    groups           a  w  w   a  w  w   a  w  w   a  w  w
    block table      7  -  -   3  -  -   9  4  1   5  8  0      -: a hole
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Literal, NamedTuple, NewType

import msgspec

from penstock.errors import KvError
from penstock.tokens import TOKEN_BYTES

BlockId = NewType("BlockId", int)
BlockHash = NewType("BlockHash", bytes)  # 16 bytes
Keeps = int | Literal["all"]
"""What of the positions before a token its layers read: all, or the last so many."""

HOLE = BlockId(-1)  # in a block table, where no later token reads

MOST_GROUPS = 16  # a layer of a kind by itself would make blocks of one layer, and tables as wide as the model is deep

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "uint64": 8}


class KvLayout(msgspec.Struct, frozen=True):
    """Shape of one rank's block: `[layer, side, kv_head, token, dim]`, C order. Sides are K and V, of one width.

    What is not split into keys and values has one side: a latent (MLA) is one side of one head. There is a group of
    `layers` layers for each of `keeps`, which says what they read. A block table has one entry per group for every
    `block_tokens` tokens, in that order. Two workers may exchange blocks in place only if their layouts are equal;
    `kv.reshard` finds the bytes where they are not.
    """

    layers: int
    kv_heads: int
    head_dim: int
    block_tokens: int
    dtype: str
    packing: str = "plain"  # how elements lie inside the shape; engines that shuffle them name it here
    sides: int = 2
    keeps: tuple[Keeps, ...] = ("all",)

    @property
    def row_bytes(self) -> int:
        """One token of one head, on one side of one layer."""
        return self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def token_bytes(self) -> int:
        """One token over all groups."""
        return self.block_bytes // self.block_tokens * len(self.keeps)

    @property
    def block_bytes(self) -> int:
        return self.layers * self.sides * self.kv_heads * self.row_bytes * self.block_tokens

    @property
    def has_windows(self) -> bool:
        return self.keeps.count("all") < len(self.keeps)

    @property
    def reads(self) -> tuple[int | None, ...]:
        """By group, how many of the blocks before it the first token of a block reads; None: all."""
        return tuple(None if keeps == "all" else -(-keeps // self.block_tokens) for keeps in self.keeps)

    @property
    def tokens_per_block(self) -> float:
        """Of a long sequence, whose windows count for nothing."""
        return self.block_tokens / max(1, self.keeps.count("all"))

    def entries_for(self, tokens: int) -> int:
        """Entries of a block table that reaches over `tokens` tokens."""
        return -(-tokens // self.block_tokens) * len(self.keeps)

    def blocks_for(self, tokens: int, step_tokens: int = 1, after: int = 0) -> int:
        """Blocks held at most while a sequence grows to `tokens` tokens, by up to `step_tokens` at a time.

        Beyond those of the first `after` tokens, which fill blocks.
        """
        columns = -(-tokens // self.block_tokens) - after // self.block_tokens
        blocks = 0
        for keeps in self.keeps:
            blocks += columns if keeps == "all" else min(columns, -(-(keeps + step_tokens) // self.block_tokens) + 1)
        return blocks

    def tokens_in(self, blocks: int, step_tokens: int, most_tokens: int) -> int:
        """The longest sequence, of at most `most_tokens` tokens, that grows in so many blocks."""
        lengths = range(1, -(-most_tokens // self.block_tokens) + 1)  # in blocks of one group
        fitting = bisect_right(lengths, blocks, key=lambda n: self.blocks_for(n * self.block_tokens, step_tokens))
        return min(most_tokens, fitting * self.block_tokens)

    def kept(self, entries: range, tokens: int) -> Sequence[int]:
        """Those of a table's `entries` that hold what a token after the first `tokens` reads."""
        if not self.has_windows:
            return entries
        width = len(self.keeps)
        first = [self._first(keeps, tokens) for keeps in self.keeps]
        return [entry for entry in entries if entry // width >= first[entry % width]]

    def forgotten(self, before: int, tokens: int) -> list[int]:
        """Entries that a token after the first `before` tokens may read, and none after the first `tokens` does."""
        width = len(self.keeps)
        return [
            column * width + group
            for group, keeps in enumerate(self.keeps)
            for column in range(self._first(keeps, before), self._first(keeps, tokens))
        ]

    def holes(self, tokens: int) -> int:
        """How many entries no token after the first `tokens` reads."""
        return sum(self._first(keeps, tokens) for keeps in self.keeps)

    def _first(self, keeps: Keeps, tokens: int) -> int:
        """The first block of its group that a token after `tokens` others reads."""
        return 0 if keeps == "all" else max(0, tokens - keeps) // self.block_tokens


class Deal(NamedTuple):
    """How layers lie in groups: so many in each; what each group keeps; by layer, its group and its place in that."""

    layers: int
    keeps: tuple[Keeps, ...]
    places: list[tuple[int, int]]


def deal_layers(kinds: Sequence[Keeps]) -> Deal:
    """Deals layers, of which `kinds` says what each keeps, into groups of one size; "all" comes before windows.

    A group has as many layers as the rarest kind. Of another kind the last group may have places left, which are memory
    for nothing. Where that makes more than `MOST_GROUPS`, everything is kept, in one group.
    """
    counts = Counter(kinds)
    size = min(counts.values())
    order = sorted(counts, key=lambda kind: (kind != "all", 0 if kind == "all" else kind))
    keeps = tuple(kind for kind in order for _ in range(-(-counts[kind] // size)))
    if len(keeps) > MOST_GROUPS:
        return Deal(len(kinds), ("all",), [(0, layer) for layer in range(len(kinds))])
    places = []
    seen: Counter[Keeps] = Counter()
    for kind in kinds:
        group, place = divmod(seen[kind], size)
        places.append((keeps.index(kind) + group, place))
        seen[kind] += 1
    return Deal(size, keeps, places)


class KvGroup(msgspec.Struct, frozen=True):
    """Layers whose KV lies in blocks of one shape, found through a block table of their own.

    `layout` has all heads of the model, whatever part of them a rank holds. `keeps` says what of a prompt matters to
    the tokens after it: "all" positions; the last so many (a sliding window); or one "state" for the whole sequence,
    which is a block of one token. Where several groups share a rank's region, block 0 of this one begins at
    `start_bytes`.
    """

    layout: KvLayout
    keeps: Keeps | Literal["state"] = "all"
    start_bytes: int = 0

    def __post_init__(self) -> None:
        if self.keeps == "state" and self.layout.block_tokens != 1:
            raise KvError(f"a state is a block of one token, not of {self.layout.block_tokens}: set block_tokens=1")

    def kept(self, tokens: range, prompt_tokens: int) -> range:
        """The positions of its table to which KV of `tokens`, a part of the prompt, belongs."""
        if self.keeps == "all":
            return tokens
        if self.keeps == "state":
            return range(int(tokens.stop == prompt_tokens))
        return range(max(tokens.start, min(tokens.stop, prompt_tokens - self.keeps)), tokens.stop)


class Sharding(msgspec.Struct, frozen=True):
    """How the KV of `model` lies over `tp` ranks, which share their block tables; each has a region of its own.

    Heads are dealt out in order and evenly. Ranks beyond the number of heads hold copies: of 8 ranks and 2 heads, ranks
    0 to 3 hold head 0. So a latent, which is one head, is on every rank. Raises KvError where that cannot be.
    """

    model: str
    groups: tuple[KvGroup, ...]
    tp: int = 1

    def __post_init__(self) -> None:
        for heads in (group.layout.kv_heads for group in self.groups):
            if self.tp < 1 or max(heads, self.tp) % min(heads, self.tp):
                raise KvError(
                    f"{self.model}: {heads} KV heads do not divide over {self.tp} ranks; "
                    "choose a tensor parallelism that is a divisor or a multiple of the number of heads"
                )

    def heads(self, group: KvGroup, rank: int) -> range:
        """The model's heads that `rank` holds of `group`."""
        first = rank * group.layout.kv_heads // self.tp
        return range(first, first + max(1, group.layout.kv_heads // self.tp))

    def copies(self, group: KvGroup) -> int:
        """Neighbouring ranks that hold the same heads of `group`."""
        return max(1, self.tp // group.layout.kv_heads)

    def layout(self, group: KvGroup) -> KvLayout:
        """What `group`'s blocks look like on each rank."""
        return msgspec.structs.replace(group.layout, kv_heads=len(self.heads(group, 0)))


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """Memory of `blocks` blocks. `owner` and `epoch` name the incarnation whose pool it is.

    `buffer` is writable host memory of `blocks * layout.block_bytes` bytes, or None where the engine keeps the
    blocks in memory that only it can reach (a GPU without a peer transport). `descriptor` is that of the memory file
    which the buffer maps, if it does.
    """

    owner: str
    epoch: int
    layout: KvLayout
    blocks: int
    buffer: memoryview | None = field(repr=False)
    descriptor: int | None = field(default=None, repr=False)

    @property
    def key(self) -> tuple[str, int]:
        return (self.owner, self.epoch)


def chain_hashes(
    tokens: bytes | memoryview, block_tokens: int, salt: str = "", parent: BlockHash | None = None
) -> Iterable[BlockHash]:
    """Chained 128-bit hashes of the full blocks of packed `tokens`: equal hashes mean equal prefixes and equal salt.

    `parent` is the hash of the block before the first token. blake2b, keyed by `salt` (at most 64 bytes are used as
    the key; a longer one is hashed first).
    """
    key = salt.encode()
    if len(key) > 64:
        key = blake2b(key).digest()
    size = block_tokens * TOKEN_BYTES
    before: bytes = parent or b""
    for start in range(0, len(tokens) - size + 1, size):
        digest = blake2b(before, digest_size=16, key=key)
        digest.update(tokens[start : start + size])
        before = digest.digest()
        yield BlockHash(before)
