"""Convolutions of inputs of either sign, joined or rearranged in front of them, in int8 and right."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from condiquant_openvino import convert, layer_executions
from condiquant_openvino.running.instruction_sets import sums_saturate
from condiquant_openvino.running.upscaling import compile_ir
from condiquant_openvino.writing.passes import joining, propagation
from traps import assert_right, quantize, relative_error

without_vnni = pytest.mark.skipif(not sums_saturate(), reason="seen on CPUs without VNNI alone")


class Dense(nn.Module):
    """Convolutions get what those before them gave, of either sign, as in the blocks of RRDBNet."""

    def __init__(self, size):
        super().__init__()
        self.first, self.second, self.third, self.last = (
            nn.Conv2d(inputs, outputs, size, padding=size // 2)
            for inputs, outputs in ((16, 16), (16, 8), (24, 8), (32, 3))
        )

    def forward(self, x):
        x = self.first(x)
        more = F.leaky_relu(self.second(x), 0.2)
        most = F.leaky_relu(self.third(torch.cat([x, more], 1)), 0.2)
        return self.last(torch.cat([x, more, most], 1))


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("size", [1, 3])
def test_signed_inputs_that_are_joined(bits, size):
    torch.manual_seed(0)
    x = torch.randn(1, 16, 16, 16)
    model = quantize(Dense(size), x, bits, "all", other_bits=8)
    assert_right(model, x)
    ir = convert(model, x)
    assert {layer.runs_as for layer in layer_executions(ir, compile_ir(ir))} == {"int8"}


@without_vnni
@pytest.mark.parametrize("size", [1, 3])
def test_signed_bytes_that_are_joined(run, monkeypatch, size):
    """FakeQuantize is moved in front of the Concat, and its bytes are taken for unsigned."""
    torch.manual_seed(0)
    x = torch.randn(1, 16, 16, 16)
    model = quantize(Dense(size), x, 8, "all", other_bits=8)
    monkeypatch.setattr(joining, "_joins_signed", lambda _: False)
    with torch.no_grad():
        assert relative_error(run(convert(model, x), x), model(x)) > 1e-2


class Rearranged(nn.Module):
    """A convolution of either sign behind ``between``, which only rearranges what another one gave."""

    def __init__(self, between, groups):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)
        self.layer, self.between = nn.Conv2d(16, 16, 3, padding=1, groups=groups), between

    def forward(self, x):
        return self.last(self.layer(self.between(self.first(x))))


REARRANGED = {
    "shifted": lambda x: torch.roll(x, (1, 2), (2, 3)),
    "shuffled": lambda x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2),
    "pooled": lambda x: F.adaptive_max_pool2d(x, (x.shape[2] // 2, x.shape[3] // 2)),
    "from tokens": lambda x: x.flatten(2).transpose(1, 2).transpose(1, 2).reshape(x.shape),
    "chunked": lambda x: torch.cat([part + 1 for part in x.chunk(2, 1)], 1),
}


@pytest.mark.parametrize(("groups", "bits"), [(1, 8), (16, 4)])
@pytest.mark.parametrize("between", REARRANGED.values(), ids=REARRANGED)
def test_signed_inputs_that_were_rearranged(between, groups, bits):
    torch.manual_seed(0)
    x = torch.rand(1, 3, 16, 16)
    model = quantize(Rearranged(between, groups), x, bits, "all")
    assert_right(model, x)
    ir = convert(model, x)
    (layer,) = [layer for layer in layer_executions(ir, compile_ir(ir)) if layer.name == "layer"]
    assert layer.runs_as == "int8"


@without_vnni
def test_signed_bytes_that_are_rearranged(run, monkeypatch):
    """The kernel of signed bytes halves odd weights."""
    torch.manual_seed(0)
    x = torch.rand(1, 3, 16, 16)
    model = quantize(Rearranged(REARRANGED["shifted"], 1), x, 8, "all")
    monkeypatch.setattr(propagation._Encoder, "is_bound_to_convolution", False)
    with torch.no_grad():
        assert relative_error(run(convert(model, x), x), model(x)) > 5e-3
