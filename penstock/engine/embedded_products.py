"""Products of matrices on the CPU by oneDNN: linear layers with weights in the order it reads, and attention.

torch reorders a plain weight of 16 bits at every call, and gives those of 32 bits to MKL, which is slow on CPUs that
are not Intel's. Reordered once, ahead of the first step, a weight is read as it is by what multiplies it. Sums are
rounded in another order, no more. What attention multiplies is new in every step and stays in the order it has.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor, nn

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


@torch.inference_mode()
def pack(model: nn.Module) -> None:
    """Replaces the linear layers of `model` that gain by it: large ones on a CPU that oneDNN multiplies their type on.

    An output layer tied to the embedding stops being it, and both are kept.
    """
    for parent, name in list(_gaining(model)):  # names alone, so that each plain weight goes before the next one comes
        setattr(parent, name, PackedLinear(getattr(parent, name)))


def _gaining(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Layers that are no more than `nn.Linear`: its subclasses may compute something else."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Linear and child.weight.numel() >= _LEAST_ELEMENTS and _is_multiplied(child.weight):
                yield parent, name


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
