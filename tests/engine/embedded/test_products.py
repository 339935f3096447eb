"""Products by oneDNN are those that torch computes, whichever way each is taken."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from penstock.engine.embedded_products import PackedLinear, Sibling, attention_scores, pack, weighted_sums

DTYPES = [torch.float32] + [torch.bfloat16] * torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (1, 33), (3, 5, 2), (1, 0), (7,)])
@torch.inference_mode()
def test_products_are_those_of_the_plain_layer(shape: tuple[int, ...], has_bias: bool, dtype: torch.dtype) -> None:
    plain = nn.Linear(256, 320, bias=has_bias, dtype=dtype)
    rows = torch.randn(*shape, 256, dtype=dtype)
    model = nn.ModuleList([plain])
    pack(model, lambda: None)
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
    pack(model, lambda: None)
    assert dict(model.items()) == before


def test_layers_are_found_at_any_depth() -> None:
    model = nn.Sequential(nn.Sequential(nn.ReLU(), nn.Linear(256, 320)))
    pack(model, lambda: None)
    assert [type(layer) for layer in model.modules()] == [nn.Sequential, nn.Sequential, nn.ReLU, PackedLinear]


@pytest.mark.parametrize("rows", [3, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_attention_multiplies_matrix_by_matrix(rows: int, dtype: torch.dtype) -> None:
    queries = torch.randn(4, rows, 32, dtype=dtype)
    context = torch.randn(4, 90, 32, dtype=dtype)[:, 10:80]  # as a tile is cut out of what was gathered
    scores = attention_scores(queries, context, 0.25)
    torch.testing.assert_close(scores, torch.matmul(queries, context.mT) * 0.25)
    weights = scores.softmax(-1)
    torch.testing.assert_close(weighted_sums(weights, context), torch.matmul(weights, context))


class Layers(nn.Module):
    """Three layers of one input, two of them with a bias; and two of others."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(256, 320), nn.Linear(256, 160), nn.Linear(256, 192, bias=False)
        self.four, self.again = nn.Linear(256, 224), nn.Linear(256, 256)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        products = [self.one(rows), self.two(rows), self.three(rows), self.four(2 * rows), self.again(self.again(rows))]
        return torch.cat(products, -1)


@torch.inference_mode()
def test_layers_of_one_input_are_multiplied_side_by_side() -> None:
    model, rows = Layers(), torch.randn(1, 5, 256)
    plain, weights = model(rows), [layer.weight for layer in model.children()]
    assert torch.equal(pack(model, lambda: model(rows)), plain)
    assert [type(layer) for layer in model.children()] == [Sibling, Sibling, PackedLinear, PackedLinear, PackedLinear]
    torch.testing.assert_close(model(rows), plain)
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(model.children(), weights, strict=True))


@torch.inference_mode()
def test_siblings_may_be_called_in_any_order_and_with_different_rows() -> None:
    model, rows, others = Layers(), torch.randn(1, 5, 256), torch.randn(3, 256)
    one, two = model.one, model.two
    pack(model, lambda: model(rows))
    calls = [(two, model.two, rows), (one, model.one, rows), (one, model.one, others), (one, model.one, others)]
    for plain, packed, given in [*calls, (two, model.two, rows), (one, model.one, others)]:
        torch.testing.assert_close(packed(given), plain(given))
