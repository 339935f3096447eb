"""Token ids, packed: 4 bytes each, little-endian. A prompt of 12,000 tokens passes a process border as one copy."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable
from typing import TypeAlias

TOKEN_BYTES = 4

Tokens: TypeAlias = "array[int]"  # of type code "I"


def pack(ids: Iterable[int]) -> bytes:
    """Raises OverflowError for an id that is negative or beyond 32 bits."""
    tokens = ids if isinstance(ids, array) and ids.typecode == "I" else array("I", ids)
    return _in_order(tokens).tobytes()


def unpack(packed: bytes | memoryview) -> Tokens:
    """Raises ValueError if `packed` does not hold whole tokens."""
    tokens = array("I")
    tokens.frombytes(packed)
    return _in_order(tokens)


def count(packed: bytes) -> int:
    """How many tokens are packed here."""
    return len(packed) // TOKEN_BYTES


def _in_order(tokens: Tokens) -> Tokens:
    """In this machine's order of bytes, or from it into the packed one."""
    if sys.byteorder == "little":
        return tokens
    swapped = tokens[:]
    swapped.byteswap()
    return swapped
