import copy
from dataclasses import replace as with_fields
from itertools import count

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import condiquant_nncf
from condiquant_openvino import LayerParity, Parity, check_parity, convert
from condiquant_openvino.parity import check as parity_module
from condiquant_openvino.parity import example as comparison
from condiquant_openvino.parity.check import check_parities
from condiquant_openvino.parity.cutting import Runner, cut_sets
from condiquant_openvino.parity.example import Example
from condiquant_openvino.parity.layers import F32
from condiquant_openvino.parity.outcome import InputParity
from condiquant_openvino.parity.probe_points import ArrayGrid, ProbePoint, locate, value_range
from condiquant_plugin import FakeQuantizer
from networks import build


def nodes(ir):
    return {node.get_friendly_name(): node for node in ir.get_ordered_ops()}


def replace(port, value):
    port.replace_source_output(ops.constant(np.asarray(value, np.float32)).output(0))


def test_a_changed_weight_scale_is_found(exported_convolutions):
    model, ir, x = exported_convolutions
    (name,) = (n for n in nodes(ir) if "grouped" in n and "weight" in n)
    port = nodes(ir)[name].input(1)
    replace(port, port.get_source_output().get_node().data * 1.001)
    parity = check_parity(model, ir, [x])
    assert not parity.ok
    bad = [layer for layer in parity.layers if layer.error > 1e-5]
    assert len(bad) == 1
    assert parity.bisect().layers == ("grouped.input x grouped.layer.parametrizations.weight.0",)
    # By itself it is wrong for sure: no search, which might name another.
    wrong = with_fields(parity, bisect=lambda: pytest.fail("searched"))
    with pytest.raises(RuntimeError, match=r"in grouped\.input x grouped.*, given torch's tensors"):
        wrong.raise_if_broken()


def test_a_changed_bound_is_found(exported_convolutions):
    model, ir, x = exported_convolutions
    node = nodes(ir)["fake_quantize/plain.input"]
    for i in range(1, 3):
        port = node.input(i)
        replace(port, port.get_source_output().get_node().data + 0.02)
    with pytest.raises(RuntimeError, match=r"in plain\.input x plain.*, given torch's tensors"):
        check_parity(model, ir, [x]).raise_if_broken()


def test_a_change_outside_the_quantized_layers_is_found(exported_convolutions):
    model, ir, x = exported_convolutions
    with torch.no_grad():
        model.head.bias += 0.01
    parity = check_parity(model, ir, [x])
    assert all(layer.error <= 1e-5 for layer in parity.layers)
    first = parity.bisect()
    assert (len(first.layers), first.place) == (1, "plain.input")
    assert "head" in first.layers[0]
    with pytest.raises(
        RuntimeError, match=r"in front of plain\.input.*differs is .*head"
    ) as caught:
        parity.raise_if_broken()
    assert "\n" not in str(caught.value)


def test_a_network_that_changes_the_input_of_a_quantizer_in_place():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.input, self.weight = FakeQuantizer(4, "activation"), FakeQuantizer(4, "weight")

        def forward(self, x):
            x = self.head(x)
            x += nn.functional.conv2d(self.input(x), self.weight(self.body.weight), padding=1)
            return x.relu()

    model, image = InPlace().eval(), torch.rand(1, 3, 16, 16)
    model.input.set_bounds(-1.3, 2.1)
    model.weight.set_bounds(-0.1, 0.12)
    check_parity(model, convert(model, image), [image]).raise_if_broken()


@pytest.mark.parametrize("layer", ["linear", "back", "wide"])
def test_a_changed_bias_is_found_behind_its_layer(exported_convolutions, layer):
    model, ir, x = exported_convolutions
    with torch.no_grad():
        model.get_submodule(layer).layer.bias += 0.05
    parity = check_parity(model, ir, [x], max_layers=0)
    assert [name.split(".")[0] for name in parity.bisect().layers] == [layer]


@pytest.fixture(scope="module")
def window_attention():
    config = condiquant_nncf.QuantizationConfig(scope="transformer", recondition=None)
    images = torch.rand(2, 3, 16, 16)
    model = condiquant_nncf.quantize_network(build("swinir"), images, config).model
    return model, convert(model, images, static=True), images[:1]


def scale_weight(_model, ir, name):
    (node,) = (node for key, node in nodes(ir).items() if key == f"fake_quantize/{name}.weight")
    replace(node.input(1), node.input_value(1).get_node().data * 1.05)


def move_bounds_of_values(_model, ir, name):
    """Those of the values only, of a FakeQuantize that serves queries and keys as well."""
    probe_points = locate(ir, np.zeros((1, 3, 16, 16), np.float32), "CPU")
    (entry,) = (point.entry for point in probe_points if point.label.endswith(f"{name}.input1"))
    assert sum(point.entry == entry for point in probe_points) == 3
    node = nodes(ir)[entry]
    for index in (1, 2):
        bounds = node.input_value(index).get_node().data.copy()
        bounds[..., -bounds.shape[-1] // 3 :] += 0.1
        replace(node.input(index), bounds)


def shift_bias(model, _ir, name):
    with torch.no_grad():
        model.get_parameter(f"{name}.bias")[0] += 0.2  # norms remove what all channels share


@pytest.mark.parametrize(
    ("change", "name", "layer"),
    [
        (scale_weight, "layers.0.residual_group.blocks.1.mlp.fc1", "blocks.1.mlp.fc1"),
        (scale_weight, "layers.1.residual_group.blocks.0.attn.qkv", "blocks.0.attn.qkv"),
        (shift_bias, "layers.0.residual_group.blocks.1.attn.proj", "blocks.1.attn.proj"),
        (move_bounds_of_values, "layers.0.residual_group.blocks.1.attn/matmul/1", "attn/matmul/1"),
    ],
)
def test_the_first_layer_that_differs_is_found_in_attention(window_attention, change, name, layer):
    model, ir, x = window_attention
    model, ir = copy.deepcopy(model), ir.clone()
    change(model, ir, name)
    first = check_parity(model, ir, [x], max_layers=0).bisect()
    assert [layer in found for found in first.layers] == [True]


def test_nothing_is_found_where_nothing_differs(window_attention):
    model, ir, x = window_attention
    parity = check_parity(model, ir, [x], max_layers=0)
    parity.raise_if_broken()
    assert parity.bisect() is None


def test_cuts_leave_attention_whole(window_attention):
    _, ir, x = window_attention
    on_residual_paths, others = cut_sets(ir, locate(ir, x.numpy(), "CPU"))
    kinds = {name.split(".", 4)[-1] for name in on_residual_paths}
    assert kinds == {"1.attn.qkv.input", "0.attn.qkv.input", "0.mlp.fc1.input", "1.mlp.fc1.input"}
    assert len(on_residual_paths) == 7  # the first is on no residual path yet
    assert sum("matmul" in name for name in others) == 8


def test_flipped_codes_are_counted():
    """An input moved by 1e-5 carries one of four values over a tie."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.input = FakeQuantizer(2, "activation")
            self.input.set_bounds(0.0, 3.0)

        def forward(self, x):
            return self.input(x * 1.0)

    model, x = Net().eval(), torch.tensor([[[[0.5, 0.51, 1.5, 2.0]]]])
    ir = convert(model, x)
    assert check_parity(model, ir, [x]).code_flip_rate == 0
    shifted = ops.parameter([1, 1, 1, 4], np.float32)
    moved = ops.add(shifted, ops.constant(np.float32(1e-5)))
    (parameter,) = ir.get_parameters()
    for port in parameter.output(0).get_target_inputs():
        port.replace_source_output(moved.output(0))
    ir = ov.Model([result.input_value(0) for result in ir.get_results()], [shifted])
    assert check_parity(model, ir, [x]).code_flip_rate == 0.25


def test_ties_are_moved_where_torch_rounded_them(exported_convolutions):
    _, ir, x = exported_convolutions
    (point,) = (s for s in locate(ir, x.numpy(), "CPU") if s.label == "plain.input")
    grid = point.grid
    codes = np.array([3.5, 3.4995, 3.49, 3.0, -2.0, 40.5], np.float32)
    raw = grid.lower + codes * grid.step
    quantized = grid.lower + np.array([4, 3, 3, 3, 0, 15], np.float32) * grid.step
    moved = point.away_from_ties(raw, quantized)
    np.testing.assert_array_equal(moved[:2], quantized[:2])
    np.testing.assert_array_equal(moved[2:], raw[2:])
    np.testing.assert_array_equal(grid.codes(moved), [4, 3, 3, 3, 0, 15])


def test_layers_can_be_sampled(exported_convolutions):
    model, ir, x = exported_convolutions
    every = [layer.name for layer in check_parity(model, ir, [x]).layers]
    sampled = [layer.name for layer in check_parity(model, ir, [x], max_layers=3).layers]
    assert sampled == [every[0], every[3], every[6]]
    assert check_parity(model, ir, [x], max_layers=0).layers == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"mean_abs": 0.01, "end_to_end_tolerance": 0.02, "code_flip_rate": 0.2}, None),
        ({"mean_abs": 0.01, "code_flip_rate": None}, "end to end"),
        ({"inputs": [InputParity("the output", float("nan"), 1e-4)]}, "front of the output"),
        ({"tie_rate": 0.01}, "codes"),
        ({"inputs": [InputParity("a", 1e-6, 1e-5), InputParity("b", 1e-4, 1e-5)]}, "front of b"),
        ({"layers": [LayerParity("a", "MatMul", 1e-6), LayerParity("b", "MatMul", 1e-4)]}, "in b"),
        ({"layers": [LayerParity("a", "MatMul", float("nan"))]}, "in a"),
    ],
)
def test_verdict(changes, words):
    values = dict.fromkeys(
        (
            "mean_abs",
            "max_abs",
            "code_flip_rate",
            "stretch_mean_abs",
            "stretch_max_abs",
            "tie_rate",
        ),
        1e-6,
    )
    parity = Parity(**(values | changes))
    assert parity.ok == (words is None)
    if words:
        with pytest.raises(RuntimeError, match=words):
            parity.raise_if_broken()


def test_a_thousandth_of_the_range_is_too_much_in_a_short_stretch(window_attention):
    model, ir, x = window_attention
    ir = ir.clone()
    port = ir.get_results()[0].input(0)
    with torch.no_grad():
        extent = value_range(model(x).numpy())
    shifted = ops.add(port.get_source_output(), ops.constant(np.float32(1e-3 * extent)))
    port.replace_source_output(shifted.output(0))
    parity = check_parity(model, ir, [x], max_layers=0)
    assert "in front of the output" in parity.complaint()
    assert parity.inputs[-1].tolerance == pytest.approx(1e-4)


def test_ties_are_allowed_to_go_the_other_way_and_nothing_else_is():
    grid = ArrayGrid(np.float32(-1), np.float32(0.5), 2)
    point = ProbePoint("x", "x", "x/exit", False, grid, grid, (5,), None)
    raw = np.array([-0.75, -0.25, -0.2, 0.9, -1.25], np.float32)
    quantized = grid.lower + grid.step * grid.codes(raw)
    other = point.with_other_ties(raw, quantized)
    np.testing.assert_array_equal(quantized, np.array([-1, 0, 0, 0.5, -1], np.float32))
    np.testing.assert_array_equal(other, np.array([-0.5, -0.5, 0, 0.5, -1], np.float32))


def test_what_memory_takes_at_once_changes_no_figure(exported_convolutions, monkeypatch):
    model, ir, x = exported_convolutions
    whole = check_parity(model, ir, [x])
    monkeypatch.setattr(comparison, "_PORTION", 1)
    in_portions = check_parity(model, ir, [x])
    assert in_portions.code_flip_rate == whole.code_flip_rate
    assert [i.name for i in in_portions.inputs] == [i.name for i in whole.inputs]
    assert in_portions.ok


@given(st.lists(st.integers(0, 9)), st.integers(1, 12))
def test_portions_keep_order_and_size(sizes, most):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "_PORTION", most)
        portions = list(comparison._in_portions(sizes, int))
    assert [size for portion in portions for size in portion] == sizes
    assert all(sum(portion) <= most or len(portion) == 1 for portion in portions)


def test_properties_that_change_nothing_are_checked_once(exported_convolutions, monkeypatch):
    model, ir, x = exported_convolutions
    example, calls = Example(model, ir, x, "CPU"), []
    programs = {
        parity_module._Program.of(Runner("CPU", given).compile(ir), [example])
        for given in parity_module.PROPERTIES.values()
    }
    once = parity_module._parity
    monkeypatch.setattr(parity_module, "_parity", lambda *a: calls.append(a) or once(*a))
    found = check_parities(model, ir, [x])
    assert list(parity_module.PROPERTIES) == [
        name for name in found if name in parity_module.PROPERTIES
    ]
    assert all(found[name].properties == given for name, given in parity_module.PROPERTIES.items())
    assert len(calls) == len(programs)


def test_other_programs_and_lower_instruction_sets_are_all_checked(
    exported_convolutions, monkeypatch
):
    """As on a CPU with AVX-512 and bfloat16."""
    model, ir, x = exported_convolutions
    numbers = count()
    own = staticmethod(lambda *_: parity_module._Program((), (str(next(numbers)).encode(),)))
    monkeypatch.setattr(parity_module._Program, "of", own)
    monkeypatch.setattr(parity_module, "lower_instruction_sets", lambda: ["AVX2"])
    found = check_parities(model, ir, [x])
    assert list(found) == ["f32", "AVX2", "accuracy", "default"]
    assert found["AVX2"].instruction_set == "AVX2"
    assert all(parity.ok for parity in found.values())


def test_programs_of_the_same_kernels_with_other_weights_differ(exported_convolutions):
    model, ir, x = exported_convolutions
    example, runner = Example(model, ir, x, "CPU"), Runner("CPU", F32)
    program = parity_module._Program.of(runner.compile(ir), [example])
    assert parity_module._Program.of(runner.compile(ir), [example]) == program
    (name,) = (n for n in nodes(ir) if "grouped" in n and "weight" in n)
    port = nodes(ir)[name].input(1)
    replace(port, port.get_source_output().get_node().data * 1.001)
    changed = parity_module._Program.of(runner.compile(ir), [example])
    assert (changed.kernels, changed == program) == (program.kernels, False)


def test_an_ir_cut_at_the_same_places_is_compiled_once_for_all_images(
    exported_convolutions, monkeypatch
):
    model, ir, x = exported_convolutions
    images = [x, torch.rand(1, 3, 24, 20), torch.rand(1, 3, 12, 28)]
    alone = [check_parity(model, ir, [image], max_layers=0) for image in images]
    compile_model, compiled = ov.Core.compile_model, []
    monkeypatch.setattr(
        ov.Core, "compile_model", lambda *a: compiled.append(a) or compile_model(*a)
    )
    check_parity(model, ir, [x], max_layers=0)
    for_one = len(compiled)
    together = check_parity(model, ir, images, max_layers=0)
    # The places of quantizers take an IR of their own for each image.
    assert len(compiled) - for_one <= for_one + len(images) - 1
    assert together.mean_abs == pytest.approx(np.mean([each.mean_abs for each in alone]))
    assert together.max_abs == max(each.max_abs for each in alone)
    for place, *errors in zip(together.inputs, *(each.inputs for each in alone), strict=True):
        assert place.error in {each.error for each in errors}


def test_torch_leaves_a_core_to_lower_instruction_sets(exported_convolutions, monkeypatch):
    model, ir, x = exported_convolutions
    threads, seen = torch.get_num_threads(), []
    measured = parity_module._measured
    monkeypatch.setattr(
        parity_module, "_measured", lambda *a: seen.append(torch.get_num_threads()) or measured(*a)
    )
    monkeypatch.setattr(parity_module, "lower_instruction_sets", lambda: ["AVX2"])
    check_parities(model, ir, [x])
    assert set(seen) == {max(threads - 1, 1)}
    assert torch.get_num_threads() == threads
