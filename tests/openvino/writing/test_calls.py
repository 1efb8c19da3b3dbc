"""Quantizers that are called more often than they are used."""

import pytest
import torch
from torch import nn

import condiquant_nncf
from condiquant_nncf import QuantizationConfig
from condiquant_openvino import check_parity, convert
from condiquant_plugin import FakeQuantizer, fake_quantizers


class Attention(nn.Module):
    def __init__(self, need_weights, **arguments):
        super().__init__()
        self.need_weights = need_weights
        self.head, self.tail = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 12, 3, padding=1)
        self.attention, self.out = nn.MultiheadAttention(16, 2, **arguments), nn.Linear(16, 16)

    def forward(self, x):
        features = self.head(x)
        tokens = features.flatten(2).transpose(1, 2)
        mixed = self.attention(tokens, tokens, tokens, need_weights=self.need_weights)[0]
        tokens = tokens + self.out(mixed)
        return torch.pixel_shuffle(self.tail(tokens.transpose(1, 2).view_as(features)), 2)


@pytest.mark.parametrize("arguments", [{}, {"bias": False}, {"add_bias_kv": True}])
@pytest.mark.parametrize("need_weights", [False, True])
def test_multi_head_attention(need_weights, arguments):
    torch.manual_seed(0)
    crops = torch.rand(3, 3, 12, 12)
    network = Attention(need_weights, batch_first=True, **arguments).eval()
    model = condiquant_nncf.quantize_network(network, crops, QuantizationConfig()).model
    names = {quantizer.name for quantizer in fake_quantizers(model).values()}
    assert "attention.in_proj_weight.weight" in names
    parity = check_parity(model, convert(model, crops[:1]), [crops[:1]])
    parity.raise_if_broken()
    assert any("in_proj_weight" in layer.name for layer in parity.layers)


class Discarding(nn.Module):
    """``discarded``: which of two calls with different inputs has no use."""

    def __init__(self, discarded):
        super().__init__()
        self.discarded = discarded
        self.layer = nn.Linear(8, 8)
        self.input = FakeQuantizer(4, "activation", name="input")
        self.weight = FakeQuantizer(4, "weight", name="weight")
        self.input.set_bounds(0.0, 2.0)
        self.weight.set_bounds(-0.4, 0.4)

    def forward(self, x):
        products = [
            nn.functional.linear(self.input(v), self.weight(w))
            for v, w in ((x, self.layer.weight), (0.5 * x + 0.3, -self.layer.weight))
        ]
        kept = [p for call, p in enumerate(products) if call != self.discarded]
        return sum(kept)


@pytest.mark.parametrize("discarded", [0, 1, None])
def test_a_call_without_use(discarded):
    torch.manual_seed(0)
    x, model = torch.rand(1, 5, 8), Discarding(discarded).eval()
    parity = check_parity(model, convert(model, x), [x])
    parity.raise_if_broken()
    expected = {0: ["input#1 x weight#1"], 1: ["input x weight"]}
    both = ["input x weight", "input#1 x weight#1"]
    assert sorted(layer.name for layer in parity.layers) == expected.get(discarded, both)
    assert {q.name for q in fake_quantizers(model).values()} == {"input", "weight"}
