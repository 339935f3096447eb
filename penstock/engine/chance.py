"""The randomness of sampling: a function of (seed, choice, position) alone.

So a sequence continues exactly on any worker, whatever else is in its batch.
"""

from __future__ import annotations

import struct
from hashlib import blake2b

_BITS = 48  # few enough that `uniform * total` stays below `total` in float64
_PACK = struct.Struct("<QQQ").pack


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) for the token at `position` of output `choice`. `seed` counts modulo 2**64."""
    key = _PACK(seed % 2**64, choice, position)
    digest = blake2b(key, digest_size=8, person=b"penstock").digest()
    return (int.from_bytes(digest, "little") >> (64 - _BITS)) / (1 << _BITS)
