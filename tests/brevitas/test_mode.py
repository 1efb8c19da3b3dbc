"""``condiquant_mode`` on toy models over all layer types, after Brevitas' own test_gpxq.py."""

import sys
import warnings
from collections import OrderedDict
from contextlib import contextmanager
from copy import deepcopy

import pytest
import torch
from brevitas import nn as qnn
from brevitas.graph.quantize import layerwise_quantize
from brevitas.graph.utils import remove_weight_orig
from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerTensorFloat
from torch import nn

from brevitas_models import LAYERS, Toy, assert_clean, recondition, toy
from condiquant_brevitas import condiquant_mode
from condiquant_plugin import InputError
from condiquant_plugin.layerwise.moments import LayerGeometry
from condiquant_plugin.layerwise.moments import moments_of as moments
from condiquant_plugin.layerwise.problem import LayerProblem
from condiquant_plugin.methods.condiquant.reconditioning import ReconditioningConfig
from condiquant_plugin.methods.condiquant.reconditioning import recondition as solve


@contextmanager
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("sequential", [False, True], ids=["one shot", "sequential"])
@pytest.mark.parametrize("name", LAYERS)
def test_condition_falls_and_the_output_stays_within_tolerance(name, sequential):
    model, x = toy(name)
    layer, before = deepcopy(model.layer), model.layer.weight.detach().clone()
    mode = recondition(model, x, output_tolerance=0.05, steps=10, sequential=sequential)
    report = mode.report["layer"]
    assert report.condition_after < 0.97 * report.condition_before
    change = model.layer(x) - layer(x)
    signal = nn.Module.__call__(layer, x) - _bias_only(layer, x)
    error = float(change.norm() / signal.norm())
    assert 0 < error <= 0.0505
    assert report.output_error == pytest.approx(error, rel=1e-3)  # the unfolding is the layer's own
    assert torch.equal(model.layer.weight_orig, before)
    assert list(mode.report) == ["layer", "head"]
    assert_clean(model)
    torch.testing.assert_close(deepcopy(model)(x), model(x), rtol=0, atol=0)


def _bias_only(layer, x):
    return layer(torch.zeros_like(x))


def test_one_shot_needs_one_update_and_batches_add_up():
    model, x = toy("conv2d")
    halves = deepcopy(model)
    assert recondition(model, x).num_layers == 1
    recondition(halves, *x.split(1))
    torch.testing.assert_close(halves.layer.weight, model.layer.weight, rtol=1e-5, atol=1e-6)
    model, x = toy("conv2d")
    assert recondition(model, x, sequential=True).num_layers == 2


def test_sequential_sees_the_reconditioned_layers_before():
    one_shot, x = toy("linear 2-d")
    sequential = deepcopy(one_shot)
    start = deepcopy(one_shot)
    recondition(one_shot, x, strength=3e-2)
    recondition(sequential, x, strength=3e-2, sequential=True)
    assert torch.equal(one_shot.layer.weight, sequential.layer.weight)
    config = ReconditioningConfig(objective="condition", strength=3e-2)
    for model, previous in ((one_shot, start), (sequential, sequential)):
        inputs = torch.relu(previous.layer(x)).detach()
        problem = LayerProblem(
            "head", start.head.weight, start.head.bias, moments(inputs, LayerGeometry())
        )
        (solution,) = solve([problem], config)
        torch.testing.assert_close(model.head.weight, solution.weight, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(one_shot.head.weight, sequential.head.weight, atol=1e-5)


def quantized_toy(**kwargs):
    torch.manual_seed(0)
    settings = {"weight_quant": Int8WeightPerTensorFloat, "weight_bit_width": 2} | kwargs
    return nn.Sequential(
        qnn.QuantLinear(12, 8, True, **settings), nn.ReLU(), qnn.QuantLinear(8, 6, True, **settings)
    ).eval()


@pytest.mark.parametrize("sequential", [False, True])
def test_quantized_model_is_reconditioned_as_its_float_self(sequential):
    """Quantizers are off inside, and ``weight_orig`` does not hide the new weights."""
    quantized, x = quantized_toy(), torch.randn(40, 12)
    plain = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 6))
    plain.load_state_dict(quantized.state_dict(), strict=False)
    for model in (quantized, plain):
        recondition(model, x, strength=3e-2, sequential=sequential)
    assert torch.equal(quantized[2].weight, plain[2].weight)
    assert quantized[0].weight_quant.is_quant_enabled
    assert "weight_orig" in dict(quantized[0].named_buffers())


def test_only_layers_that_get_quantized_are_touched():
    model = quantized_toy()
    model.append(nn.Linear(6, 4))
    model.append(qnn.QuantLinear(4, 4, True, weight_quant=None))
    assert list(recondition(model, torch.randn(40, 12)).report) == ["0", "2"]


def test_disabled_quantization_is_the_float_model_after_layerwise_quantize():
    model, x = toy("conv2d")
    expected = model(x)
    recondition(model, x, strength=3e-2)
    assert not torch.allclose(model(x), expected, atol=1e-4)
    layers = {
        nn.Conv2d: (qnn.QuantConv2d, {"weight_quant": Int8WeightPerTensorFloat}),
        nn.Linear: (qnn.QuantLinear, {"weight_quant": Int8WeightPerTensorFloat}),
    }
    model = layerwise_quantize(model, layers)
    for layer in (model.layer, model.head):
        layer.weight_quant.disable_quant = True
    assert torch.equal(model(x), expected)


def test_weight_orig_is_optional_and_removable():
    model, x = toy("conv2d")
    keys = model.state_dict().keys()
    recondition(model, x)
    assert "layer.weight_orig" in model.state_dict()
    remove_weight_orig(model)
    assert model.state_dict().keys() == keys
    recondition(model, x, create_weight_orig=False)
    assert model.state_dict().keys() == keys


def test_first_weight_orig_survives_a_second_pass():
    model, x = toy("conv2d")
    start = model.layer.weight.detach().clone()
    recondition(model, x)
    recondition(model, x, create_weight_orig=False)
    assert torch.equal(model.layer.weight_orig, start)


def test_deep_copy_instead_of_in_place():
    model, x = toy("conv2d")
    before = deepcopy(model.state_dict())
    mode = recondition(model, x, inplace=False)
    assert mode.model is not model
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not torch.equal(mode.model.layer.weight, model.layer.weight)
    assert_clean(model)
    assert_clean(mode.model)


@pytest.mark.parametrize("sequential", [False, True])
def test_forward_output_on_request(sequential):
    model, x = toy("conv2d")
    expected = model(x)
    with condiquant_mode(model, return_forward_output=True, sequential=sequential) as mode:
        assert torch.equal(mode.model(x), expected)
        mode.update()
    with condiquant_mode(model) as mode:
        assert mode.model(x) is None
        mode.update()


def test_parallel_group_updates_together():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.out(self.q(x) * self.k(x))

    model, x = Branches(), torch.randn(50, 8)
    groups = [["q", "k"]]
    with condiquant_mode(model, sequential=True, group_of_parallel_layers=groups) as mode:
        assert mode.num_layers == 2
        mode.model(x)
        mode.update()
        assert set(mode.report) == {"q", "k"}
        mode.model(x)
        mode.update()
    assert set(mode.report) == {"q", "k", "out"}
    before = deepcopy(model.state_dict())
    with (
        pytest.raises(ValueError, match="nothing"),
        condiquant_mode(model, group_of_parallel_layers=[["nothing"]]),
    ):
        pass
    assert_clean(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_layer_called_with_keywords():
    class Keyword(Toy):
        def forward(self, x):
            return self.head(input=self.layer(input=x))

    build, shape = LAYERS["linear 3-d"]
    torch.manual_seed(0)
    model, x = Keyword(build(), shape), torch.randn(shape)
    positional = nn.Sequential(deepcopy(model.layer), deepcopy(model.head))
    recondition(model, x)
    recondition(positional, x)
    assert torch.equal(model.head.weight, positional[1].weight)


def test_hooks_go_when_nothing_was_updated():
    model, x = toy("conv2d")
    before = model.layer.weight.detach().clone()
    with (
        pytest.warns(UserWarning, match=r"update\(\) was not called: layer, head"),
        condiquant_mode(model) as mode,
    ):
        mode.model(x)
    assert_clean(model)
    assert torch.equal(model.layer.weight, before)
    assert not hasattr(model.layer, "weight_orig")


def test_layers_that_no_batch_reaches_are_named():
    model, x = toy("conv2d")
    model.unused = nn.Linear(3, 3)
    with pytest.warns(UserWarning, match="no batch reached: unused"):
        recondition(model, x)


def test_error_inside_leaves_the_model_clean():
    model, x = toy("conv2d")
    recondition(model, x)
    orig = model.layer.weight_orig
    with pytest.raises(InputError, match="NaN or Inf in the input of layer"), no_warnings():
        recondition(model, torch.full_like(x, torch.nan))
    assert_clean(model)
    assert model.layer.weight_orig is orig


def test_forward_attribute_from_before_comes_back():
    model, x = toy("conv2d")
    plain = model.forward
    model.forward = lambda x: plain(2 * x)
    mine = model.forward
    recondition(model, x)
    assert model.forward is mine


def test_graph_module():
    model, x = toy("conv2d")
    traced = torch.fx.symbolic_trace(model)
    forward = type(traced).forward
    reference = deepcopy(model)
    recondition(traced, x)
    recondition(reference, x)
    assert type(traced).forward is forward
    assert torch.equal(traced.layer.weight, reference.layer.weight)
    assert torch.equal(deepcopy(traced)(x), traced(x))


def test_fused_qkv_is_three_matrices():
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(qkv=nn.Linear(8, 24)))
    x = torch.randn(60, 8)
    parts = [nn.Linear(8, 8) for _ in range(3)]
    for part, weight in zip(parts, model.qkv.weight.detach().split(8), strict=True):
        part.weight.data.copy_(weight)
        recondition(part_model := nn.Sequential(part), x)
        assert_clean(part_model)
    whole = deepcopy(model)
    recondition(model, x)
    expected = torch.cat([part.weight for part in parts])
    torch.testing.assert_close(model.qkv.weight, expected, rtol=1e-4, atol=1e-5)
    recondition(whole, x, row_blocks={"qkv": 1})
    assert not torch.allclose(whole.qkv.weight, expected, atol=1e-4)


def test_name_blacklist_takes_layers_and_containers():
    model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)))
    x = torch.randn(30, 6)
    assert list(recondition(model, x, name_blacklist=["1"]).report) == ["0"]
    assert list(recondition(model, x, name_blacklist=["1.0", "0"]).report) == ["1.1"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name_blacklist": ["laier"]}, "no module 'laier' in Toy"),
        ({"row_blocks": {"laier": 3}}, "no module 'laier' in Toy"),
        ({"row_blocks": {"layer": 3}}, "row_blocks=3 of layer does not divide its 10 rows"),
        ({"objective": "least_squares"}, "nothing quantizes the input of layer"),
        (
            {"config": ReconditioningConfig(inputs="compressed")},
            r'inputs="compressed" is for quantize_sr\(\): use sequential=True',
        ),
    ],
)
def test_bad_settings_end_in_one_line(settings, message):
    model, x = toy("conv2d")
    with pytest.raises(InputError, match=message) as caught:
        recondition(model, x, **settings)
    assert "\n" not in str(caught.value)
    assert_clean(model)


def test_tensorflow_padding_is_refused():
    layer = qnn.QuantConv2d(4, 4, 3, stride=2, padding="same")
    with pytest.raises(InputError, match="0 pads by its input's size"):
        recondition(nn.Sequential(layer), torch.randn(1, 4, 8, 8))


def test_least_squares_with_input_quant():
    kwargs = {"input_quant": Int8ActPerTensorFloat, "input_bit_width": 3}
    model, x = quantized_toy(**kwargs), torch.randn(64, 12)
    model.train()
    model(x)
    model.eval()
    given, unbiased = deepcopy(model), deepcopy(model)
    bias = model[0].bias.detach().clone()
    mode = recondition(model, x, objective="least_squares", update_bias=True)
    for report in mode.report.values():
        assert report.quantized_output_error_after < report.quantized_output_error_before
    assert not torch.equal(model[0].bias, bias)
    assert model[0].input_quant.is_quant_enabled
    recondition(unbiased, x, objective="least_squares")
    assert torch.equal(unbiased[0].weight, model[0].weight)
    assert torch.equal(unbiased[0].bias, bias)
    quantizers = {str(i): deepcopy(given[i].input_quant) for i in (0, 2)}
    for i in (0, 2):
        given[i].input_quant.disable_quant = True
    settings = {
        name: lambda x, quantizer=quantizer: quantizer(x).value
        for name, quantizer in quantizers.items()
    }
    recondition(given, x, objective="least_squares", input_quantizers=settings)
    torch.testing.assert_close(given[2].weight, model[2].weight)


def test_half_precision_weights():
    model, x = toy("linear 2-d")
    model.bfloat16()
    mode = recondition(model, x.bfloat16(), output_tolerance=0.05)
    assert model.layer.weight.dtype == torch.bfloat16
    assert mode.report["layer"].condition_after < mode.report["layer"].condition_before


def test_moments_are_kept_as_asked():
    model, x = toy("linear 2-d")
    reference = deepcopy(model)
    with condiquant_mode(model, dtype=torch.float32, device="same") as mode:
        mode.model(x)
        assert mode.gpxq_layers["layer"].moments.gram.dtype == torch.float32
        mode.update()
    recondition(reference, x)
    torch.testing.assert_close(model.layer.weight, reference.layer.weight, rtol=1e-4, atol=1e-5)


def test_magr_which_imports_undeclared_tqdm_is_not_imported():
    assert "brevitas.graph.magr" not in sys.modules
