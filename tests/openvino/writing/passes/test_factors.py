"""Layers whose output is multiplied by constants, as in residual branches, keep their int8 kernels."""

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import pytest
import torch
from torch import nn

import condiquant_nncf
from condiquant_openvino import check_parity, convert, layer_executions
from condiquant_openvino.running.upscaling import compile_ir
from condiquant_openvino.writing.passes.factors import move_factors_behind_products
from condiquant_openvino.writing.tracing import Placeholder

CONVOLUTIONS = {
    "convolution": lambda: nn.Conv2d(16, 16, 3, padding=1),
    "without bias": lambda: nn.Conv2d(16, 16, 3, padding=1, bias=False),
    "grouped": lambda: nn.Conv2d(16, 16, 3, padding=1, groups=4),
    "normalized": lambda: nn.Sequential(
        nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
    ),
}
FACTORS = {
    "scalar": 0.2,
    "negative": -0.3,
    "by channel": torch.linspace(-1, 2, 16).view(1, 16, 1, 1),
}


class Branch(nn.Module):
    def __init__(self, layer, factor):
        super().__init__()
        self.first, self.layer = nn.Conv2d(3, 16, 3, padding=1), layer
        self.last, self.factor = nn.Conv2d(16, 3, 3, padding=1), factor

    def forward(self, x):
        x = self.first(x)
        return self.last(x + self.layer(x.relu()) * self.factor)


class OnChannelsLast(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x):
        return self.linear(x.movedim(1, -1)).movedim(-1, 1)


def quantized(layer, factor, bits):
    torch.manual_seed(0)
    x = torch.rand(1, 3, 16, 16)
    network = Branch(layer, factor)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    config = condiquant_nncf.QuantizationConfig(bits, bits, "all", recondition=None)
    return condiquant_nncf.quantize_network(network.eval(), x, config).model, x


def assert_is_int8(ir):
    (layer,) = [each for each in layer_executions(ir, compile_ir(ir)) if "layer" in each.name]
    assert layer.runs_as == "int8", layer


@pytest.mark.parametrize("factor", FACTORS.values(), ids=FACTORS)
@pytest.mark.parametrize(("kind", "bits"), [*((kind, 8) for kind in CONVOLUTIONS), ("grouped", 4)])
def test_convolutions_stay_int8(kind, factor, bits):
    model, x = quantized(CONVOLUTIONS[kind](), factor, bits)
    ir = convert(model, x, isa="vnni" if bits == 8 else "avx2")
    assert_is_int8(ir)
    parity = check_parity(model, ir, [x])
    parity.raise_if_broken()
    (layer,) = parity.layers
    assert layer.error < 1e-6


@pytest.mark.parametrize("factor", FACTORS.values(), ids=FACTORS)
def test_linear_layers_stay_int8(factor):
    model, x = quantized(OnChannelsLast(), factor, 8)
    ir = convert(model, x)
    assert_is_int8(ir)
    check_parity(model, ir, [x]).raise_if_broken()


def test_factors_of_single_entries_stay():
    parameter = ops.parameter([1, 4, 8, 8], np.float32)
    random = np.random.default_rng(0)
    values = ops.constant(random.standard_normal((5, 4, 3, 3)).astype(np.float32))
    weight = Placeholder([ops.convert(values, np.float32).output(0)], "weight")
    factor = ops.constant(np.arange(4, dtype=np.float32).reshape(1, 4, 1, 1))
    product = ops.convolution(parameter, ops.multiply(weight.output(0), factor), *([[1, 1]] * 4))
    model = ov.Model([product], [parameter])
    before = [node.get_type_name() for node in model.get_ordered_ops()]
    move_factors_behind_products(model)
    assert [node.get_type_name() for node in model.get_ordered_ops()] == before
    assert product.input_value(1).get_node().get_type_name() == "Multiply"
