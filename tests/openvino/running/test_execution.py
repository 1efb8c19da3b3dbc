"""What the plugin runs is read from its runtime graph; every reason has a network that shows it."""

from collections import Counter

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import pytest
import torch
from torch import nn

from condiquant_openvino import convert, layer_executions
from condiquant_openvino.running.execution import int8_share
from condiquant_openvino.running.upscaling import compile_ir
from condiquant_plugin import FakeQuantizer
from networks import build
from openvino_kernels import attention, fuses_int8_attention


def executions(ir, **properties):
    return layer_executions(ir, compile_ir(ir, "CPU", properties))


def only(model, x):
    (layer,) = executions(convert(model, x))
    return layer


def test_every_product_of_a_network_is_listed_by_its_layer(exported_convolutions):
    _, ir, _ = exported_convolutions
    layers = executions(ir)
    quantized = {"plain", "grouped", "depthwise", "linear", "back", "transposed", "wide"}
    assert {layer.name.split(".")[0] for layer in layers[1:]} == quantized
    assert (layers[0].operator, layers[0].reason) == ("Convolution", "not quantized")
    assert Counter(layer.operator for layer in layers) == {
        "Convolution": 2,
        "GroupConvolution": 2,
        "MatMul": 2,
        "GroupConvolutionBackpropData": 1,
        "ConvolutionBackpropData": 1,
    }
    assert all((layer.runs_as == "int8") == (layer.reason == "") for layer in layers)
    assert 0 < int8_share(layers) == sum(layer.reason == "" for layer in layers) / 8 < 1


@pytest.mark.parametrize("size", [None, 24])
def test_window_attention_loses_no_product(size):
    """With a static size the plugin runs each attention as one node."""
    x = torch.rand(1, 3, 24, 24)
    ir = convert(build("swinir"), x)
    if size is not None:
        ir.reshape([1, 3, size, size])
    layers = executions(ir)
    products = [node for node in ir.get_ops() if node.get_type_name() in ("MatMul", "Convolution")]
    assert len(layers) == len(products) == len({layer.name for layer in layers})
    assert {(layer.runs_as, layer.reason) for layer in layers} == {("f32", "not quantized")}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("queries", [False, True])
@pytest.mark.parametrize("values", [False, True])
def test_products_inside_a_fused_attention_are_told_apart(queries, values, dynamic):
    ir = attention(queries, values, dynamic)
    compiled = compile_ir(ir)
    graph = compiled.get_runtime_model().get_ordered_ops()
    by_name = {node.get_friendly_name(): node for node in graph}
    last = by_name.get("values/MatMul")
    if last is None or last.get_rt_info()["layerType"].astype(str) != "Subgraph":
        always = queries == values and not dynamic and (fuses_int8_attention() or not queries)
        assert not always, "where this shows nothing, nothing else does"
        pytest.skip("the plugin does not fuse this attention")
    scores, result = layer_executions(ir, compiled)
    assert (scores.name, result.name) == ("scores/MatMul", "values/MatMul")
    entering = [
        value.get_element_type().get_type_name() for value in by_name[result.name].input_values()
    ]
    assert (scores.runs_as == "int8") == (entering[:2] == ["i8", "i8"])
    assert (result.runs_as == "int8") == (entering[-1] == "i8")
    assert (scores.reason == "not quantized") == (not queries)
    assert (result.runs_as, result.reason) == (("int8", "") if values else ("f32", "not quantized"))


@pytest.mark.parametrize("sequence", [64, -1])
def test_attention_operator_counts_as_two_products(sequence):
    inputs = [ops.parameter([1, 2, sequence, 16], np.float32) for _ in range(3)]
    node = ops.scaled_dot_product_attention(*inputs)
    node.set_friendly_name("attention")
    ir = ov.Model([node], inputs)
    layers = executions(ir)
    assert [layer.name for layer in layers] == ["attention/scores", "attention/values"]
    assert {layer.runs_as for layer in layers} == {"f32"}


def test_float_kernels_are_named_by_their_type(quantized):
    if "BF16" not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("no bf16 on this CPU")
    x = torch.randn(1, 16, 32)
    ir = convert(quantized(nn.Linear(32, 32), x, 0), x)
    (layer,) = executions(ir, INFERENCE_PRECISION_HINT="bf16")
    assert layer.runs_as == "bf16"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"bits": 4, "input_bits": 0}, "weight in float form: its input is not quantized"),
        ({"bits": 0, "input_bits": 4}, "its weight is not quantized"),
        ({"bits": 4, "row_blocks": 32, "axis": 1}, "weight quantized per input channel"),
        (
            {"bits": 4, "between": torch.relu},
            "weight in float form: Relu stands between its input and its quantizer",
        ),
    ],
)
def test_reason_of_a_linear_layer(quantized, options, reason):
    x = torch.randn(1, 16, 32)
    layer = only(quantized(nn.Linear(32, 24), x, **options), x)
    assert (layer.operator, layer.runs_as, layer.reason) == ("MatMul", "f32", reason)


def test_reason_of_an_input_with_a_grid_per_channel(quantized):
    x = torch.randn(1, 16, 32)
    model = quantized(nn.Linear(32, 32), x, 4)
    model.input = FakeQuantizer(4, "activation", row_blocks=32, axis=-1)
    model.input.search_bounds(x)
    assert only(model, x).reason == "input quantized per channel"


def test_reason_of_an_input_that_a_float_operator_takes_too():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.input, self.weight = FakeQuantizer(4, "activation"), FakeQuantizer(4, "weight")
            self.layer = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x):
            x = self.input(x)
            return x + nn.functional.conv2d(x, self.weight(self.layer.weight), padding=1)

    model, x = Residual().eval(), torch.randn(1, 8, 16, 16)
    model.input.set_bounds(-1.3, 2.1)
    model.weight.set_bounds(-0.1, 0.12)
    reason = "another consumer of the quantized input is a float operator"
    assert only(model, x).reason == reason


def test_reason_of_a_product_with_one_float_operand():
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = FakeQuantizer(4, "activation")

        def forward(self, x):
            return self.first(x) @ x.transpose(-1, -2)

    model, x = Product().eval(), torch.randn(1, 2, 32, 16)
    model.first.set_bounds(-1.3, 2.1)
    layer = only(model, x)
    assert (layer.name, layer.reason) == ("first", "one operand is not quantized")


def _plain(weight_levels, operand_bounds=None):
    """FakeQuantize as another tool writes it, on a weight or on two activations."""
    parameter = ops.parameter([1, 2, 64, 64], np.float32)

    def fake_quantize(x, low, high, levels):
        bounds = [ops.constant(np.float32(v)) for v in (low, high)] * 2
        return ops.fake_quantize(x, *bounds, levels)

    if operand_bounds is None:
        values = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
        weight = fake_quantize(ops.constant(values), -1, 1, weight_levels)
        product = ops.matmul(fake_quantize(parameter, 0, 2, 256), weight, False, True)
    else:
        operands = [fake_quantize(parameter, *bounds, 256) for bounds in operand_bounds]
        product = ops.matmul(*operands, False, True)
    product.set_friendly_name("product")
    return ov.Model([product], [parameter])


def test_plain_fake_quantize_of_another_tool():
    (layer,) = executions(_plain(16))
    assert (layer.name, layer.runs_as) == ("product", "f32")
    assert layer.reason == "FakeQuantize of 16 levels"
    (layer,) = executions(_plain(255))
    assert (layer.runs_as, layer.reason) == ("int8", "")


@pytest.mark.parametrize(
    ("groups", "zero", "reason"),
    [
        (1, 0, ""),
        (1, 100, "zero point of an operand"),
        (2, 0, "the plugin has no int8 kernel for it"),
    ],
)
def test_reason_of_a_transposed_convolution(groups, zero, reason):
    parameter = ops.parameter([1, 16, 16, 16], np.float32)
    bounds = [ops.constant(np.float32(v)) for v in (-zero * 0.01, (255 - zero) * 0.01)] * 2
    codes = np.random.default_rng(0).integers(-120, 120, (groups, 16 // groups, 8, 4, 4))
    codes = codes.astype(np.int8) if groups > 1 else codes[0].astype(np.int8)
    scale = ops.constant(np.float32(0.003))
    weight = ops.multiply(ops.convert(ops.constant(codes), np.float32), scale)
    transposed = (
        ops.convolution_backprop_data if groups == 1 else ops.group_convolution_backprop_data
    )
    strides = {"strides": [2, 2], "pads_begin": [1, 1], "pads_end": [1, 1], "dilations": [1, 1]}
    product = transposed(ops.fake_quantize(parameter, *bounds, 256), weight, **strides)
    (layer,) = executions(ov.Model([product], [parameter]))
    assert (layer.runs_as == "int8", layer.reason) == (not reason, reason)


def test_reason_of_operands_with_a_zero_point():
    bounds = [(-1.3, 2.1), (-0.7, 2.9)]
    (layer,) = executions(_plain(256, bounds))
    assert (layer.runs_as, layer.reason) == ("f32", "zero point of an operand")
    symmetric = [(-2.56, 2.54), (-1.28, 1.27)]
    (layer,) = executions(_plain(256, symmetric))
    assert (layer.runs_as, layer.reason) == ("int8", "")
