"""``condiquant_mode`` with Brevitas' own modes, in the documented order, on small real networks."""

from copy import deepcopy

import pytest
import torch
from brevitas import nn as qnn
from brevitas.graph.calibrate import (
    bias_correction_mode,
    calibration_mode,
    quantization_status_manager,
)
from brevitas.graph.equalize import activation_equalization_mode
from brevitas.graph.gpfq import gpfq_mode
from brevitas.graph.gptq import gptq_mode
from brevitas.graph.quantize import layerwise_quantize
from brevitas.quant_tensor import QuantTensor
from torch import nn

import networks
from brevitas_models import assert_hooks_gone, recondition
from condiquant_brevitas import LearnedBoundsActPerTensor, LearnedBoundsWeightPerTensor
from condiquant_nncf import QuantizationConfig, find_layers, quantize_network, wrap
from condiquant_plugin.methods.condiquant.reconditioning import ReconditioningConfig

QUANTIZERS = {
    "weight_quant": LearnedBoundsWeightPerTensor,
    "input_quant": LearnedBoundsActPerTensor,
    "input_bit_width": 4,
    "return_quant_tensor": False,
}
# First and last layers.
FLOAT_LAYERS = {
    "swinir": ["conv_first", "conv_after_body", "upsample"],
    "edsr": ["conv_first", "conv_last"],
}


@pytest.fixture(scope="module")
def case(request):
    """Name, float network, calibration crops, float output."""
    network = networks.build(request.param).eval().requires_grad_(False)
    crops = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return request.param, network, crops, network(crops)


def on(*names):
    return pytest.mark.parametrize("case", names, indirect=True)


def quantize(network, name, crops, weight_bits=4):
    """Layers replaced, bounds of activations and weights searched."""
    settings = QUANTIZERS | {"weight_bit_width": weight_bits}
    layers = {nn.Linear: (qnn.QuantLinear, settings), nn.Conv2d: (qnn.QuantConv2d, settings)}
    model = layerwise_quantize(network, layers, name_blacklist=FLOAT_LAYERS[name])
    with calibration_mode(model):
        model(crops)
    model(crops)
    return model


def run_gpxq(mode_class, model, crops):
    with mode_class(model) as mode:
        for _ in range(mode.num_layers):
            mode.model(crops)
            mode.update()


def fidelity(output, reference):
    """Signal to quantization noise in dB."""
    return float(10 * torch.log10(reference.var() / (output - reference).square().mean()))


@on("swinir", "edsr")
def test_before_quantization_then_every_mode_in_order(case):
    name, network, crops, expected = case
    model = deepcopy(network)
    mode = recondition(model, crops, output_tolerance=0.02, name_blacklist=FLOAT_LAYERS[name])
    for report in mode.report.values():
        assert report.condition_after <= report.condition_before
    assert fidelity(model(crops), expected) > 20
    model = quantize(model, name, crops)
    calibrated = fidelity(model(crops), expected)
    run_gpxq(gptq_mode, model, crops)
    after_gptq = fidelity(model(crops), expected)
    with bias_correction_mode(model):
        model(crops)
    corrected = fidelity(model(crops), expected)
    assert calibrated > 5
    assert after_gptq > calibrated
    assert corrected > calibrated
    assert_hooks_gone(model)
    copied = deepcopy(model)
    assert torch.equal(copied(crops), model(crops))
    off = quantization_status_manager(model, disable_act_quant=True, disable_weight_quant=True)
    biases = {n: network.get_parameter(n) for n, _ in model.named_parameters() if "bias" in n}
    model.load_state_dict(model.state_dict() | biases)  # those before bias_correction_mode
    with off:  # weight_orig is the first weight of all
        torch.testing.assert_close(model(crops), expected)


@on("edsr")
def test_gpfq_after_it_follows_the_float_network(case):
    """GPFQ fits the outputs of ``weight_orig``, which is the weight from before reconditioning."""
    name, network, crops, expected = case
    model = deepcopy(network)
    recondition(model, crops, output_tolerance=0.02, name_blacklist=FLOAT_LAYERS[name])
    model = quantize(model, name, crops)
    calibrated = fidelity(model(crops), expected)
    run_gpxq(gpfq_mode, model, crops)
    assert fidelity(model(crops), expected) > calibrated
    assert_hooks_gone(model)


@on("edsr")
def test_on_a_quantized_network_before_and_after_gptq(case):
    name, network, crops, _ = case
    model = quantize(deepcopy(network), name, crops)
    reconditioned = deepcopy(network)
    recondition(reconditioned, crops, name_blacklist=FLOAT_LAYERS[name])
    recondition(model, crops)
    layer = next(
        n for n, m in model.named_modules() if isinstance(m, qnn.QuantLinear | qnn.QuantConv2d)
    )
    assert torch.equal(model.get_submodule(layer).weight, reconditioned.get_submodule(layer).weight)
    reconditioned = quantize(reconditioned, name, crops)  # bounds follow the weights
    ours, theirs = (m.get_submodule(layer).quant_weight().value for m in (model, reconditioned))
    assert torch.equal(ours, theirs)
    run_gpxq(gptq_mode, model, crops)
    rounded = model.get_submodule(layer).weight.clone()
    report = recondition(model, crops, output_tolerance=0.01).report
    assert report[layer].output_error <= 0.0101
    assert not torch.equal(model.get_submodule(layer).weight, rounded)
    assert model(crops).isfinite().all()
    assert_hooks_gone(model)
    assert "forward" not in model.__dict__  # upstream's modes leave it there
    assert torch.equal(model.get_submodule(layer).weight_orig, network.get_submodule(layer).weight)


@on("swinir", "edsr")
def test_least_squares_takes_the_calibrated_input_quantizers(case):
    name, network, crops, expected = case
    model = quantize(deepcopy(network), name, crops, weight_bits=8)
    before = fidelity(model(crops), expected)
    unbiased = deepcopy(model)
    mode = recondition(model, crops, objective="least_squares", update_bias=True)
    for report in mode.report.values():
        assert report.quantized_output_error_after < report.quantized_output_error_before
    assert fidelity(model(crops), expected) > before
    assert not isinstance(model(crops), QuantTensor)
    recondition(unbiased, crops, objective="least_squares")
    with quantization_status_manager(
        unbiased, disable_act_quant=True, disable_weight_quant=True, disable_bias_quant=True
    ):
        torch.testing.assert_close(unbiased(crops), expected)
    with bias_correction_mode(unbiased):
        unbiased(crops)
    assert fidelity(unbiased(crops), expected) > before


@on("swinir")
def test_activation_equalization_before_it(case):
    name, network, crops, expected = case
    model = deepcopy(network)
    with activation_equalization_mode(model, 0.5, blacklist_layers=FLOAT_LAYERS[name]):
        model(crops)
    torch.testing.assert_close(model(crops), expected, rtol=1e-3, atol=1e-4)
    mode = recondition(model, crops, output_tolerance=0.02, name_blacklist=FLOAT_LAYERS[name])
    assert all(r.condition_after <= r.condition_before for r in mode.report.values())
    model = quantize(model, name, crops)
    assert fidelity(model(crops), expected) > 5
    assert_hooks_gone(model)


@pytest.mark.parametrize("name", ["swinir", "dat"])
def test_same_weights_as_through_nncf(name):
    network = networks.build(name).eval()
    crops = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    settings = ReconditioningConfig(objective="condition", strength=1e-2)
    config = QuantizationConfig(recondition=settings, rounding="nearest")
    by_nncf = quantize_network(network, crops, config)
    layers = [
        layer.name
        for layer in find_layers(wrap(network, crops), "transformer")
        if layer.weight_name is not None
    ]
    model = deepcopy(network)
    mode = recondition(model, crops, config=settings)
    for layer, report in zip(layers, by_nncf.reports, strict=True):
        ours, theirs = (m.get_submodule(layer).weight for m in (model, by_nncf.model))
        assert not torch.equal(ours, network.get_submodule(layer).weight)
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-5
        assert mode.report[layer].condition_after == pytest.approx(report.condition_after, rel=1e-3)
