"""Exported ONNX files compute what the model computes, or are refused."""

import sys

import numpy as np
import onnx
import openvino as ov
import pytest
import torch
from brevitas import nn as qnn
from brevitas.graph.calibrate import calibration_mode
from brevitas.graph.gptq import gptq_mode
from brevitas.graph.quantize import layerwise_quantize
from brevitas.quant import Int8WeightPerTensorFloat, ShiftedUint8ActPerTensorFloat
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import nn

import algorithm_networks
import networks
from brevitas_models import FusedAttention
from condiquant_brevitas import (
    LearnedBoundsActPerTensor,
    LearnedBoundsActPerTensorOneSided,
    LearnedBoundsWeightPerChannel,
    LearnedBoundsWeightPerTensor,
    export_qcdq,
    export_qonnx,
    quantize_sr,
)
from condiquant_plugin import InputError

ON_GRID = {"weight_zero_on_grid": True, "input_zero_on_grid": True}
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "LP_TRANSFORMS_MODE": "NO"}


class Quant(OpRun):
    """The operator as QONNX specifies it."""

    op_domain = "qonnx.custom_op.general"

    def _run(self, x, scale, zero_point, bits, narrow=0, rounding_mode="ROUND", signed=1):
        assert (narrow, rounding_mode, signed) == (0, "ROUND", 0)
        codes = np.round(np.clip(x / scale + zero_point, 0, 2**bits - 1))
        return ((codes - zero_point) * scale,)


def infer(path, x):
    graph = onnx.load(path)
    constants = {initializer.name for initializer in graph.graph.initializer}
    (name,) = [i.name for i in graph.graph.input if i.name not in constants]
    evaluator = ReferenceEvaluator(graph, new_ops=[Quant])
    return torch.from_numpy(evaluator.run(None, {name: x.numpy()})[0])


def quantize(model, x, **settings):
    settings = {
        "weight_quant": LearnedBoundsWeightPerTensor,
        "input_quant": LearnedBoundsActPerTensor,
        "weight_bit_width": 4,
        "input_bit_width": 4,
        "return_quant_tensor": False,
    } | settings
    layers = {nn.Linear: (qnn.QuantLinear, settings), nn.Conv2d: (qnn.QuantConv2d, settings)}
    model = layerwise_quantize(model, layers)
    with torch.no_grad():
        with calibration_mode(model):
            model(x)
        model(x)
    return model.eval().requires_grad_(False)


def toy(positive=False, **settings):
    """A few values, so that none is rounded another way by another order of summation."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 6))
    x = torch.randn(20, 12)
    x = x.abs() if positive else x
    return quantize(model, x, **settings), x


def edsr(**settings):
    x = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    return quantize(networks.build("edsr"), x, **settings), x


def operators(path):
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("per", [LearnedBoundsWeightPerTensor, LearnedBoundsWeightPerChannel])
def test_qonnx_holds_every_grid(tmp_path, per, bits):
    model, x = toy(weight_quant=per, weight_bit_width=bits, input_bit_width=bits)
    if bits < 8:
        assert float(model[0].input_quant.zero_point()) % 1 != 0
    export_qonnx(model, x, tmp_path / "model.onnx")
    torch.testing.assert_close(infer(tmp_path / "model.onnx", x), model(x), rtol=0, atol=1e-5)
    assert operators(tmp_path / "model.onnx").count("Quant") == 4


def test_qonnx_of_a_network_after_gptq(tmp_path):
    model, x = edsr()
    with gptq_mode(model) as gptq:
        for _ in range(gptq.num_layers):
            gptq.model(x)
            gptq.update()
    expected = model(x)
    export_qonnx(model, x, tmp_path / "model.onnx")
    torch.testing.assert_close(infer(tmp_path / "model.onnx", x), expected, rtol=0, atol=1e-5)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("function", [export_qonnx, export_qcdq])
@pytest.mark.parametrize("fused", [False, True])
def test_attention_operands_of_quantize_sr(tmp_path, function, fused):
    x = algorithm_networks.items()[0]
    network = FusedAttention({}) if fused else algorithm_networks.network("attention")
    model = quantize_sr(network.eval(), x, zero_on_grid=True)
    function(model, x, tmp_path / "model.onnx", opset_version=19)
    torch.testing.assert_close(infer(tmp_path / "model.onnx", x), model(x), rtol=0, atol=1e-5)
    found = operators(tmp_path / "model.onnx")
    if function is export_qonnx:
        assert found.count("Quant") == 2 * 2 + 2 * 2  # two layers, two products
    else:
        assert (found.count("QuantizeLinear"), found.count("DequantizeLinear")) == (6, 8)


def test_qonnx_of_another_size_than_the_traced_one(tmp_path):
    model, x = edsr()
    names = {"input_names": ["x"], "dynamic_axes": {"x": {2: "height", 3: "width"}}}
    export_qonnx(model, torch.rand(1, 3, 20, 16), tmp_path / "model.onnx", **names)
    torch.testing.assert_close(infer(tmp_path / "model.onnx", x), model(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        ON_GRID,
        ON_GRID | {"weight_bit_width": 2, "input_bit_width": 3},
        ON_GRID | {"weight_quant": LearnedBoundsWeightPerChannel},
        {"weight_bit_width": 8, "input_bit_width": 8},
        {
            "positive": True,
            "weight_zero_on_grid": True,
            "input_quant": LearnedBoundsActPerTensorOneSided,
        },
        {"weight_zero_on_grid": True, "input_quant": ShiftedUint8ActPerTensorFloat},
    ],
    ids=["on grid", "2 and 3 bits", "per channel", "8 bits", "one-sided", "upstream's"],
)
def test_qcdq_of_integer_zero_points(tmp_path, settings):
    model, x = toy(**settings)
    export_qcdq(model, x, tmp_path / "model.onnx", opset_version=19)  # the evaluator's first
    torch.testing.assert_close(infer(tmp_path / "model.onnx", x), model(x), rtol=0, atol=1e-5)
    weights = [
        onnx.numpy_helper.to_array(i)
        for i in onnx.load(tmp_path / "model.onnx").graph.initializer
        if i.dims in ([8, 12], [6, 8])
    ]
    assert [w.dtype for w in weights] == [np.uint8, np.uint8]


def test_qcdq_is_read_by_openvino(tmp_path):
    model, x = edsr(**ON_GRID)
    export_qcdq(model, x, tmp_path / "model.onnx")
    compiled = ov.compile_model(tmp_path / "model.onnx", "CPU", EXACT)
    torch.testing.assert_close(
        torch.from_numpy(compiled(x.numpy())[0]), model(x), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"QCDQ holds integer zero points, 0\.input_quant has \d+\.\d+: use export_qonnx or"),
        ({"input_zero_on_grid": True}, r"0\.weight_quant has \d+\.\d+: .*zero_on_grid=True"),
        (
            {"weight_quant": Int8WeightPerTensorFloat, "weight_bit_width": 16} | ON_GRID,
            r"at most 8 bits, 0\.weight_quant has 16: use export_qonnx",
        ),
    ],
)
def test_qcdq_refuses_what_upstream_would_round(tmp_path, settings, message):
    model, x = toy(**settings)
    expected = model(x)
    with pytest.raises(InputError, match=message) as error:
        export_qcdq(model, x, tmp_path / "model.onnx")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(model(x), expected)
    export_qonnx(model, x, tmp_path / "model.onnx")


@pytest.mark.parametrize("function", [export_qonnx, export_qcdq])
def test_bounds_are_not_searched_on_the_example(tmp_path, function):
    model = nn.Sequential(
        qnn.QuantLinear(
            4,
            3,
            True,
            weight_quant=LearnedBoundsWeightPerTensor,
            input_quant=LearnedBoundsActPerTensor,
        )
    )
    with pytest.raises(InputError, match=r"0\.input_quant has no bounds yet: .*calibration_mode"):
        function(model, torch.rand(2, 4), tmp_path / "model.onnx")


@pytest.mark.parametrize("missing", ["onnx", "onnxoptimizer"])
def test_missing_packages_name_the_extra(tmp_path, monkeypatch, missing):
    model, x = toy()
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf'{missing}: .*"condiquant-plugin\[brevitas-export\]"'):
        export_qonnx(model, x, tmp_path / "model.onnx")


def test_a_failed_export_leaves_the_file_and_the_model(tmp_path):
    model, x = toy()
    (tmp_path / "model.onnx").write_text("before")
    expected = model(x)
    with pytest.raises(RuntimeError, match="opset"):
        export_qonnx(model, x, tmp_path / "model.onnx", opset_version=1000)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["before"]
    assert torch.equal(model(x), expected)
    export_qonnx(model, x, tmp_path / "model.onnx")
    with pytest.raises(InputError, match="cannot write"):
        export_qonnx(model, x, tmp_path / "model.onnx" / "model.onnx")
