"""Attention of unmodified transformers decoders over a region of blocks.

transformers calls two things of ours in every layer: `Paged.update`, as if it were its cache, which writes the
new keys and values into their blocks; then `paged_attention`, which reads each sequence's blocks back and attends.
The name under which it is registered has no mask function, so transformers builds no mask. Where the cache is latents
(MLA), both are over these, see `embedded_latents`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from penstock.blocks import KvLayout
from penstock.engine.embedded_batch import Batch, Tile
from penstock.engine.embedded_latents import compress_queries, expand_outputs
from penstock.engine.embedded_products import attention_scores, weighted_sums
from penstock.errors import UnsupportedModel

NAME = "penstock"

_FROM_CONFIG = -1  # the model hands no window to attention: its configuration says
_FOREIGN = ("position_bias", "indices", "block_indices", "sinks")  # attention of other kinds


class Pool:
    """A region's memory as rows, see `embedded_batch`. Holds views only."""

    def __init__(self, memory: Tensor, layout: KvLayout) -> None:
        """`memory` is flat, of the layout's dtype."""
        rows = memory.view(-1, layout.block_tokens * layout.head_dim)
        sides = [rows[side * layout.kv_heads :] for side in range(layout.layers * layout.sides)]
        self.layout = layout
        self.blocks = memory.view(-1, layout.block_bytes // memory.element_size())
        # By place: a layer's keys and its values, or its latents, each beginning at that layer of block 0.
        self.layers: Sequence[Sequence[Tensor]] = [
            sides[at : at + layout.sides] for at in range(0, len(sides), layout.sides)
        ]


class Scratch:
    """Where a layer's sides are gathered; kept, since the first touch of a page costs more than filling it.

    What a region of unshared blocks needs is reserved when it is attached, more of it when a step does.
    """

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def reserve(self, pool: Pool) -> None:
        """Makes room for one layer of every block."""
        sides = pool.layout.sides
        size = pool.blocks.numel() // (sides * pool.layout.layers)
        if self._memory is None or self._memory.shape[1] < size:
            self._memory = pool.blocks.new_zeros(sides, size)

    def gather(self, sides: Sequence[Tensor], rows: Tensor) -> Sequence[Tensor]:
        """The `rows` of each side, [any, width]; good until the next call."""
        width = sides[0].shape[1]
        size = len(rows) * width
        memory = self._memory
        if memory is None or memory.shape[1] < size:
            self._memory = memory = sides[0].new_empty(len(sides), size + size // 4)  # contexts grow
        gathered = memory[:, :size].view(len(sides), len(rows), width).unbind()
        for side, some in zip(sides, gathered, strict=True):
            torch.index_select(side, 0, rows, out=some)
        return gathered


class Paged:
    """One step over one region: the cache that transformers writes to, and what `paged_attention` reads."""

    def __init__(self, pool: Pool, batch: Batch, scratch: Scratch) -> None:
        self.pool = pool
        self.batch = batch
        self.scratch = scratch
        self._returned: tuple[Tensor, Tensor] | None = None

    def clear_fresh(self) -> None:
        if self.batch.fresh is not None:
            self.pool.blocks.index_fill_(0, self.batch.fresh, 0)

    def update(self, key: Tensor, value: Tensor, layer: int, *_: object) -> tuple[Tensor, Tensor]:
        """Writes `key` and `value` [1, kv_heads, tokens, dim] of the step's row into their blocks.

        A cache of latents is given two parts of one row. The layer would go on to expand what is returned, which
        attention over latents has no use for: it gets no more than one token.
        """
        is_latent = self.pool.layout.sides == 1
        self._write(layer, (torch.cat((key, value), -1),) if is_latent else (key, value))
        self._returned = (key[:, :, :1], value[:, :, :1]) if is_latent else (key, value)
        return self._returned

    def check_plain(self, module: nn.Module, key: Tensor, value: Tensor) -> None:
        """Raises UnsupportedModel where a layer would attend to something that it made of what is cached."""
        if self._returned is None or key is not self._returned[0] or value is not self._returned[1]:
            raise UnsupportedModel(f"{type(module).__name__} changes keys and values after they were cached")

    def check_window(self, module: nn.Module, layer: int, window: int | None) -> None:
        """Raises UnsupportedModel where a layer reads what its group does not keep."""
        geometry = self.batch.geometry
        keeps = geometry.layout.keeps[geometry.place_of(layer)[0]]
        if keeps != "all" and (window is None or window > keeps + 1):
            sees = "all tokens" if window is None else f"{window} tokens"
            raise UnsupportedModel(f"{type(module).__name__} sees {sees}, its configuration says {keeps + 1}")

    def _write(self, layer: int, sides: Sequence[Tensor]) -> None:
        dim = self.pool.layout.head_dim
        table, place = self.batch.geometry.place_of(layer)
        for rows, new in zip(self.pool.layers[place], sides, strict=True):
            rows.view(-1, dim).index_copy_(0, self.batch.writes[table], new[0].transpose(0, 1).reshape(-1, dim))

    def get_seq_length(self, layer: int | None = None) -> int:
        """0, as positions are handed in. Raises UnsupportedModel to a layer that would count them for itself."""
        if layer is not None:
            raise UnsupportedModel("a layer counts positions by itself")
        return 0


@dataclass(frozen=True, slots=True)
class Scoring:
    """What becomes of query times key: scaled, squeezed into (-softcap, softcap), beside a sink per head."""

    scaling: float
    softcap: float | None
    sinks: Tensor | None


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    paged: Paged | None = None,
    sliding_window: int | None = _FROM_CONFIG,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The step's queries [1, heads, tokens, dim] to outputs [1, tokens, heads, dim].

    The arguments are those of `AttentionInterface`, and `paged`, which the engine hands through the model.
    """
    if paged is None:
        raise UnsupportedModel(f"{type(module).__name__} is not handed what its model was called with")
    layer = _layer_of(module, others)
    window = _window_of(module, layer) if sliding_window == _FROM_CONFIG else sliding_window
    paged.check_window(module, layer, window)
    scoring = Scoring(scaling, softcap, s_aux)
    if paged.pool.layout.sides == 2:
        paged.check_plain(module, key, value)
        return _attend_all(query, paged, layer, window, scoring)[None], None
    outputs = _attend_all(compress_queries(module, query), paged, layer, window, scoring)
    return expand_outputs(module, outputs)[None], None


AttentionInterface.register(NAME, paged_attention)


def _attend_all(query: Tensor, paged: Paged, layer: int, window: int | None, scoring: Scoring) -> Tensor:
    """[1, heads, tokens, dim] to [tokens, heads, dim], group by group. Of latents the values are the keys."""
    layout = paged.pool.layout
    table, place = paged.batch.geometry.place_of(layer)
    queries = query[0].transpose(0, 1)
    outputs = []
    for group in paged.batch.groups:
        span = group.span(window, table)
        shape = (group.sequences * layout.kv_heads, -1, layout.head_dim)
        gathered = [rows.view(shape) for rows in paged.scratch.gather(paged.pool.layers[place], span.rows)]
        keys, values = gathered[0], gathered[-1]
        own = queries[group.tokens]
        for tile in span.tiles:
            tiled = own[tile.queries].view(group.sequences, -1, *own.shape[1:])
            outputs.append(_attend(tiled, keys[:, tile.keys], values[:, tile.keys], tile, scoring))
    return torch.cat(outputs)


def _attend(query: Tensor, keys: Tensor, values: Tensor, tile: Tile, scoring: Scoring) -> Tensor:
    """[sequences, queries, heads, dim] over [sequences * kv_heads, columns, dim] to [tokens, heads, dim].

    The query heads that share a KV head are rows of one matrix, beside those of the tile's other queries.
    """
    sequences, count, heads, dim = query.shape
    packed = query.view(sequences, count, keys.shape[0] // sequences, -1, dim).transpose(1, 2)
    flat = packed.reshape(keys.shape[0], -1, dim)
    scores = attention_scores(flat, keys, scoring.scaling)
    if scoring.softcap is not None:
        scores = scores.div_(scoring.softcap).tanh_().mul_(scoring.softcap)
    scores = scores.view(*packed.shape[:-1], -1)  # [sequences, kv_heads, queries, sharing heads, columns]
    for columns, bias in tile.hidden:
        scores[..., columns].add_(bias)
    weights = scores.softmax(-1) if scoring.sinks is None else _softmax_with_sinks(scores, scoring.sinks)
    output = weighted_sums(weights.reshape(keys.shape[0], flat.shape[1], -1), values)
    return output.view(packed.shape).transpose(1, 2).reshape(-1, heads, dim)


def _softmax_with_sinks(scores: Tensor, sinks: Tensor) -> Tensor:
    """Each head's sink takes its part of the weight and contributes no value."""
    column = sinks.to(scores.dtype).view(1, scores.shape[1], 1, -1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat((scores, column), -1).softmax(-1)[..., :-1]


def _layer_of(module: Any, others: dict[str, Any]) -> int:
    """The layer's index. Raises UnsupportedModel for attention that is not causal over plain keys and values."""
    foreign = [name for name in _FOREIGN if others.get(name) is not None]
    if foreign or not getattr(module, "is_causal", True):
        how = f"with {', '.join(foreign)}" if foreign else "in both directions"
        raise UnsupportedModel(f"{type(module).__name__} attends {how}")
    layer: int = module.layer_idx
    return layer


def _window_of(module: Any, layer: int) -> int | None:
    types = getattr(module.config, "layer_types", None)
    if types is not None and types[layer] != "sliding_attention":
        return None
    return getattr(module.config, "sliding_window", None)
