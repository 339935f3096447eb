"""Products of matrices on the CPU by oneDNN: linear layers with weights in the order it reads, and attention.

torch reorders a plain weight of 16 bits at every call, and gives those of 32 bits to MKL, which is slow on CPUs that
are not Intel's. Reordered once, ahead of the first step, a weight is read as it is by what multiplies it. Sums are
rounded in another order, no more. What attention multiplies is new in every step and stays in the order it has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")

_LEAST_ELEMENTS = 1 << 15  # for smaller weights the call costs more than the order gains
_LEAST_ROWS = 64  # in attention likewise


class PackedLinear(nn.Module):
    """What `nn.Linear` computes. The plain weight is dropped, and made again for models that read it themselves."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.in_features = plain.in_features
        self.out_features = plain.out_features
        self.bias = plain.bias
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(plain.weight)

    @cached_property
    def weight(self) -> Tensor:
        return self._packed.to_dense()

    def forward(self, rows: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        return _multiply(rows, self._packed, self.bias)


class SideBySide:
    """Linear layers that are given the same rows, as one product, of which each takes its part.

    All is computed when the first of them comes with new rows, and let go when the last has taken its part.
    """

    def __init__(self, plains: Sequence[nn.Linear]) -> None:
        weights = tuple(plain.weight for plain in plains)
        biases = tuple(plain.bias for plain in plains if plain.bias is not None)
        self.packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(torch.cat(weights))
        self.bias = torch.cat(biases) if biases else None
        self.sizes = [plain.out_features for plain in plains]
        self._rows: Tensor | None = None
        self._parts: dict[int, Tensor] = {}

    def take(self, place: int, rows: Tensor) -> Tensor:
        if rows is not self._rows or place not in self._parts:
            self._rows = rows
            self._parts = dict(enumerate(torch.split(_multiply(rows, self.packed, self.bias), self.sizes, -1)))
        part = self._parts.pop(place)
        if not self._parts:
            self._rows = None
        return part


class Sibling(nn.Module):
    """One of the layers of a `SideBySide`."""

    def __init__(self, plain: nn.Linear, family: SideBySide, place: int) -> None:
        super().__init__()
        self.in_features = plain.in_features
        self.out_features = plain.out_features
        self.bias = plain.bias
        self._family = family
        self._place = place

    @cached_property
    def weight(self) -> Tensor:
        return torch.split(self._family.packed.to_dense(), self._family.sizes)[self._place]

    def forward(self, rows: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        return self._family.take(self._place, rows)


@dataclass(frozen=True, slots=True)
class Site:
    """Where a layer is found: its name in its parent."""

    parent: nn.Module
    name: str

    def layer(self) -> nn.Linear:
        layer: nn.Linear = getattr(self.parent, self.name)
        return layer


@torch.inference_mode()
def pack(model: nn.Module, forward: Callable[[], T]) -> T:
    """Replaces the linear layers of `model` that gain by it: large ones on a CPU that oneDNN multiplies their type on.

    `forward` runs the model once, which shows the layers that are given the same rows; returned is what it returns. An
    output layer tied to the embedding stops being it, and both are kept.
    """
    sites = [
        Site(parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and child.weight.numel() >= _LEAST_ELEMENTS and _is_multiplied(child.weight)
    ]
    given: dict[Site, list[Tensor]] = {site: [] for site in sites}
    with ExitStack() as hooks:
        for site, rows in given.items():
            hooks.callback(site.layer().register_forward_pre_hook(partial(_note, rows)).remove)
        result = forward()
    for family in _families(given):
        _replace(family)
    return result


def _families(given: Mapping[Site, Sequence[Tensor]]) -> list[list[Site]]:
    """Sites of one parent whose layers were given the same rows, once; each of the others by itself."""
    families: dict[object, list[Site]] = {}
    for site, rows in given.items():
        alike = (site.parent, site.layer().bias is None, id(rows[0])) if len(rows) == 1 else site
        families.setdefault(alike, []).append(site)
    return list(families.values())


def _note(given: list[Tensor], _: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    given.extend(arguments)


def _replace(family: Sequence[Site]) -> None:
    """A layer by itself, or layers side by side. The plain weights go as soon as the packed one is there."""
    plains = [site.layer() for site in family]
    if len(plains) == 1:
        setattr(family[0].parent, family[0].name, PackedLinear(plains[0]))
        return
    together = SideBySide(plains)
    for place, (site, plain) in enumerate(zip(family, plains, strict=True)):
        setattr(site.parent, site.name, Sibling(plain, together, place))


def _is_multiplied(matrix: Tensor) -> bool:
    """Whether oneDNN takes it. Of 16-bit types it refuses those that this CPU has no instructions for."""
    if matrix.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if matrix.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if matrix.dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return matrix.dtype == torch.float32


def attention_scores(queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """[matrices, rows, dim] times [matrices, columns, dim], scaled: [matrices, rows, columns]."""
    if _is_quicker_apart(queries):
        return torch.stack([_multiply(rows, columns) for rows, columns in zip(queries * scaling, keys, strict=True)])
    return torch.baddbmm(queries.new_empty(1, 1, 1), queries, keys.mT, beta=0, alpha=scaling)


def weighted_sums(weights: Tensor, values: Tensor) -> Tensor:
    """[matrices, rows, columns] times [matrices, columns, dim]."""
    if _is_quicker_apart(weights):
        return torch.stack([_multiply(rows, columns.mT) for rows, columns in zip(weights, values, strict=True)])
    return torch.bmm(weights, values)


def _is_quicker_apart(rows: Tensor) -> bool:
    """Whether matrices are better multiplied one by one: torch gives batches of 32 bits to MKL, others to oneDNN."""
    return rows.dtype == torch.float32 and rows.shape[1] >= _LEAST_ROWS and _is_multiplied(rows)


def _multiply(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[..., inner] times the transpose of [outer, inner], plain or packed."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product
