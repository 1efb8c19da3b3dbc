"""One line for what quantize() cannot use; NNCF's own error where it has one."""

import nncf
import openvino as ov
import pytest
import torch
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters
from torch import nn

import condiquant_nncf as host
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
    assert "weight_bits=1" in refused(model, data, weight_bits=1)
    assert "then='int8'" in refused(model, data, then="int8")
    assert "has no linear layer" in refused(subject(backend, "none"), data)
    transformer = nncf.ModelType.TRANSFORMER
    assert "matches no layer" in refused(model, data, model_type=transformer)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_scope_keeps_nncfs_error(backend):
    nothing = nncf.IgnoredScope(names=["no_such_layer"])
    data = dataset(backend, *items())
    with pytest.raises(nncf.ValidationError) as ours:
        host.quantize(subject(backend), data, ignored_scope=nothing)
    assert "no_such_layer" in str(ours.value)
    assert "were not found in the NNCFGraph" in str(ours.value)


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


def test_other_frameworks():
    exported = torch.export.export(network("conv"), (items()[0],)).module()
    assert "torch.nn.Module itself" in refused(exported, dataset("torch", *items()))


def test_values_that_are_not_finite_name_the_layer():
    images = [torch.full((1, 3, 12, 12), float("inf"))]
    for backend in BACKENDS:
        assert "NaN or Inf" in refused(subject(backend, "edsr"), dataset(backend, *images))
