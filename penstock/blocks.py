"""KV blocks: how they are named, laid out and held in memory.

A block holds the keys and values of `block_tokens` consecutive tokens over all layers, as one contiguous range,
so that moving it is one descriptor. Memory of many blocks is a `Region`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import NewType

import msgspec

from penstock.tokens import TOKEN_BYTES

BlockId = NewType("BlockId", int)
BlockHash = NewType("BlockHash", bytes)  # 16 bytes

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "uint64": 8}


class KvLayout(msgspec.Struct, frozen=True):
    """Shape of one block: `[layer, K/V, kv_head, token, dim]`, C order, K and V of one width.

    Two workers may exchange blocks in place only if their layouts are equal.
    """

    layers: int
    kv_heads: int
    head_dim: int
    block_tokens: int
    dtype: str
    packing: str = "plain"  # how elements lie inside the shape; engines that shuffle them name it here

    @property
    def token_bytes(self) -> int:
        return self.layers * 2 * self.kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        return self.token_bytes * self.block_tokens

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens."""
        return -(-tokens // self.block_tokens)


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
