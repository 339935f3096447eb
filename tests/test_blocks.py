"""Names and shapes of KV blocks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from penstock.blocks import KvLayout, chain_hashes
from penstock.tokens import pack

tokens = st.lists(st.integers(0, 2**31), max_size=40)


@given(tokens, tokens, st.integers(1, 8))
def test_equal_hashes_mean_equal_prefixes(a: list[int], b: list[int], size: int) -> None:
    pairs = zip(chain_hashes(pack(a), size), chain_hashes(pack(b), size), strict=False)
    for index, (x, y) in enumerate(pairs, start=1):
        assert (x == y) == (a[: index * size] == b[: index * size])


@given(tokens, st.integers(1, 8), st.integers(0, 5))
def test_a_chain_continues_from_its_parent(sequence: list[int], size: int, cut: int) -> None:
    whole = list(chain_hashes(pack(sequence), size))
    cut = min(cut, len(whole))
    parent = whole[cut - 1] if cut else None
    assert whole[cut:] == list(chain_hashes(pack(sequence[cut * size :]), size, parent=parent))


def test_tenants_share_nothing() -> None:
    same = pack(range(16))
    names = {next(iter(chain_hashes(same, 16, salt))) for salt in ("", "a", "b", "a" * 65, "a" * 66)}
    assert len(names) == 5


def test_a_layout_counts_its_bytes() -> None:
    layout = KvLayout(layers=10, kv_heads=2, head_dim=64, block_tokens=16, dtype="float32")
    assert layout.block_bytes == 160 << 10
    assert [layout.blocks_for(n) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]
