"""Products whose neighbouring terms fit in 16 bits, and what happens to those that do not."""

import logging

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from condiquant_openvino import check_parity, convert, layer_executions, read_metadata
from condiquant_openvino.parity import check as parity
from condiquant_openvino.parity.check import check_parities
from condiquant_openvino.running.instruction_sets import (
    VARIABLE,
    lower_instruction_sets,
    run_with,
    sums_saturate,
    warn_of_overflow,
)
from condiquant_openvino.running.upscaling import compile_ir
from condiquant_openvino.writing.overflow import (
    LARGEST_SUM,
    inexact_in_int8,
    largest_pair_sum,
    largest_pair_sums,
)
from condiquant_openvino.writing.quantizer_graphs import Quantizer
from condiquant_openvino.writing.tracing import Placeholder
from condiquant_plugin import FakeQuantizer, InputError
from condiquant_plugin.uniform import grid
from openvino_kernels import needs_vnni


class Layer(nn.Module):
    """One layer with a quantizer of each kind on its input and its weight."""

    def __init__(self, layer, bits, input_kind="activation", **options):
        super().__init__()
        self.layer = layer
        axis = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
        self.input = FakeQuantizer(bits, input_kind, name="layer.input", **options)
        self.weight = FakeQuantizer(bits, "weight", name="layer.weight", axis=axis, **options)

    def forward(self, x):
        weight, bias = self.weight(self.layer.weight), self.layer.bias
        x = self.input(x)
        if isinstance(self.layer, nn.Linear):
            return nn.functional.linear(x, weight, bias)
        if isinstance(self.layer, nn.ConvTranspose2d):
            return nn.functional.conv_transpose2d(x, weight, bias, stride=2)
        return nn.functional.conv2d(x, weight, bias, padding=1)


def with_bounds(model, inputs, weights):
    model.input.set_bounds(*inputs)
    model.weight.set_bounds(*weights)
    return model.eval()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_extreme_values_are_right_on_this_cpu(kind, bits):
    """Every weight and every input at the end of a skewed range."""
    torch.manual_seed(0)
    for low, weights in ((0.0, (-1.0, 1.0)), (-1.0, (-1.0, 1.0)), (-0.2, (-0.1, 1.0))):
        layer = nn.Linear(64, 64) if kind == "linear" else nn.Conv2d(64, 64, 3)
        shape = (1, 32, 64) if kind == "linear" else (1, 64, 8, 8)
        with torch.no_grad():
            layer.weight.uniform_(0.8, 1.0)
        model, x = with_bounds(Layer(layer, bits), (low, 1.0), weights), torch.rand(shape)
        x = 0.8 + 0.2 * x
        ir = convert(model, x)
        compiled = compile_ir(ir)
        with torch.no_grad():
            expected = model(x).numpy()
        assert np.abs(compiled([x.numpy()])[0] - expected).max() < 1e-5 * np.abs(expected).max()
        assert [layer.runs_as for layer in layer_executions(ir, compiled)] == ["int8"]
        assert 0 < max(largest_pair_sums(ir).values()) <= LARGEST_SUM


@given(
    st.integers(-128, 0),
    st.integers(0, 255),
    st.lists(st.lists(st.integers(-128, 127), min_size=2, max_size=6), min_size=1, max_size=3),
)
@settings(max_examples=50)
def test_the_bound_holds_for_all_pairs_and_is_reached(low, high, rows):
    if low < 0:
        high = min(high, 127)
    shift = 128 if low < 0 else 0
    width = min(map(len, rows))
    rows = np.array([row[:width] for row in rows])
    worst = max(
        abs(sum(v for v in pair if v * sign > 0)) * (high + shift)
        for row in rows
        for i, first in enumerate(row)
        for second in row[i + 1 :]
        for pair in ((first, second),)
        for sign in (1, -1)
    )
    assert largest_pair_sum((low, high), rows) == worst


def test_integers_of_an_ir_are_those_of_its_quantizers():
    torch.manual_seed(0)
    layer, x = nn.Conv2d(8, 4, 3), torch.rand(1, 8, 6, 6)
    model = with_bounds(Layer(layer, 4), (-0.25, 1.0), (-0.1, 0.11))
    (found,) = largest_pair_sums(convert(model, x)).values()
    inputs, weights = model.input, model.weight
    fine = weights.snapped().step / weights.snapped().refinement
    codes = (weights(layer.weight).detach() / fine).round().reshape(4, -1)
    pairs = torch.stack([side.clamp_min(0).topk(2, 1).values.sum(1) for side in (codes, -codes)])
    highest = 15 * inputs.snapped().refinement - inputs.snapped().zero
    assert found == (highest + 128) * pairs.max()


def test_operands_that_may_overflow_stay_float_and_are_right():
    """A user's quantizers of a kind that is meant for the inputs of layers."""

    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = FakeQuantizer(8, "activation", name="first")
            self.second = FakeQuantizer(8, "activation", name="second")

        def forward(self, x):
            return self.first(x) @ self.second(x).transpose(-1, -2)

    model, x = Product().eval(), torch.randn(1, 2, 32, 64).clamp(-2, 2)
    for quantizer in (model.first, model.second):
        quantizer.set_bounds(-2.0, 2.0)
    ir = convert(model, x)
    check_parity(model, ir, [x]).raise_if_broken()
    (layer,) = layer_executions(ir, compile_ir(ir))
    assert (layer.runs_as, layer.reason) == ("f32", "input quantizer in float form")
    assert largest_pair_sums(ir) == {}


class Products(nn.Module):
    """Of signed by unsigned operands, and of floats that a product has given."""

    def __init__(self):
        super().__init__()
        self.signed = FakeQuantizer(8, "operand", name="signed")
        self.unsigned = FakeQuantizer(8, "operand", name="unsigned", side="one_sided")
        self.signed.set_bounds(-1.0, 1.0)
        self.unsigned.set_bounds(0.0, 1.0)

    def forward(self, x):
        quantized = self.signed(x) @ self.unsigned(x.transpose(-1, -2))
        return quantized + (2 * x) @ (3 * x).transpose(-1, -2)


def test_sums_are_those_of_int8_kernels_only():
    """None takes an unsigned second operand."""
    model, x = Products().eval(), torch.rand(1, 2, 8, 16)
    ir = convert(model, x)
    check_parity(model, ir, [x]).raise_if_broken()
    assert list(largest_pair_sums(ir).values()) == [0]


def test_of_a_product_that_may_overflow_the_activations_are_named():
    def quantizer(kind):
        bounds = torch.tensor(-1.0), torch.tensor(1.0)
        snapped = grid.snap(*bounds, 8, kind, overflow="vnni")
        arrays = (t.numpy() for t in (snapped.lower, snapped.step, snapped.zero.int()))
        return Quantizer(kind, *arrays, 8, kind, 1)

    quantizers = {kind: quantizer(kind) for kind in ("activation", "weight")}
    x = ops.parameter([1, 8, 16], np.float32)
    weight = ops.constant(np.ones((16, 16), np.float32))
    factors = [
        Placeholder([values.output(0)], label).output(0)
        for values, label in ((x, "activation"), (weight, "weight"))
    ]
    model = ov.Model([ops.matmul(*factors, False, True)], [x])
    assert inexact_in_int8(model, quantizers) == {"activation"}


@pytest.mark.parametrize(
    ("low", "lowest", "form"), [(-1.0, -0.14, "f32"), (-1.0, -0.11, "int8"), (0.0, -0.14, "int8")]
)
def test_deconvolutions_of_signed_inputs_have_even_weights_or_are_float(low, lowest, form):
    """With AVX-512 without VNNI the plugin halves their weights."""
    torch.manual_seed(0)
    x = torch.rand(1, 64, 8, 8)
    model = with_bounds(Layer(nn.ConvTranspose2d(64, 32, 3, 2), 4), (low, 1.0), (lowest, 0.3))
    assert model.weight.snapped().zero % 2 == (lowest == -0.14)
    ir = convert(model, x, static=True)
    check_parity(model, ir, [x]).raise_if_broken()
    assert [layer.runs_as for layer in layer_executions(ir, compile_ir(ir))] == [form]


def _vnni():
    layer = nn.Linear(64, 64)
    with torch.no_grad():
        layer.weight.uniform_(0.8, 1.0)
    model, x = Layer(layer, 8, overflow="vnni"), torch.rand(1, 32, 64)
    return with_bounds(model, (0.0, 1.0), (-1.0, 1.0)), x


def test_grids_for_vnni_are_int8_and_named_in_the_metadata(caplog):
    model, x = _vnni()
    ir = convert(model, x)
    assert read_metadata(ir)["overflow"] == "vnni"
    assert max(largest_pair_sums(ir).values()) > LARGEST_SUM
    assert [layer.runs_as for layer in layer_executions(ir, compile_ir(ir))] == ["int8"]
    caplog.clear()
    with caplog.at_level(logging.WARNING, "condiquant_openvino.running.instruction_sets"):
        warn_of_overflow(ir)
        warn_of_overflow(
            convert(with_bounds(Layer(nn.Linear(4, 4), 8), (0, 1), (-1, 1)), x[..., :4])
        )
    warned = [record.args for record in caplog.records]
    assert warned == [(ir.get_friendly_name(),)] * sums_saturate()
    if sums_saturate():
        assert "quantized with overflow=vnni: on this CPU" in caplog.text
        with pytest.raises(InputError, match=r"for CPUs with VNNI .* this one has none: .*=safe"):
            check_parity(model, ir, [x])


@needs_vnni
def test_grids_for_vnni_are_right_where_it_is():
    model, x = _vnni()
    check_parity(model, convert(model, x), [x]).raise_if_broken()


def test_an_ir_that_may_overflow_is_refused_from_its_integers():
    model, x = _vnni()
    ir = convert(model, x)
    ir.set_rt_info('{"overflow": "safe"}', ["condiquant"])
    with pytest.raises(
        RuntimeError, match=r"two neighbouring terms of .*MatMul may come to 6\d{4}, "
    ):
        check_parity(model, ir, [x]).raise_if_broken()


def test_lower_instruction_sets_are_those_below_this_process():
    sets = lower_instruction_sets()
    assert sets in ([], ["AVX2"], ["AVX2", "AVX512_CORE"])
    for lower in ("AVX2", *sets):
        assert run_with(lower, sums_saturate)
        assert run_with(lower, lower_instruction_sets) == sets[: sets.index(lower) if sets else 0]


def test_an_error_in_a_lower_instruction_set_is_one_line_that_names_it():
    with pytest.raises(
        RuntimeError, match=rf"^with {VARIABLE}=AVX2: ValueError: invalid literal.*$"
    ):
        run_with("AVX2", int, "x")


def test_parity_is_checked_with_every_lower_instruction_set(monkeypatch):
    monkeypatch.setattr(parity, "lower_instruction_sets", lambda: ["AVX2"])
    torch.manual_seed(0)
    model, x = Layer(nn.Conv2d(8, 8, 3), 4), torch.rand(1, 8, 12, 12)
    ir = convert(with_bounds(model, (0.0, 1.0), (-0.1, 0.1)), x)
    parities = check_parities(model, ir, [x])
    assert {name: found.instruction_set for name, found in parities.items()} == {
        "f32": "", "AVX2": "AVX2", "accuracy": "", "default": "",
    }  # fmt: skip
    assert all(found.ok for found in parities.values())
    assert len(parities["AVX2"].layers) == 1
    assert parities["AVX2"].inputs == parities["f32"].inputs or lower_instruction_sets()


def test_what_differs_with_a_lower_instruction_set_names_it(monkeypatch):
    """Saturating sums, were the integers not looked at."""
    monkeypatch.setattr(parity, "lower_instruction_sets", lambda: ["AVX2"])
    monkeypatch.setattr(parity, "sums_saturate", lambda: False)
    model, x = _vnni()
    ir = convert(model, x)
    ir.set_rt_info('{"overflow": "safe"}', ["condiquant"])
    monkeypatch.setattr(parity, "largest_pair_sums", lambda _: {})
    found = list(check_parities(model, ir, [0.8 + 0.2 * x]).values())[-1]
    expected = "" if sums_saturate() else "AVX2"  # here it differs without lowering, too
    assert found.instruction_set == expected
    assert (f"{VARIABLE}=AVX2" in found.complaint()) == bool(expected)
    assert found.complaint().startswith("with INFERENCE_PRECISION_HINT=f32 properties")


def test_a_changed_weight_is_found_before_any_lower_instruction_set():
    torch.manual_seed(0)
    model, x = Layer(nn.Conv2d(8, 8, 3), 4), torch.rand(1, 8, 12, 12)
    ir = convert(with_bounds(model, (0.0, 1.0), (-0.1, 0.1)), x)
    broken = ir.clone()
    weight = next(
        n for n in broken.get_ops() if n.get_friendly_name() == "fake_quantize/layer.weight"
    )
    scale = weight.input_value(1).get_node().data
    weight.input(1).replace_source_output(ops.constant(np.float32(1.01 * scale)).output(0))
    assert list(check_parities(model, broken, [x])) == ["f32"]
