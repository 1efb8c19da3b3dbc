"""Every form that a fake quantizer takes in an IR, against the grid that it stands for."""

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from condiquant_openvino.markers import has_weight, output_channel_axes
from condiquant_openvino.running.upscaling import compile_ir
from condiquant_openvino.writing.passes.compaction import compact
from condiquant_openvino.writing.quantizer_graphs import (
    Quantizer,
    decode,
    elementwise,
    encode,
    stored_bytes,
    weight,
    without_last_swap,
)
from condiquant_plugin.uniform import grid

RANGES = [(-1.3, 2.1), (-0.01, 1.2), (0.0, 3.0), (-4.0, 0.0)]


def quantizer_of(bits, kind, lower, upper):
    snapped = grid.snap(torch.as_tensor(lower), torch.as_tensor(upper), bits, kind)
    lower, step, zero = (t.numpy() for t in (snapped.lower, snapped.step, snapped.zero.int()))
    return Quantizer("x", lower, step, zero, bits, kind, snapped.refinement)


def expected_of(x, quantizer):
    grid_of = quantizer.lower, quantizer.step, quantizer.zero
    return reference.quantize(x, *grid_of, quantizer.bits, quantizer.refinement)


def around_every_code(quantizer):
    codes = np.arange(-2, 2**quantizer.bits + 2)[:, None] + [-0.49, -0.2, 0.0, 0.2, 0.49]
    x = quantizer.lower + quantizer.step * codes.ravel()
    return np.array([*x, -1e3, 1e3], np.float32)


@pytest.mark.parametrize(("lower", "upper"), RANGES)
@pytest.mark.parametrize("bits", [2, 4, 5, 8])
@pytest.mark.parametrize("form", ["float", "bytes"])
def test_inputs_are_rounded_as_the_grid_says(form, bits, lower, upper):
    quantizer = quantizer_of(bits, "activation", lower, upper)
    x = around_every_code(quantizer)
    parameter = ops.parameter([-1], np.float32)
    if form == "float":
        result = elementwise(parameter.output(0), quantizer)
    else:
        result = decode(encode(parameter.output(0), quantizer), quantizer)
    found = compile_ir(ov.Model([result], [parameter]))([x])[0]
    atol = 1e-6 * float(quantizer.step) * 2**bits
    np.testing.assert_allclose(found, expected_of(x, quantizer), rtol=0, atol=atol)


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 8), st.floats(-9, 0), st.floats(0.1, 9), st.sampled_from(["float", "bytes"]))
def test_every_form_in_an_ir_computes_what_the_reference_does(bits, lower, width, form):
    test_inputs_are_rounded_as_the_grid_says(form, bits, lower, lower + width)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_bytes_are_signed_where_zero_is_above_the_lowest_level(bits):
    for lower, is_signed in ((0.0, False), (-1.0, True)):
        quantizer = quantizer_of(bits, "activation", lower, 1.0)
        parameter = ops.parameter([-1], np.float32)
        byte = encode(parameter.output(0), quantizer).get_element_type()
        assert quantizer.is_signed == is_signed
        assert byte == (ov.Type.i8 if is_signed else ov.Type.u8)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("rows", ["tensor", "few positions of zero", "many positions of zero"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_stored_weights_are_the_values_of_the_grid(bits, rows, int8):
    values = np.random.default_rng(0).normal(size=(24, 6)).astype(np.float32)
    lower = {
        "tensor": torch.tensor(-1.1),
        "few positions of zero": torch.tensor([-1.5, -1.0, -0.7]).repeat(8).view(24, 1),
        "many positions of zero": torch.linspace(-1.9, -0.1, 24).view(24, 1),
    }[rows]
    quantizer = quantizer_of(bits, "weight", lower, lower + torch.tensor(2.0))
    for shape in (None, (4, 6, 6)):
        stored = weight(values, quantizer, shape, int8=int8)
        found = compile_ir(ov.Model([stored], []))([])[0]
        expected = expected_of(values, quantizer).reshape(found.shape)
        assert found.shape == (shape or values.shape)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("blocks", [1, 24])
@pytest.mark.parametrize("int8", [True, False], ids=["int8", "float"])
def test_stored_bytes_are_those_of_the_file(bits, blocks, int8, tmp_path):
    values = torch.randn(24, 40)
    lower = torch.linspace(-1.9, -0.1, blocks).view(-1, 1) if blocks > 1 else torch.tensor(-1.0)
    snapped = grid.snap(lower, lower + 2, bits, "weight")
    quantizer = quantizer_of(bits, "weight", lower, lower + 2)
    model = ov.Model([weight(values.numpy(), quantizer, int8=int8)], [])
    ov.save_model(model, tmp_path / "model.xml", compress_to_fp16=False)
    written = (tmp_path / "model.bin").stat().st_size
    expected = sum(stored_bytes(values, snapped))
    if bits == 8 and not int8:
        expected += 256  # its integers, shared by all
    assert written == pytest.approx(expected, abs=64)  # constants are aligned


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_weights_of_a_width_share_their_table(bits, tmp_path):
    weights, sizes = [], []
    for seed, highest in enumerate((-0.1, -0.4, -0.6)):
        values = torch.randn(24, 40, generator=torch.Generator().manual_seed(seed))
        lower = torch.linspace(-1.9, highest, 24).view(-1, 1)
        quantizer = quantizer_of(bits, "weight", lower, lower + 2)
        weights.append(weight(values.numpy(), quantizer, int8=True))
        sizes.append(stored_bytes(values, grid.snap(lower, lower + 2, bits, "weight")))
    model = ov.Model(weights, [])
    compact(model)
    ov.save_model(model, tmp_path / "model.xml", compress_to_fp16=False)
    written = (tmp_path / "model.bin").stat().st_size
    alone, shared = map(sum, zip(*sizes, strict=True))
    assert shared == 3 * {3: 64 * 8, 4: 61 * 16, 6: 127}[bits]
    assert written == pytest.approx(alone + shared / 3, abs=64 * len(model.get_ops()) / 4)


@pytest.mark.parametrize("transposed", [False, True])
def test_output_channels_of_a_product_are_where_its_weight_has_them(transposed):
    x = ops.parameter([1, 5, 3], np.float32)
    matrix = ops.constant(np.zeros((7, 3) if transposed else (3, 7), np.float32))
    product = ops.matmul(x, matrix, False, transposed)
    assert output_channel_axes(product) == {0 if transposed else 1}
    assert has_weight(product)
    assert not has_weight(ops.matmul(x, ops.parameter([1, 3, 5], np.float32), False, False))
    assert not has_weight(ops.add(x, x))


@pytest.mark.parametrize(
    ("order", "rest"),
    [((0, 2, 1), (0, 1, 2)), ((1, 2, 0), (1, 0, 2)), ((0, 1, 2), None), ((2, 1, 0), None)],
)
def test_a_transpose_but_for_its_last_swap(order, rest):
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    x = ops.parameter([2, 3, 4], np.float32)
    found = without_last_swap(ops.transpose(x, ops.constant(np.array(order))))
    if rest is None:
        assert found is None
        return
    result = compile_ir(ov.Model([found], [x]))([values])[0]
    np.testing.assert_array_equal(result, values.transpose(rest))
