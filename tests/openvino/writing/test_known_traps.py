"""Graphs that the CPU plugin computes wrongly without a word, and what convert() makes of them.

Each naive graph must stay wrong: when one of these fails, OpenVINO has changed and the form that
avoids it may be simplified.
"""

import warnings

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import pytest
import torch
from openvino.frontend.pytorch import ConversionExtension
from torch import nn
from torch.nn import functional as F

from condiquant_openvino import check_parity, convert, layer_executions
from condiquant_openvino.markers import Role, role_of
from condiquant_openvino.running.instruction_sets import sums_saturate
from condiquant_openvino.running.upscaling import compile_ir
from condiquant_openvino.writing.quantizer_graphs import redirect
from condiquant_plugin import FakeQuantizer
from condiquant_plugin.uniform import grid
from openvino_kernels import fuses_int8_attention, needs_vnni
from traps import assert_right, quantize, relative_error


def naive(model, x):
    """Plain FakeQuantize for every quantizer, as one would export."""

    def translate(context):
        lower, step = (np.float32(context.get_values_from_const_input(i)) for i in (1, 2))
        last_code = 2 ** int(context.get_values_from_const_input(4)) - 1
        bounds = [ops.constant(np.float32(v)) for v in (lower, lower + step * last_code)] * 2
        return ops.fake_quantize(context.get_input(0), *bounds, last_code + 1).outputs()

    extension = ConversionExtension("condiquant::fake_quantize", translate)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        return ov.convert_model(model, example_input=x, extension=[extension])


def without(ir, kind, role=None):
    """A copy that lacks the operators ``kind`` that a conversion puts between others."""
    naive = ir.clone()
    added = [node for node in naive.get_ordered_ops() if node.get_type_name() == kind]
    added = [node for node in added if role is None or role_of(node) is role]
    assert added
    for node in added:
        redirect(node.output(0), node.input_value(0))
    return naive


class Attention(nn.Module):
    """One head; each projection is a layer of its own."""

    def __init__(self, between, head_axis):
        super().__init__()
        self.query, self.key, self.value, self.last = (nn.Linear(16, 16) for _ in range(4))
        self.between, self.head_axis = between, head_axis

    def forward(self, x):
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.head_axis:
            q, k, v = (tensor.unsqueeze(1) for tensor in (q, k, v))
        mixed = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v
        return self.last(self.between(mixed.squeeze(1) if self.head_axis else mixed))


class WithoutBias(nn.Module):
    """A quantized convolution without bias, then ``between``; the first and last layer stay float."""

    def __init__(self, between):
        super().__init__()
        self.first, self.second, self.last = (nn.Conv2d(16, 16, 1) for _ in range(3))
        self.layer, self.between = nn.Conv2d(16, 16, 3, padding=1, bias=False), between
        with torch.no_grad():
            self.layer.weight.mul_(0.1)

    def forward(self, x):
        return self.last(self.second(self.between(self.layer(self.first(x)))))


def test_convolution_of_16_levels_with_fractional_zero_point(quantized, run):
    x = torch.randn(1, 32, 16, 16)
    model = quantized(nn.Conv2d(32, 32, 3, padding=1), x, 4)
    model.input.set_bounds(-1.3, 2.1)
    weight = model.layer.weight.detach().numpy()
    scale = np.float32(np.abs(weight).max() / 7)
    integers = np.rint(weight / scale).astype(np.int8)
    parameter = ops.parameter([1, 32, 16, 16], np.float32)
    bounds = [ops.constant(np.float32(v)) for v in (-1.3, 2.1)] * 2
    product = ops.convolution(
        ops.fake_quantize(parameter, *bounds, 16),
        ops.multiply(ops.convert(ops.constant(integers), np.float32), ops.constant(scale)),
        *([[1, 1]] * 4),
    )
    step = 3.4 / 15
    rounded = ((x.clamp(-1.3, 2.1) + 1.3) / step).round() * step - 1.3
    expected = F.conv2d(rounded, torch.from_numpy(integers * scale), padding=1)
    assert relative_error(run(ov.Model([product], [parameter]), x), expected) > 1e-2
    assert_right(model, x)


@pytest.mark.parametrize("layer", [nn.Linear(64, 64), nn.Conv2d(64, 64, 3, padding=1)])
def test_weight_constant_with_float_zero_point(quantized, run, layer):
    convolution = isinstance(layer, nn.Conv2d)
    x = torch.randn(1, 64, 8, 8) if convolution else torch.randn(1, 64, 64)
    model = quantized(layer, x, 4)
    values = layer.parametrizations.weight.original.detach()
    lower, step = values.min() * 0.9, (values.max() - values.min() * 0.9) / 15
    stored = grid.Grid(lower, step, 4)
    codes = stored.codes(values)
    weight = ops.multiply(
        ops.subtract(
            ops.convert(ops.constant(codes.numpy().astype(np.uint8)), np.float32),
            ops.constant((-lower / step).numpy()),
        ),
        ops.constant(step.numpy()),
    )
    parameter = ops.parameter(list(x.shape), np.float32)
    input_step = 4.5 / 15
    lower_bound = -7 * input_step
    bounds = [ops.constant(np.float32(v)) for v in (lower_bound, lower_bound + 4.5)] * 2
    quantized_input = ops.fake_quantize(parameter, *bounds, 16)
    if convolution:
        product = ops.convolution(quantized_input, weight, *([[1, 1]] * 4))
    else:
        product = ops.matmul(quantized_input, weight, False, True)
    inputs = grid.Grid(torch.tensor(lower_bound), torch.tensor(input_step), 4)
    rounded, values = inputs.levels(inputs.codes(x)), stored.levels(codes)
    expected = F.conv2d(rounded, values, padding=1) if convolution else F.linear(rounded, values)
    assert relative_error(run(ov.Model([product], [parameter]), x), expected) > 1e-3
    assert_right(model, x)


def test_free_range_network_converted_naively(convolution_net, run):
    x = torch.rand(1, 3, 16, 16)
    model = convolution_net(4)
    for module in model.modules():
        if hasattr(module, "row_blocks") and module.row_blocks > 1:
            module.row_blocks = 1
            module.lower, module.upper = (
                nn.Parameter(b.mean()) for b in (module.lower, module.upper)
            )
    with torch.no_grad():
        expected = model(x)
    assert relative_error(run(naive(model, x), x), expected) > 1e-2
    assert_right(model, x)


def test_compressed_weight_with_float_input(quantized, run):
    """The plugin would quantize the float input of a compressed weight by itself."""
    x = torch.randn(1, 64, 64)
    model = quantized(nn.Linear(64, 64), x, 8, input_bits=0)
    scale = model.layer.weight.abs().max() / 127
    integers = (model.layer.weight / scale).round().detach()
    weight = ops.multiply(
        ops.convert(ops.constant(integers.numpy().astype(np.int8)), np.float32),
        ops.constant(scale.detach().numpy()),
    )
    parameter = ops.parameter([1, 64, 64], np.float32)
    product = ov.Model([ops.matmul(parameter, weight, False, True)], [parameter])
    expected = F.linear(x, integers * scale.detach())
    if not sums_saturate():  # without VNNI it computes with floats
        assert relative_error(run(product, x), expected) > 1e-3
    assert_right(model, x)


@pytest.mark.parametrize(
    "between",
    [
        lambda x: x + 0.3,
        lambda x: x * 1.7,
        lambda x: x.clamp(-0.77, 0.81),
        lambda x: x.relu(),
        lambda x: x.softmax(-1),
        lambda x: torch.cat([x[..., :16], 1.3 * x[..., 16:]], -1),
        lambda x: x.transpose(-1, -2),
    ],
)
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_operators_between_quantizer_and_product(quantized, between, kind):
    """The transforms move scales and zero points through operators, and round limits on the way."""
    if kind == "linear":
        layer, x = nn.Linear(32, 32), torch.randn(1, 32, 32) + 0.4
    else:
        layer, x = nn.Conv2d(8, 8, 3, padding=1), torch.randn(1, 8, 32, 32) + 0.4
    assert_right(quantized(layer, x, 4, between=between), x)


@pytest.mark.parametrize("kind", ["linear", "convolution"])
@pytest.mark.parametrize("bits", [4, 8])
def test_input_quantizer_per_channel(quantized, kind, bits):
    if kind == "linear":
        layer, x, axis = nn.Linear(32, 32), torch.randn(1, 32, 32), -1
    else:
        layer, x, axis = nn.Conv2d(32, 32, 3, padding=1), torch.randn(1, 32, 8, 8), 1
    model = quantized(layer, x, bits)
    model.input = FakeQuantizer(bits, "activation", row_blocks=32, axis=axis)
    model.input.search_bounds(x)
    assert_right(model, x)


def test_weight_bounds_per_input_channel(quantized):
    x = torch.randn(1, 16, 32)
    assert_right(quantized(nn.Linear(32, 24), x, 4, row_blocks=32, axis=1), x)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_product_of_two_activations(bits):
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = FakeQuantizer(bits, "activation")
            self.second = FakeQuantizer(bits, "activation", side="one_sided")

        def forward(self, x):
            return self.second((self.first(x) @ self.first(x).transpose(-1, -2)).softmax(-1)) @ x

    model, x = Product(), torch.randn(1, 2, 32, 16)
    for quantizer in (model.first, model.second):
        quantizer.search_on_next_input = True
    with torch.no_grad():
        model(x)
    assert_right(model.eval(), x)


def test_quantized_tensor_used_twice():
    """By a convolution, and by a sum that must not see shifted integers."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.input = FakeQuantizer(4, "activation")
            self.weight = FakeQuantizer(4, "weight")
            self.layer = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x):
            x = self.input(x)
            return x + F.conv2d(x, self.weight(self.layer.weight), padding=1)

    model, x = Residual().eval(), torch.randn(1, 8, 16, 16)
    model.input.set_bounds(-1.3, 2.1)
    model.weight.set_bounds(-0.1, 0.12)
    assert_right(model, x)


@pytest.mark.parametrize(
    ("between", "added"),
    [
        (nn.Identity(), "Clamp"),
        (nn.Hardtanh(-0.1, 0.1), "Clamp"),
        (lambda x: 1.7 * x + 0.1, "Clamp"),
        (nn.LayerNorm(16), "Power"),
    ],
    ids=["linear", "hardtanh", "affine", "norm"],
)
def test_attention_straight_in_front_of_a_linear_layer(run, between, added):
    torch.manual_seed(0)
    x = torch.randn(1, 64, 16)
    model = quantize(Attention(between, head_axis=False), x, 4, "transformer")
    ir = convert(model, x)
    assert_right(model, x)
    assert {layer.runs_as for layer in layer_executions(ir, compile_ir(ir))} == {"int8"}
    if added == "Power" or fuses_int8_attention():  # it is that kernel that loses one
        assert not check_parity(model, without(ir, added), [x]).ok


@pytest.mark.parametrize(
    ("bits", "overflow", "added"),
    [
        (4, "safe", None),
        (8, "safe", "Power"),
        pytest.param(8, "vnni", "FakeQuantize", marks=needs_vnni),
    ],
)
def test_bytes_rearranged_behind_a_bias(run, bits, overflow, added):
    """Behind 256 levels, or 128, the bias of a linear layer is lost."""
    torch.manual_seed(0)
    x = torch.randn(1, 64, 16)
    network = Attention(nn.Identity(), head_axis=True)
    model = quantize(network, x, bits, "transformer", overflow)
    ir = convert(model, x)
    assert_right(model, x)
    if added:
        naive = without(ir, added, Role.BYTES if added == "FakeQuantize" else None)
        with torch.no_grad():
            assert relative_error(run(naive, x), model(x)) > 0.1


@pytest.mark.parametrize(
    "between",
    [nn.InstanceNorm2d(16), nn.GroupNorm(4, 16), lambda x: F.instance_norm(x.relu())],
    ids=["instance", "group", "relu"],
)
def test_norm_behind_a_product_without_bias(run, between):
    """The transforms move the product's scale past the norm, but not into its epsilon."""
    torch.manual_seed(0)
    x = torch.randn(1, 16, 16, 16)
    model = quantize(WithoutBias(between), x, 4, "all")
    assert_right(model, x)
    with torch.no_grad():
        assert relative_error(run(without(convert(model, x), "Power"), x), model(x)) > 1e-3


def test_convolution_without_bias_used_twice(run):
    """Its kernel takes in what one consumer multiplies with."""
    torch.manual_seed(0)
    x = torch.randn(1, 16, 16, 16)
    model = quantize(WithoutBias(lambda x: x + F.gelu(x)), x, 4, "all")
    assert_right(model, x)
    with torch.no_grad():
        assert relative_error(run(without(convert(model, x), "Power"), x), model(x)) > 1e-2


def test_supported_form_runs_in_int8(quantized):
    x = torch.randn(1, 64, 8, 8)
    ir = convert(quantized(nn.Conv2d(64, 64, 3, padding=1), x, 3), x)
    assert [layer.runs_as for layer in layer_executions(ir, compile_ir(ir))] == ["int8"]
