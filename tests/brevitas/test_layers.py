"""Layers that no quantized layer can replace are named, not silently left float."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from condiquant_brevitas import quantize_sr
from condiquant_plugin import InputError, fake_quantizers


@torch.no_grad()
def computed(model, x):
    return model(x)


class Normalized(nn.Conv2d):
    """Weight standardization, as some networks have it in a subclass."""

    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias, padding=1)


class Mixed(nn.Module):
    """A network with one layer that is no module Brevitas replaces."""

    def __init__(self, way):
        super().__init__()
        self.way, self.first, self.last = way, nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 1)
        self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 4)
        self.weight = nn.Parameter(torch.randn(4, 4))
        if way == "attention":
            self.body = nn.MultiheadAttention(4, 2, batch_first=True)
        elif way == "encoder":
            self.body = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        elif way == "subclass":
            self.body = Normalized(4, 4, 3)

    def forward(self, x):
        x = self.first(x)
        if self.way == "subclass":
            x = self.body(x)
        elif self.way == "conv_transpose2d":
            x = F.conv_transpose2d(x, weight=self.weight[..., None, None])
        x = self.fc1(x.permute(0, 2, 3, 1))
        if self.way == "linear":
            x = F.linear(x, self.weight)
        elif self.way in ("attention", "encoder"):
            tokens = x.flatten(1, 2)
            body = (
                self.body(tokens, tokens, tokens)[0]
                if self.way == "attention"
                else self.body(tokens)
            )
            x = body.unflatten(1, x.shape[1:3])
        return self.last(self.fc2(x).permute(0, 3, 1, 2))


UNQUANTIZABLE = [
    ("attention", "transformer", "body.multi_head_attention_forward is a call in a MultiheadAtt", "body"),
    ("encoder", "transformer", "body is an nn.TransformerEncoderLayer, whose fast path", "body"),
    ("linear", "transformer", "linear is a call in a Mixed, of which no quantized layer", "linear"),
    ("conv_transpose2d", "all", "conv_transpose2d is a call in a Mixed", "conv_transpose2d"),
    ("subclass", "all", "body.conv2d is a call in a Normalized", "body"),
]  # fmt: skip


@pytest.mark.parametrize(("way", "scope", "words", "blacklist"), UNQUANTIZABLE)
def test_what_no_quantized_layer_can_replace(way, scope, words, blacklist):
    model, images = Mixed(way).eval(), torch.rand(2, 3, 6, 6)
    with pytest.raises(InputError, match=words) as caught:
        quantize_sr(model, images, scope=scope)
    assert "\n" not in str(caught.value)
    result = quantize_sr(model, images, scope=scope, name_blacklist=[blacklist])
    assert list(result.report) == ["fc1", "fc2"]
    if scope == "all":
        assert list(quantize_sr(model, images).report) == ["fc1", "fc2"]
        with pytest.raises(InputError, match=words):
            quantize_sr(model, images, other_bits=8)
    before = computed(result, images)
    for quantizer in fake_quantizers(result).values():
        quantizer.enabled = False
    assert not torch.equal(computed(result, images), before)
