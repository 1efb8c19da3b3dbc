"""One line for what quantize() cannot use; NNCF's own error where it has one."""

import sys
import types

import nncf
import openvino as ov
import pytest
import torch
from nncf.common.logging import nncf_logger
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters
from torch import nn

import condiquant_nncf as host
import condiquant_openvino
from algorithm_networks import advanced, converted, items, network, quantize
from condiquant_plugin import InputError

FAST = AdvancedQuantizationParameters(disable_bias_correction=True)
BACKENDS = ["torch", "openvino"]


def subject(backend, name="conv"):
    return converted(network(name)) if backend == "openvino" else network(name)


def dataset(backend, *data):
    return nncf.Dataset([x.numpy() if backend == "openvino" else x for x in data])


def refused(*arguments, **keywords):
    with pytest.raises(InputError) as caught:
        host.quantize(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_datasets(backend):
    model = subject(backend)
    assert "yields nothing" in refused(model, nncf.Dataset([]))
    assert "does not take an item" in refused(model, dataset(backend, torch.rand(1, 5, 8, 8)))
    later = dataset(backend, torch.rand(1, 3, 8, 8), torch.rand(1, 5, 8, 8))
    assert "does not take an item" in refused(model, later)
    assert "nncf.Dataset(items)" in refused(model, items())
    assert "can be read once" in refused(model, nncf.Dataset(iter(items())))


@pytest.mark.parametrize("backend", BACKENDS)
def test_arguments(backend):
    model, data = subject(backend), dataset(backend, *items())
    assert "subset_size=0" in refused(model, data, subset_size=0)
    assert "then='int8'" in refused(model, data, then="int8")
    transformer = nncf.ModelType.TRANSFORMER
    assert "matches no layer" in refused(model, data, model_type=transformer)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("scope", "transfomer", "'transformer' or 'all'"),
        ("weight_granularity", "chanel", "'tensor' or 'channel'"),
        ("activation_side", "symetric", "'symmetric' or 'one_sided' or 'auto'"),
        ("recondition", "atuo", "'auto' or None"),
    ],
)
def test_typos_in_advanced_parameters(name, value, allowed):
    changes = host.AdvancedCondiQuantParameters(**{name: value})
    data = dataset("torch", *items())
    message = refused(network("conv"), data, advanced_parameters=changes)
    assert message.startswith(f"{name}={value!r} is not known: use {allowed}")
    with pytest.raises(InputError, match=value):
        host.QuantizationConfig(**{name: value})


def test_bounds_inputs_are_checked():
    with pytest.raises(InputError, match="bounds_inputs='flaot' is not known: use 'quantized' or"):
        host.QuantizationConfig(bounds_inputs="flaot")


@pytest.mark.parametrize(("backend", "then"), [("openvino", "bounds"), ("torch", "minmax")])
def test_transforms_need_a_torch_network_with_learned_bounds(backend, then):
    changes, data = (
        host.AdvancedCondiQuantParameters(transform="alignment"),
        dataset(backend, *items()),
    )
    message = refused(subject(backend), data, then=then, advanced_parameters=changes)
    assert message.startswith("transform='alignment' is for torch networks with learned bounds")


@pytest.mark.parametrize(
    ("arguments", "unused"),
    [
        ({"then": "minmax", "weight_bits": 2}, "weight_bits=2"),
        ({"then": "minmax", "activation_bits": 6}, "activation_bits=6"),
        ({"then": "minmax", "weight_bits": 8, "activation_bits": 8}, None),
        ({"then": "minmax"}, None),
        (
            {
                "then": "minmax",
                "advanced_parameters": advanced(other_bits=8, weight_granularity="channel"),
            },
            "other_bits, weight_granularity",
        ),
        ({"preset": nncf.QuantizationPreset.MIXED}, "preset"),
        ({"weight_bits": 2}, None),
    ],
)
def test_arguments_that_are_not_used_are_named(arguments, unused, caplog):
    nncf_logger.addHandler(caplog.handler)
    try:
        quantize("openvino", "conv", **{"advanced_parameters": advanced(), **arguments})
    finally:
        nncf_logger.removeHandler(caplog.handler)
    found = [r.getMessage() for r in caplog.records if "not used by then=" in r.getMessage()]
    assert [message.rpartition(": ")[2] for message in found] == ([unused] if unused else [])


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_scope_keeps_nncfs_error(backend):
    nothing = nncf.IgnoredScope(names=["no_such_layer"])
    data = dataset(backend, *items())
    with pytest.raises(nncf.ValidationError) as ours:
        host.quantize(subject(backend), data, ignored_scope=nothing)
    assert "no_such_layer" in str(ours.value)
    assert "were not found in the NNCFGraph" in str(ours.value)
    pattern = nncf.IgnoredScope(patterns=["("])
    assert "ignored_scope" in refused(subject(backend), data, ignored_scope=pattern)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("then", ["bounds", "minmax"])
def test_quantized_models(backend, then):
    _, quantized, _ = quantize(
        backend,
        "conv",
        then=then,
        advanced_parameters=advanced(nncf=FAST if then == "minmax" else None),
    )
    assert "quantized already" in refused(quantized, dataset(backend, *items()))


@pytest.mark.parametrize("then", ["bounds", "minmax"])
def test_packed_models(then, tmp_path):
    _, simulated, _ = quantize("openvino", "conv", advanced_parameters=advanced())
    data = dataset("openvino", *items())
    packed = condiquant_openvino.pack(simulated)
    assert "quantized already" in refused(packed, data, then=then)
    condiquant_openvino.save(packed, tmp_path / "packed.xml")
    read = condiquant_openvino.read_ir(tmp_path / "packed.xml")
    assert "quantized already" in refused(read, data, then=then)


def test_compressed_weights():
    compressed = nncf.compress_weights(converted(network("linear")))
    assert "quantized already" in refused(compressed, dataset("openvino", *items()))


def test_computed_weights_are_named():
    x = torch.rand(1, 3, 8, 8)

    class Computed(nn.Module):
        def forward(self, x):
            kernel = x.mean() * torch.ones(3, 3, 1, 1)
            x = nn.functional.conv2d(x, torch.ones(3, 3, 1, 1))
            x = nn.functional.conv2d(x, kernel)
            return nn.functional.conv2d(x, torch.ones(3, 3, 1, 1))

    model = ov.convert_model(Computed(), example_input=x)
    assert "is computed: put it in ignored_scope" in refused(model, dataset("openvino", x))


@pytest.mark.parametrize(
    ("role", "constant"), [("weight", "computed"), ("weight", "plain"), ("bias", "computed")]
)
def test_computed_constants_of_torch_are_named(role, constant):
    class Computed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
            self.weight, self.bias = (
                nn.Parameter(torch.rand(3, 3, 1, 1)),
                nn.Parameter(torch.rand(3)),
            )
            self.plain = [torch.rand(3, 3, 1, 1)]  # no buffer

        def forward(self, x):
            given = {"weight": self.weight, "bias": self.bias}
            given[role] = given[role].exp() if constant == "computed" else self.plain[0]
            return self.last(nn.functional.conv2d(self.first(x), **given))

    data = dataset("torch", torch.rand(1, 3, 8, 8))
    message = refused(Computed(), data)
    assert f"the {role} of /conv2d/0 is computed: put it in ignored_scope" in message
    ignored = nncf.IgnoredScope(names=["/conv2d/0"])
    assert "scope='all' matches no layer" in refused(Computed(), data, ignored_scope=ignored)


def test_other_frameworks(monkeypatch):
    exported = torch.export.export(network("conv"), (items()[0],)).module()
    assert "torch.nn.Module itself" in refused(exported, dataset("torch", *items()))
    onnx = types.ModuleType("onnx")  # all that NNCF looks at
    onnx.ModelProto = type("ModelProto", (), {})
    monkeypatch.setitem(sys.modules, "onnx", onnx)
    message = refused(onnx.ModelProto(), dataset("openvino", *items()))
    assert "no ONNX backend: convert the model with openvino.convert_model" in message
