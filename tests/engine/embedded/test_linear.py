"""Packed linear layers compute what plain ones do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from penstock.engine.embedded_linear import PackedLinear, pack

DTYPES = [torch.float32] + [torch.bfloat16] * torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (1, 33), (3, 5, 2), (1, 0), (7,)])
@torch.inference_mode()
def test_products_are_those_of_the_plain_layer(shape: tuple[int, ...], has_bias: bool, dtype: torch.dtype) -> None:
    plain = nn.Linear(256, 320, bias=has_bias, dtype=dtype)
    rows = torch.randn(*shape, 256, dtype=dtype)
    model = nn.ModuleList([plain])
    pack(model)
    assert isinstance(model[0], PackedLinear)
    torch.testing.assert_close(model[0](rows), plain(rows))


@torch.inference_mode()
def test_rows_may_lie_in_any_order() -> None:
    plain = nn.Linear(256, 320)
    rows = torch.randn(256, 9).mT
    torch.testing.assert_close(PackedLinear(plain)(rows), plain(rows))


@torch.inference_mode()
def test_the_plain_weight_can_be_read_all_the_same() -> None:
    plain = nn.Linear(256, 320)
    packed = PackedLinear(plain)
    assert torch.equal(packed.weight, plain.weight)
    assert packed.weight is packed.weight


class Doubled(nn.Linear):
    """Computes more than a linear layer."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def test_small_and_special_layers_stay_as_they_are() -> None:
    model = nn.ModuleDict(
        {"small": nn.Linear(16, 16), "special": Doubled(256, 320), "wide": nn.Linear(256, 320).double()}
    )
    before = dict(model.items())
    pack(model)
    assert dict(model.items()) == before


def test_layers_are_found_at_any_depth() -> None:
    model = nn.Sequential(nn.Sequential(nn.ReLU(), nn.Linear(256, 320)))
    pack(model)
    assert [type(layer) for layer in model.modules()] == [nn.Sequential, nn.Sequential, nn.ReLU, PackedLinear]
