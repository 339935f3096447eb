"""Linear layers on the CPU, with weights in the order that oneDNN multiplies them in.

torch reorders a plain weight of 16 bits at every call, and gives those of 32 bits to MKL, which is slow on CPUs that
are not Intel's. Reordered once, ahead of the first step, a weight is read as it is by what multiplies it. Sums are
rounded in another order, no more.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor, nn

_LEAST_ELEMENTS = 1 << 16  # for smaller weights the call costs more than the order gains


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
        product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._packed, self.bias, "none", [], "")
        return product


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


def _is_multiplied(weight: Tensor) -> bool:
    """Whether oneDNN takes it. Of 16-bit types it refuses those that this CPU has no instructions for."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if weight.dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return weight.dtype == torch.float32
