"""KV in another storage format: every pattern of 8 and 16 bits, and floats of every kind, as torch converts them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from penstock.errors import KvError
from penstock.kv.conversion import Conversion

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
}
FLOAT8_MAX = 448.0


def patterns(dtype: str) -> NDArray[np.uint8]:
    """All bit patterns of `dtype`; of float32 those around every float16, bfloat16 and float8 and half-way between."""
    if dtype == "float8_e4m3fn":
        return np.arange(1 << 8, dtype=np.uint8)
    if dtype != "float32":
        return np.arange(1 << 16, dtype=np.uint16).view(np.uint8)
    ends = np.array([0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    chance = np.random.default_rng(7).integers(0, 1 << 32, 100_000, np.uint32)
    return np.concatenate([np.add.outer(np.arange(1 << 16, dtype=np.uint32) << 16, ends).ravel(), chance]).view(
        np.uint8
    )


@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(DTYPES, 2)))
def test_converts_as_torch_does(source: str, target: str) -> None:
    stored = patterns(source)
    values = torch.from_numpy(stored.copy()).view(DTYPES[source]).to(torch.float32)
    expected = values.clamp(-FLOAT8_MAX, FLOAT8_MAX) if target == "float8_e4m3fn" else values
    expected = expected.to(DTYPES[target])
    made = torch.from_numpy(Conversion(source, target).apply(stored)).view(DTYPES[target])
    is_nan = expected.isnan()
    assert torch.equal(made.isnan(), is_nan)
    bytes_of = torch.uint8 if target == "float8_e4m3fn" else {2: torch.int16, 4: torch.int32}[expected.itemsize]
    assert torch.equal(made.view(bytes_of)[~is_nan], expected.view(bytes_of)[~is_nan])  # zeros with their sign


def test_takes_a_region_s_memory() -> None:
    memory = memoryview(bytearray(np.array([1.0, -2.5], np.float32).tobytes()))
    assert Conversion("float32", "bfloat16").apply(memory).tobytes() == bytes([0x80, 0x3F, 0x20, 0xC0])


def test_what_is_no_float_is_refused() -> None:
    with pytest.raises(KvError, match=r"uint64 cannot become bfloat16: uint64 is none of float32, .*same KV dtype"):
        Conversion("uint64", "bfloat16")
