"""Storage formats of KV, from one to the other.

A transfer moves bytes and converts nothing. Where two workers store different formats, one of them stages: the source
converts before it sends, or the target after it received. This is how, and the reference for engines that do it on a
device. Values are stored as they are, without scales (1.0, as are vLLM's k_scale and v_scale unless a checkpoint brings
its own): a layout has no room for a scale, so KV quantized with others must not be announced as float8_e4m3fn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penstock.blocks import DTYPE_BYTES
from penstock.errors import KvError

_Bytes = NDArray[np.uint8]
_Floats = NDArray[np.float32]

_QUIET = 0x40  # set in the mantissa of a NaN that is cut to bfloat16, so that it stays one
_FLOAT8_MAX = 448.0
_FLOAT8_NORMAL = np.float32(2.0**-6)  # the least that is not subnormal
_FLOAT8_NAN = 0x7F
_TO_SUBNORMAL = np.float32(2.0**14)  # added to a float32, leaves it with float8's step below the normals, 2**-9


@dataclass(frozen=True, slots=True)
class Conversion:
    """From one dtype, named as in `blocks.DTYPE_BYTES`, to another. Raises KvError where there is none."""

    source: str
    target: str

    def __post_init__(self) -> None:
        for dtype in (self.source, self.target):
            if dtype not in _CODECS:
                raise KvError(
                    f"KV stored as {self.source} cannot become {self.target}: {dtype} is none of {', '.join(_CODECS)}; "
                    "start both workers with the same KV dtype"
                )

    def target_bytes(self, source_bytes: NDArray[np.int64]) -> NDArray[np.int64]:
        """What these lengths, of whole elements, become."""
        return source_bytes // DTYPE_BYTES[self.source] * DTYPE_BYTES[self.target]

    def apply(self, stored: _Bytes | memoryview) -> _Bytes:
        """`stored`, contiguous bytes of whole elements, in the target's format.

        Rounds once, to nearest, ties to even. What float16 and bfloat16 cannot hold becomes infinite; what float8
        cannot hold becomes its largest value, 448, since it has no infinity. NaN stays NaN.
        """
        decode, encode = _CODECS[self.source][0], _CODECS[self.target][1]
        return encode(decode(np.frombuffer(stored, np.uint8)))


def _from_float32(stored: _Bytes) -> _Floats:
    return stored.view(np.float32)


def _to_float32(values: _Floats) -> _Bytes:
    return values.view(np.uint8)


def _from_float16(stored: _Bytes) -> _Floats:
    return stored.view(np.float16).astype(np.float32)


def _to_float16(values: _Floats) -> _Bytes:
    with np.errstate(over="ignore", invalid="ignore"):  # infinity and NaN are answers here
        return values.astype(np.float16).view(np.uint8)


def _from_bfloat16(stored: _Bytes) -> _Floats:
    return (stored.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _to_bfloat16(values: _Floats) -> _Bytes:
    bits = values.view(np.uint32)
    rounded = (_nearest_even(bits, 16) >> 16).astype(np.uint16)
    cut = (bits >> 16).astype(np.uint16) | np.uint16(_QUIET)
    return np.where(np.isnan(values), cut, rounded).view(np.uint8)


def _from_float8(stored: _Bytes) -> _Floats:
    return _FLOAT8_VALUES[stored]


def _to_float8(values: _Floats) -> _Bytes:
    size = np.fmin(np.abs(values), np.float32(_FLOAT8_MAX))  # of NaN too, for now
    bits = size.view(np.uint32)
    normal = (_nearest_even(bits, 20) >> 20) - (120 << 3)  # exponents are biased by 127 there and by 7 here
    subnormal = (size + _TO_SUBNORMAL).view(np.uint32) - _TO_SUBNORMAL.view(np.uint32)
    magnitude = np.where(size < _FLOAT8_NORMAL, subnormal, normal)
    magnitude = np.where(np.isnan(values), _FLOAT8_NAN, magnitude)
    return (magnitude | np.signbit(values) * np.uint32(0x80)).astype(np.uint8)


def _nearest_even(bits: NDArray[np.uint32], dropped: int) -> NDArray[np.uint32]:
    """`bits` of floats, so that cutting off the last `dropped` ones rounds them to nearest, ties to even."""
    is_odd = (bits >> dropped) & 1
    return bits + (np.uint32((1 << (dropped - 1)) - 1) + is_odd)


def _float8_values() -> _Floats:
    """Of all 256 patterns: sign, 4 bits of exponent, 3 of mantissa. No infinity; the last of each half is NaN."""
    magnitude = np.arange(128)
    exponent, mantissa = magnitude >> 3, magnitude & 7
    normal = np.ldexp(1.0 + mantissa / 8, exponent - 7)
    values = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), normal)
    values[_FLOAT8_NAN] = np.nan
    return np.concatenate([values, -values]).astype(np.float32)


_FLOAT8_VALUES = _float8_values()

_CODECS: dict[str, tuple[Callable[[_Bytes], _Floats], Callable[[_Floats], _Bytes]]] = {
    "float32": (_from_float32, _to_float32),
    "float16": (_from_float16, _to_float16),
    "bfloat16": (_from_bfloat16, _to_bfloat16),
    "float8_e4m3fn": (_from_float8, _to_float8),
}
