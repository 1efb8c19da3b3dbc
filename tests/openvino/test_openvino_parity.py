import numpy as np
import openvino as ov
import openvino.opset13 as ops
import pytest
import torch
from torch import nn

from condiquant_openvino import LayerParity, Parity, check_parity, convert
from condiquant_openvino.sites import locate
from condiquant_plugin import FakeQuantizer


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
    with pytest.raises(RuntimeError, match="grouped"):
        parity.raise_if_broken()


def test_a_changed_bound_is_found(exported_convolutions):
    model, ir, x = exported_convolutions
    node = nodes(ir)["fake_quantize/plain.input"]
    for i in range(1, 3):
        port = node.input(i)
        replace(port, port.get_source_output().get_node().data + 0.02)
    with pytest.raises(RuntimeError, match=r"in plain\.input x plain"):
        check_parity(model, ir, [x]).raise_if_broken()


def test_a_change_outside_the_quantized_layers_is_found(exported_convolutions):
    model, ir, x = exported_convolutions
    with torch.no_grad():
        model.head.bias += 0.01
    parity = check_parity(model, ir, [x])
    assert all(layer.error <= 1e-5 for layer in parity.layers)
    assert parity.stretch_mean_abs > 1e-4 or parity.tie_rate > 1e-4
    with pytest.raises(RuntimeError, match=r"end to end|codes"):
        parity.raise_if_broken()


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
    (site,) = (s for s in locate(ir, x.numpy(), "CPU") if s.label == "plain.input")
    grid = site.grid
    codes = np.array([3.5, 3.4995, 3.49, 3.0, -2.0, 40.5], np.float32)
    raw = grid.lower + codes * grid.step
    quantized = grid.lower + np.array([4, 3, 3, 3, 0, 15], np.float32) * grid.step
    moved = site.away_from_ties(raw, quantized)
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
        ({"mean_abs": 0.01, "code_flip_rate": 0.2}, None),
        ({"mean_abs": 0.01, "stretch_mean_abs": 0.01}, "end to end"),
        ({"mean_abs": 0.01, "stretch_mean_abs": float("nan")}, "end to end"),
        ({"mean_abs": 0.01, "tie_rate": 0.01}, "codes"),
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
