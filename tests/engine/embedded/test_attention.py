"""Attention over blocks against the plain definition, for any mixture of slices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from torch import Tensor

from penstock.blocks import HOLE, BlockId, KvLayout
from penstock.engine import embedded_batch
from penstock.engine.api import Slice
from penstock.engine.embedded_attention import Paged, Pool, Scratch, paged_attention
from penstock.engine.embedded_batch import Geometry, build
from penstock.errors import UnsupportedModel

LAYOUT = KvLayout(layers=3, kv_heads=2, head_dim=4, block_tokens=4, dtype="float32")
BLOCKS = 240
HEADS = 6
LAYER = 1
GEOMETRY = Geometry(LAYOUT, HEADS, torch.float32, torch.device("cpu"))
MODULE: Any = SimpleNamespace(layer_idx=LAYER, config=SimpleNamespace())


@dataclass(frozen=True)
class Case:
    """Sequences as (start, count), and how they attend. Layers that are dealt have a table for windows, with holes."""

    sequences: list[tuple[int, int]]
    window: int | None
    softcap: float | None
    has_sinks: bool
    is_dealt: bool = False


counts = st.one_of(st.just(1), st.integers(1, 30))
cases = st.builds(
    Case,
    sequences=st.lists(st.tuples(st.integers(0, 40), counts), min_size=1, max_size=6),
    window=st.one_of(st.none(), st.integers(1, 50)),
    softcap=st.sampled_from([None, 2.0]),
    has_sinks=st.booleans(),
    is_dealt=st.booleans(),
)


@pytest.mark.parametrize(("tile_queries", "tile_scores", "padding_tokens"), [(128, 1 << 22, 256), (5, 700, 3)])
@settings(max_examples=150, deadline=None)
@given(case=cases)
def test_it_equals_the_definition(tile_queries: int, tile_scores: int, padding_tokens: int, case: Case) -> None:
    generator = torch.Generator().manual_seed(2)
    tokens = sum(start + count for start, count in case.sequences)
    query, key, value = (torch.randn(tokens, heads, 4, generator=generator) for heads in (HEADS, 2, 2))
    sinks = torch.randn(HEADS, generator=generator) if case.has_sinks else None
    with (
        patch.object(embedded_batch, "_TILE_QUERIES", tile_queries),
        patch.object(embedded_batch, "_TILE_SCORES", tile_scores),
        patch.object(embedded_batch, "_PADDING_TOKENS", padding_tokens),
    ):
        found = paged(case, query, key, value, sinks)
    torch.testing.assert_close(found, plain(case, query, key, value, sinks), atol=1e-5, rtol=1e-4)


def paged(
    case: Case,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    layout: KvLayout = LAYOUT,
    module: Any = MODULE,
) -> Tensor:
    """Computes first all starts, then all counts, in a pool of NaN; the outputs of the latter, slice by slice."""
    places: list[tuple[int, int]] = []
    if case.is_dealt and case.window is not None:
        layout = replace(layout, keeps=("all", max(1, case.window - 1)))
        places = [(1, layer) for layer in range(layout.layers)]
    pool = Pool(torch.full((BLOCKS * layout.block_bytes // 4,), torch.nan), layout)
    geometry = Geometry(layout, HEADS, torch.float32, torch.device("cpu"), places)
    free = [BlockId(block) for block in range(BLOCKS)]
    Random(3).shuffle(free)
    before, after = [], []
    at = 0
    for start, count in case.sequences:
        blocks = [free.pop() for _ in range(layout.entries_for(start + count))]
        kept = layout.kept(range(len(blocks)), start)
        rows = range(at, at + start + count)  # as token ids, so that the step's row can be told apart
        before.append(Slice(rows[:start], 0, blocks))
        after.append(Slice(rows[start:], start, [b if i in kept else HOLE for i, b in enumerate(blocks)]))
        at += start + count
    output = torch.full((len(query), HEADS, 4), torch.nan)
    for slices in ([one for one in before if one.tokens], after):
        if slices:
            batch = build(slices, geometry)
            row = batch.input_ids[0]
            step = Paged(pool, batch, Scratch())
            step.clear_fresh()
            cached = step.update(key[row].transpose(0, 1)[None], value[row].transpose(0, 1)[None], LAYER)
            attended, _ = paged_attention(
                module,
                query[row].transpose(0, 1)[None],
                *cached,
                None,
                paged=step,
                scaling=0.5,
                sliding_window=case.window,
                softcap=case.softcap,
                s_aux=sinks,
            )
            output[row] = attended[0]
    return output


def plain(case: Case, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> Tensor:
    """Every token over its own sequence's earlier ones, with a dense mask."""
    output = torch.empty(len(query), HEADS, value.shape[-1])
    at = 0
    for start, count in case.sequences:
        rows = slice(at, at + start + count)
        q, (k, v) = query[rows], (side[rows].repeat_interleave(HEADS // side.shape[1], 1) for side in (key, value))
        scores = torch.einsum("qhd,khd->hqk", q, k) * 0.5
        if case.softcap is not None:
            scores = case.softcap * torch.tanh(scores / case.softcap)
        positions = torch.arange(start + count)
        distance = positions[:, None] - positions
        hidden = (distance < 0) | (distance >= (case.window or start + count))
        scores = scores.masked_fill(hidden, -torch.inf)
        if sinks is not None:
            scores = torch.cat((scores, sinks[:, None, None].expand(-1, start + count, 1)), -1)
        weights = scores.softmax(-1)[..., : start + count]
        output[rows] = torch.einsum("hqk,khd->qhd", weights, v)
        at += start + count
    return output


@settings(max_examples=60, deadline=None)
@given(case=cases)
def test_over_latents_it_equals_the_definition_over_keys_and_values_made_of_them(case: Case) -> None:
    generator = torch.Generator().manual_seed(4)
    tokens = sum(start + count for start, count in case.sequences)
    rank, plain_dim, rotated_dim, value_dim = 5, 3, 2, 4
    latents = torch.randn(tokens, 1, rank, generator=generator)
    rotated = torch.randn(tokens, 1, rotated_dim, generator=generator)
    query = torch.randn(tokens, HEADS, plain_dim + rotated_dim, generator=generator)
    up = torch.randn(HEADS, plain_dim + value_dim, rank, generator=generator)
    sinks = torch.randn(HEADS, generator=generator) if case.has_sinks else None
    module: Any = SimpleNamespace(
        layer_idx=LAYER,
        config=SimpleNamespace(),
        kv_lora_rank=rank,
        qk_nope_head_dim=plain_dim,
        qk_rope_head_dim=rotated_dim,
        v_head_dim=value_dim,
        kv_b_proj=SimpleNamespace(weight=up.view(-1, rank)),
    )
    layout = KvLayout(layers=3, kv_heads=1, head_dim=rank + rotated_dim, block_tokens=4, dtype="float32", sides=1)
    found = paged(case, query, latents, rotated, sinks, layout, module)
    expanded = torch.einsum("thr,hdr->thd", latents.expand(-1, HEADS, -1), up)
    key = torch.cat((expanded[..., :plain_dim], rotated.expand(-1, HEADS, -1)), -1)
    wanted = plain(case, query, key, expanded[..., plain_dim:], sinks)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def attend(
    module: Any,
    changed: Callable[[Tensor], Tensor] = lambda cached: cached,
    geometry: Geometry = GEOMETRY,
    **arguments: Any,
) -> None:
    """One token; `changed` is what the layer does to its keys between cache and attention."""
    batch = build([Slice([0], 0, [BlockId(0)])], geometry)
    step = Paged(Pool(torch.zeros(LAYOUT.block_bytes // 4), LAYOUT), batch, Scratch())
    key, value = step.update(torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4), LAYER)
    query = torch.zeros(1, HEADS, 1, 4)
    paged_attention(module, query, changed(key), value, None, paged=step, scaling=1.0, **arguments)


def test_a_layer_that_attends_to_other_keys_than_it_caches_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="changes keys and values after they were cached"):
        attend(MODULE, changed=lambda cached: cached.repeat(1, 2, 1, 1))


def test_a_layer_that_sees_more_than_its_group_keeps_is_refused() -> None:
    windowed = dataclasses.replace(GEOMETRY, layout=replace(LAYOUT, keeps=(7,)))
    attend(MODULE, geometry=windowed, sliding_window=8)
    with pytest.raises(UnsupportedModel, match="sees 9 tokens, its configuration says 8"):
        attend(MODULE, geometry=windowed, sliding_window=9)
    with pytest.raises(UnsupportedModel, match="sees all tokens, its configuration says 8"):
        attend(MODULE, geometry=windowed, sliding_window=None)


def test_foreign_kinds_of_attention_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="attends with position_bias"):
        attend(MODULE, position_bias=torch.zeros(1))
    with pytest.raises(UnsupportedModel, match="attends in both directions"):
        attend(SimpleNamespace(layer_idx=0, is_causal=False, config=SimpleNamespace()))


@pytest.mark.parametrize(
    ("config", "window"),
    [
        ({}, None),
        ({"sliding_window": 5}, 5),
        ({"sliding_window": 5, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}, 5),
        ({"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "full_attention"]}, None),
    ],
)
def test_a_model_that_hands_over_no_window_has_it_in_its_configuration(
    config: dict[str, Any], window: int | None
) -> None:
    module: Any = SimpleNamespace(layer_idx=LAYER, config=SimpleNamespace(**config))
    with patch.object(embedded_batch.Group, "span", autospec=True, side_effect=embedded_batch.Group.span) as span:
        attend(module)
    assert span.call_args.args[1] == window
