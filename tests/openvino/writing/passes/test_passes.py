"""The rewrites that make the IR fast and small keep its values, and do take place."""

from collections import Counter

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

import condiquant_nncf
from condiquant_openvino import check_parity, convert
from condiquant_openvino.markers import EXITS, is_encoder, role_of
from condiquant_openvino.writing.passes.compaction import compact
from condiquant_openvino.writing.passes.propagation import propagate
from condiquant_openvino.writing.passes.rearranging import collapse
from condiquant_openvino.writing.passes.simplification import simplify
from condiquant_openvino.writing.quantizer_graphs import to_bytes
from condiquant_plugin import FakeQuantizer
from condiquant_plugin.uniform.marking import Marker, Role
from networks import SECTIONS, build
from openvino_kernels import fuses_int8_attention


def count(model):
    return Counter(node.get_type_name() for node in model.get_ops())


def run(model, *inputs):
    return ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(inputs)[0]


@pytest.fixture(scope="module")
def window_attention():
    torch.manual_seed(3)
    images = torch.rand(2, 3, 24, 32)
    config = condiquant_nncf.QuantizationConfig(scope="transformer", recondition=None)
    model = condiquant_nncf.quantize_network(build("swinir"), images, config).model
    return model, convert(model, images), images[:1]


@st.composite
def chains(draw):
    """A shape, and Reshape or Transpose steps on it."""
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=2, max_size=4))
    steps, current = [], list(shape)
    for _ in range(draw(st.integers(1, 6))):
        if draw(st.booleans()):
            order = draw(st.permutations(range(len(current))))
            steps.append(("transpose", order))
            current = [current[i] for i in order]
        else:
            left, current = int(np.prod(current)), []
            for _ in range(draw(st.integers(0, 3))):
                current.append(
                    draw(st.sampled_from([d for d in range(1, left + 1) if left % d == 0]))
                )
                left //= current[-1]
            current.append(left)
            steps.append(("reshape", list(current)))
    return shape, steps


@settings(max_examples=60, deadline=None)
@given(chains())
def test_a_collapsed_chain_is_the_same_permutation(chain):
    shape, steps = chain
    parameter = ops.parameter(shape, np.int8)
    node = parameter
    for kind, argument in steps:
        constant = ops.constant(np.array(argument))
        if kind == "transpose":
            node = ops.transpose(node, constant)
        else:
            node = ops.reshape(node, constant, False)
    model = ov.Model([ops.convert(node, np.float32)], [parameter])
    collapsed = model.clone()
    collapse(collapsed)
    collapsed.validate_nodes_and_infer_types()
    assert (
        count(collapsed)["Transpose"] <= min(count(model)["Transpose"], 1)
        or len({kind for kind, _ in steps}) == 2
    )
    values = (np.arange(np.prod(shape)) % 251 - 125).astype(np.int8).reshape(shape)
    np.testing.assert_array_equal(run(model, values), run(collapsed, values))


class Windows(nn.Module):
    """Windows of four times four, in two heads, times themselves."""

    def __init__(self):
        super().__init__()
        self.quantizer = FakeQuantizer(4, "operand")
        self.quantizer.set_bounds(-1.0, 1.0)

    def forward(self, x):
        windows = (2 * x).view(1, 2, 4, 2, 4, 16).permute(0, 1, 3, 2, 4, 5).reshape(4, 16, 2, 8)
        heads = self.quantizer(windows.permute(0, 2, 1, 3))
        return heads @ heads.transpose(-2, -1)


def test_windows_and_heads_are_split_in_one_step_where_sizes_are_known():
    model, x = Windows().eval(), torch.rand(1, 8, 8, 16) - 0.5
    ir = convert(model, x, static=True)
    check_parity(model, ir, [x]).raise_if_broken()
    assert count(ir)["Transpose"] == 1


def rounded(x, top, levels=256):
    """``x`` on a grid from ``-top`` to ``top``, per channel if ``top`` has several."""
    top = np.array(top, np.float32)
    last = np.float32(levels // 2 - 1)
    bounds = [-top, top, np.full_like(top, -last), np.full_like(top, last)]
    marker = Marker(Role.MAIN, f"at {top}")
    return ops.convert(to_bytes(x.output(0), bounds, levels, ov.Type.i8, marker), np.float32)


def encoders_after_propagation(outputs, parameter, values):
    """How many there are, and the graph around them; the values must stay."""
    model = ov.Model(list(outputs), [parameter])
    moved = propagate(model)
    before, after = (ov.Core().compile_model(m, "CPU")([values]).to_tuple() for m in (model, moved))
    for expected, found in zip(before, after, strict=True):
        assert len(np.unique(expected)) > 2
        np.testing.assert_array_equal(found, expected)
    return sum(map(is_encoder, moved.get_ops())), count(moved)


@pytest.mark.parametrize(
    ("parts", "encoders"),
    [
        ([(0, 2, 1, 1), (2, 6, 1, 1)], 1),
        ([(0, 2, 1, 1), (2, 99, 1, 1)], 1),
        ([(0, 2, 1, -2), (2, 5, 1, 1)], 1),
        ([(0, 3, 1, 1), (-3, 6, 1, 1)], 2),
        ([(0, 3, 1, 1), (3, -1, 1, 1)], 2),
        ([(0, 6, 2, 1), (1, 6, 2, 1)], 2),
        ([(0, 2, 1, 0), (2, 6, 1, 1)], 2),
    ],
)
def test_slices_of_one_axis_are_rounded_as_one(parts, encoders):
    values = np.random.default_rng(0).uniform(-1, 1, (4, 6, 5)).astype(np.float32)
    x = ops.parameter(values.shape, np.float32)
    outputs = []
    for top, part in zip((0.5, 0.9), parts, strict=True):
        constants = [ops.constant(np.array([number])) for number in part]
        outputs.append(rounded(ops.slice(x, *constants), top))
    assert encoders_after_propagation(outputs, x, values)[0] == encoders


@pytest.mark.parametrize(
    ("shape", "levels", "encoders"),
    [([2, 3, 4], (256, 256), 1), ([2, -1, 4], (256, 256), 2), ([2, 3, 4], (256, 16), 2)],
)
def test_indices_of_one_axis_are_rounded_as_one_where_that_is_possible(shape, levels, encoders):
    values = np.random.default_rng(0).uniform(-1, 1, (2, 3, 4)).astype(np.float32)
    x, axis = ops.parameter(shape, np.float32), ops.constant(np.int64(1))
    outputs = [
        rounded(ops.gather(x, ops.constant(np.int64(index)), axis), top, of_grid)
        for index, top, of_grid in zip((0, 2), (0.5, 0.9), levels, strict=True)
    ]
    assert encoders_after_propagation(outputs, x, values)[0] == encoders


def test_a_fake_quantize_is_no_slice():
    """Though its bounds, read as one, would be: from 0 to 1 in steps of 1 along axis 1."""
    values = np.random.default_rng(0).uniform(0, 1, (2, 3, 4)).astype(np.float32)
    x = ops.parameter(values.shape, np.float32)
    bounds = [ops.constant(np.float32(bound)) for bound in (0, 1, 1, 1.9)]
    outputs = [rounded(ops.fake_quantize(x, *bounds, levels=10), 3)]
    assert encoders_after_propagation(outputs, x, values)[0] == 1


def test_no_second_transpose_is_made_for_a_tensor_that_is_used_in_float_too():
    values = np.random.default_rng(0).uniform(-1, 1, (2, 3, 4)).astype(np.float32)
    x = ops.parameter(values.shape, np.float32)
    transposed = ops.transpose(x, ops.constant(np.array([0, 2, 1])))
    outputs = [rounded(transposed, 0.8), ops.relu(transposed)]
    assert encoders_after_propagation(outputs, x, values)[1]["Transpose"] == 1


def test_queries_keys_and_values_are_rounded_once(window_attention):
    _, ir, _ = window_attention
    blocks = sum(SECTIONS["swinir"]["depths"])
    encoders = [node for node in ir.get_ops() if is_encoder(node)]
    widths = Counter(str(node.get_input_partial_shape(0)[-1]) for node in encoders)
    assert widths[str(3 * SECTIONS["swinir"]["embed_dim"])] == blocks
    # Inputs of qkv, proj, fc1 and fc2, the three of attention as one, and the softmax map.
    assert len(encoders) == 6 * blocks


def test_attention_runs_in_int8_as_one_kernel_and_is_right(window_attention):
    model, ir, image = window_attention
    compiled = ov.Core().compile_model(ir, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    fused = [
        node.get_rt_info()["originalLayersNames"].astype(str)
        for node in compiled.get_runtime_model().get_ops()
        if node.get_rt_info()["layerType"].astype(str) == "Subgraph"
    ]
    whole = [names for names in fused if "Softmax" in names and names.count("matmul") >= 2]
    if fuses_int8_attention():
        assert len(whole) == sum(SECTIONS["swinir"]["depths"])
    with torch.no_grad():
        expected = model(image).numpy()
    # A FakeQuantize lost in a fused kernel gives 1e-2; a tie of this image that flips, 1e-4.
    assert np.abs(compiled([image.numpy()])[0] - expected).mean() < 1e-3 * np.ptp(expected)


@pytest.mark.parametrize(
    ("kind", "form"), [("activation", "FakeQuantize"), ("operand", "Multiply")]
)
def test_signed_bytes_are_one_operator_in_front_of_a_layer(kind, form):
    """Operands of attention stay bytes."""
    model, x = Windows().eval(), torch.rand(1, 8, 8, 16) - 0.5
    if kind == "activation":
        model = nn.Conv2d(8, 8, 1)
        weight = FakeQuantizer(4, "weight")
        weight.set_bounds(-0.4, 0.4)
        parametrize.register_parametrization(model, "weight", weight)
        model = nn.Sequential(FakeQuantizer(4, kind), model).eval()
        model[0].set_bounds(-0.6, 0.5)
    ir = convert(model, x, static=True)
    exits = {node.get_type_name() for node in ir.get_ops() if role_of(node) in EXITS}
    assert exits == {form}


def test_masks_are_added_in_four_dimensions(window_attention):
    """Between scores and softmax: the sums with the bias and with the mask."""
    _, ir, _ = window_attention
    softmaxes = [node for node in ir.get_ops() if node.get_type_name() == "Softmax"]
    assert len(softmaxes) == sum(SECTIONS["swinir"]["depths"])
    for node in softmaxes:
        kinds = []
        while node.get_type_name() != "MatMul":
            node = node.input_value(0).get_node()
            kinds.append((node.get_type_name(), len(node.get_output_partial_shape(0))))
        assert kinds == [("Add", 4), ("Add", 4), ("MatMul", 4)]


@pytest.mark.parametrize(("windows", "reshapes"), [(-1, 0), (3, 0), (6, 2)])
def test_a_mask_of_three_windows_is_added_without_a_view_of_one_image(windows, reshapes):
    rng = np.random.default_rng(0)
    scores = ops.parameter([windows, 2, 4, 4], np.float32)
    mask = rng.random((1, 3, 1, 4, 4)).astype(np.float32)
    split = ops.reshape(scores, ops.constant(np.array([-1, 3, 2, 4, 4])), False)
    merged = ops.reshape(ops.add(split, ops.constant(mask)), np.array([-1, 2, 4, 4]), False)
    model = ov.Model([ops.relu(merged)], [scores])
    simplify(model)
    assert count(model)["Reshape"] == reshapes
    values = rng.random((max(windows, 3), 2, 4, 4)).astype(np.float32)
    expected = (values.reshape(-1, 3, 2, 4, 4) + mask).reshape(values.shape)
    np.testing.assert_array_equal(run(model, values), expected)


class Shuffle(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x * 2)


@pytest.mark.parametrize("static", [True, False])
def test_pixel_shuffle_is_one_operator(static):
    x = torch.rand(1, 12, 5, 7)
    ir = convert(Shuffle(nn.PixelShuffle(2)), x, static=static)
    assert count(ir)["DepthToSpace"] == 1
    assert not count(ir)["Transpose"]
    np.testing.assert_array_equal(run(ir, x.numpy()), nn.PixelShuffle(2)(x * 2).numpy())


def test_other_transposes_of_six_axes_stay():
    x = torch.rand(1, 12, 4, 6)
    unshuffle = Shuffle(nn.PixelUnshuffle(2))
    ir = convert(unshuffle, x)
    np.testing.assert_array_equal(run(ir, x.numpy()), unshuffle(x).numpy())


def test_empty_padding_is_removed_and_other_padding_is_not():
    parameter = ops.parameter([1, 3, 4], np.float32)
    zeros, ones = ops.constant(np.zeros(3, np.int64)), ops.constant(np.ones(3, np.int64))
    for begin, end, pads in ((zeros, zeros, 0), (ones, zeros, 1), (zeros, ones, 1)):
        padded = ops.pad(parameter, begin, end, "constant", ops.constant(np.float32(0)))
        model = ov.Model([ops.relu(padded)], [parameter])
        simplify(model)
        assert count(model)["Pad"] == pads


@pytest.mark.parametrize("pattern", ["rows and columns", "constant"])
def test_repetitive_constants_are_stored_small_and_fold_back(pattern):
    rng = np.random.default_rng(0)
    if pattern == "constant":
        values = np.broadcast_to(rng.random((1, 3, 1, 1)), (1, 3, 128, 128))
    else:
        values = rng.random((4, 8, 8))[:, rng.integers(0, 8, 96)][:, :, rng.integers(0, 8, 96)]
    values = np.ascontiguousarray(values, np.float32)
    parameter = ops.parameter(values.shape, np.float32)
    model = ov.Model([ops.add(parameter, ops.constant(values))], [parameter])
    compact(model)
    stored = [n.data.nbytes for n in model.get_ops() if n.get_type_name() == "Constant"]
    assert sum(stored) < values.nbytes / 50
    x = rng.random(values.shape).astype(np.float32)
    np.testing.assert_array_equal(run(model, x), x + values)


@pytest.mark.parametrize("exact", [True, False])
def test_small_integers_times_a_power_of_two_are_stored_as_bytes(exact):
    rng = np.random.default_rng(0)
    matrix = rng.integers(-127, 128, (64, 64)).astype(np.float32) / 128
    matrix[0, 0] = 127 / 128 if exact else np.nextafter(np.float32(0.5), np.float32(1))
    parameter = ops.parameter([1, 32, 64], np.float32)
    model = ov.Model([ops.matmul(parameter, ops.constant(matrix), False, False)], [parameter])
    # Of compressed weights CPUs with VNNI would round the inputs.
    x = rng.random((1, 32, 64)).astype(np.float32)
    before = run(model, x)
    compact(model)
    constants = [n.data for n in model.get_ops() if n.get_type_name() == "Constant"]
    stored = {values.dtype for values in constants if values.size > 1}
    assert stored == {np.dtype(np.int8 if exact else np.float32)}
    np.testing.assert_array_equal(run(model, x), before)


@pytest.mark.parametrize(
    "other", [(1, 3, 128, 128), (1, 3, 1, 128), (1, 3, 128, 1), (3, 1, 1), (128,)]
)
def test_a_constant_that_gives_the_result_its_shape_keeps_it(other):
    rng = np.random.default_rng(0)
    values = np.ascontiguousarray(np.broadcast_to(rng.random((3, 1, 1)), (1, 3, 128, 128)), "f4")
    parameter = ops.parameter(other, np.float32)
    model = ov.Model([ops.multiply(ops.constant(values), parameter)], [parameter])
    compact(model)
    x = rng.random(other).astype(np.float32)
    np.testing.assert_array_equal(run(model, x), values * x)
