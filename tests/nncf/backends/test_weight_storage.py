"""Weights that are no float32 parameters: buffers of torch models, half precision of IRs."""

import nncf
import numpy as np
import openvino as ov
import pytest
import torch
from torch import nn

import condiquant_nncf as host
from algorithm_networks import (
    Toy,
    advanced,
    converted,
    fake_quantizes,
    infer,
    items,
    network,
    quantize,
)
from condiquant_openvino import layer_executions, pack
from condiquant_plugin import fake_quantizers


class Fixed(Toy):
    """The layer's weight and bias are buffers, as filters that do not train; the weight is used twice."""

    def __init__(self, kind):
        super().__init__(kind)
        self.register_buffer("kernel", self.layer.weight.detach().clone())
        self.register_buffer("offset", 0.1 * torch.randn(len(self.kernel)))

    def forward(self, x):
        x = self.first(x).relu()
        if self.kind == "matmul":
            rows = (x.flatten(2).mT @ self.kernel).mT.unflatten(2, x.shape[2:])
            return self.last(rows + self.offset[0])
        if self.kind == "linear":
            tokens = nn.functional.linear(x.flatten(2).mT, self.kernel, self.offset)
            return self.last(tokens.mT.unflatten(2, x.shape[2:]))
        x = nn.functional.conv2d(x, self.kernel, self.offset, padding=1).tanh()
        return self.last(nn.functional.conv2d(x, self.kernel, padding=1))


@pytest.mark.parametrize("kind", ["conv_square", "linear", "matmul"])
def test_weights_in_buffers_are_quantized_too(kind):
    class Plain(Toy):
        forward = Fixed.forward

        def __init__(self, kind):
            super().__init__(kind)
            self.kernel = nn.Parameter(fixed.kernel.clone())
            self.offset = nn.Parameter(fixed.offset.clone())

    fixed = Fixed(kind)
    arguments = {"advanced_parameters": advanced("condition", scope="all")}
    _, quantized, reports = quantize("torch", "fixed", fixed, **arguments)
    _, expected, _ = quantize("torch", "fixed", Plain(kind), **arguments)
    assert [r.name for r in reports] == ["kernel"]
    assert not torch.equal(quantized.kernel, fixed.kernel)
    names = {q.name for q in fake_quantizers(quantized).values()}
    assert names == {q.name for q in fake_quantizers(expected).values()}
    assert {"kernel.weight", "kernel.input"} <= names
    x = items()[0]
    with torch.no_grad():
        assert torch.equal(quantized(x), expected(x))
    found = host.find_layers(host.wrap(fixed, x), "all")
    assert host.trainable_weights(fixed, found) == []
    config = host.QuantizationConfig(scope="all", recondition=None)
    kept_weights = host.quantize_network(fixed, torch.cat(items()), config)
    assert kept_weights.reports[0].condition_before == reports[0].condition_before


@pytest.mark.parametrize("name", ["swinir", "attention"])
def test_a_model_saved_in_half_precision_is_like_the_float_one(name, tmp_path):
    model = converted(network(name), name)
    ov.save_model(model, tmp_path / "half.xml")
    half = ov.Core().read_model(tmp_path / "half.xml")
    data, changes = nncf.Dataset([x.numpy() for x in items(name)]), advanced("condition")
    models, reports = [], ([], [])
    for subject, found in zip((model, half), reports, strict=True):
        quantized = host.quantize(
            subject,
            data,
            model_type=nncf.ModelType.TRANSFORMER,
            advanced_parameters=changes,
            subset_size=2,
            weight_bits=8,
            activation_bits=8,
            reports=found,
        )
        models.append(quantized)
    assert fake_quantizes(models[0]).keys() == fake_quantizes(models[1]).keys()
    for one, other in zip(*reports, strict=True):
        assert one.name == other.name
        assert other.condition_before == pytest.approx(one.condition_before, rel=0.01)
    types = {n.get_element_type() for n in models[1].get_ops() if n.get_type_name() == "Constant"}
    assert ov.Type.f16 not in types
    x = items(name)[0]
    one, other = (infer(m, x) for m in models)
    assert np.linalg.norm(other - one) < 0.02 * np.linalg.norm(one)
    unprepared = host.find_layers(half, "transformer")
    layers = [layer for layer in unprepared if layer.weight_name]
    assert [layer.name for layer in layers] == [r.name for r in reports[0]]
    assert {n.row_blocks for n in layers if n.name.endswith("qkv")} == {3}
    packed = pack(models[1])
    compiled = ov.compile_model(packed, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    int8 = [n for n in layer_executions(packed, compiled) if n.runs_as == "int8"]
    assert len(int8) >= len(layers)
