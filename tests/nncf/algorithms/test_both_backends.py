"""CondiQuant and LearnedBoundsQuantization on both backends."""

from functools import cache

import nncf
import numpy as np
import openvino as ov
import openvino.opset13 as ops
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nncf.common.factory import build_graph
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters
from nncf.quantization.algorithms.pipeline import Pipeline
from nncf.quantization.algorithms.post_training.pipeline import create_ptq_pipeline
from nncf.torch.function_hook import get_hook_storage
from nncf.torch.quantization.layers import BaseQuantizer

import condiquant_nncf as host
import reference
from algorithm_networks import (
    LAYERS,
    LINEAR_ON_PIXELS,
    Toy,
    advanced,
    constants,
    converted,
    fake_quantizes,
    infer,
    items,
    network,
    quantize,
)
from condiquant_nncf.algorithms.statistics import SampleAggregator, _Carrier
from condiquant_nncf.backends.openvino import OVCondiQuantAlgoBackend, prepare
from condiquant_plugin import FakeQuantizer, InputError, fake_quantizers
from condiquant_plugin.methods.condiquant.reconditioning import ReconditioningConfig
from condiquant_plugin.uniform import bounds
from condiquant_plugin.uniform.marking import NODE_KEY, Marker, Role

BACKENDS = ["torch", "openvino"]
SCOPES = {"edsr": "all", "swinir": "transformer"}
FAST = AdvancedQuantizationParameters(disable_bias_correction=True)
"""NNCF compiles C++ before it runs a torch model with its quantizers."""
CONDITION = ReconditioningConfig(objective="condition", strength=0.02, steps=20)


def wrapped(backend, name):
    model = network(name)
    return (
        prepare(converted(model, name))
        if backend == "openvino"
        else host.wrap(model, items(name)[0])
    )


def layer_weight(model):
    """Of a toy's layer, in either framework."""
    if isinstance(model, ov.Model):
        return constants(model)["self.layer.weight"]
    return model.model.layer.weight.detach().numpy()


def int8_weight(model):
    """Codes and scale as ``nncf.quantize`` writes them for the second convolution."""
    layers = [n for n in model.get_ordered_ops() if n.get_type_name() == "Convolution"]
    multiply = layers[1].input_value(1).get_node()
    codes = multiply.input_value(0).get_node().input_value(0).get_node().data
    return codes, multiply.input_value(1).get_node().data


def relative_error(found, expected):
    found = np.asarray(found).reshape(expected.shape)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def weight_errors(quantized, ir):
    """Relative difference of every parameter that the IR keeps under its name."""
    state, found = quantized.state_dict(), constants(ir)
    named = {n: v.numpy() for n, v in state.items() if f"self.{n}" in found}
    return {n: relative_error(found[f"self.{n}"], v) for n, v in named.items()}


@pytest.mark.parametrize("kind", LAYERS)
def test_both_backends_see_the_same_layers(kind):
    found = {b: host.find_layers(wrapped(b, kind), "all") for b in BACKENDS}
    first, second = (found[b] for b in BACKENDS)
    assert [n.geometry for n in first] == [n.geometry for n in second]
    assert [n.row_blocks for n in first] == [n.row_blocks for n in second]
    assert [bool(n.bias_name) for n in first] == [bool(n.bias_name) for n in second]
    assert len(first) == (4 if kind == "attention" else 1)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("objective", ["condition", "least_squares"])
def test_layer_types_agree_between_backends(kind, objective):
    settings = advanced(objective, scope="all", rounding="nearest")
    arguments = {"advanced_parameters": settings}
    model, first, reports = quantize("torch", kind, **arguments)
    _, second, others = quantize("openvino", kind, **arguments)
    for one, other in zip(reports, others, strict=True):
        assert one.condition_after == pytest.approx(other.condition_after, rel=1e-4)
        assert one.output_error == pytest.approx(other.output_error, rel=1e-4)
    if objective == "condition" and kind != "conv_depthwise":  # single rows have 1 anyway
        assert all(r.condition_after < r.condition_before for r in reports)
    x = torch.rand(1, 3, 16, 20)
    with torch.no_grad():
        expected, as_float = first(x).numpy(), model(x).numpy()
    assert relative_error(infer(second, x), expected) < 0.1 * relative_error(expected, as_float)


@pytest.mark.parametrize("name", SCOPES)
def test_reconditioned_weights_agree(name):
    """Not ``least_squares``, nor GPTQ: 4-bit inputs on a rounding tie move their weights by 2e-4."""
    settings = advanced("condition", scope=SCOPES[name], rounding="nearest")
    arguments = {"advanced_parameters": settings}
    _, first, reports = quantize("torch", name, **arguments)
    _, second, others = quantize("openvino", name, **arguments)
    errors = weight_errors(first, second)
    assert {f"{r.name}.weight" for r in reports} <= errors.keys()
    assert max(errors.values()) < 1e-5
    by_name = {r.name: r for r in others}
    assert by_name.keys() == {r.name for r in reports}
    for report in reports:
        assert by_name[report.name].condition_before == report.condition_before
        assert by_name[report.name].condition_after == pytest.approx(report.condition_after, 1e-5)


def test_least_squares_agrees_up_to_rounding_ties():
    arguments = {"advanced_parameters": advanced("least_squares", scope="transformer")}
    _, first, reports = quantize("torch", "swinir", **arguments)
    _, second, others = quantize("openvino", "swinir", **arguments)
    errors = list(weight_errors(first, second).values())
    assert np.median(errors) < 1e-4
    assert max(errors) < 5e-3
    by_name = {r.name: r for r in others}
    assert by_name.keys() == {r.name for r in reports}
    for report in reports:
        assert by_name[report.name].condition_before == report.condition_before
        assert by_name[report.name].condition_after == pytest.approx(report.condition_after, 5e-3)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("kind", ["conv_grouped", "conv_transposed", "matmul", "attention"])
def test_fake_quantize_computes_what_torch_simulates(kind, granularity):
    """On the same weights the bounds are the same, exactly on their lattice, and so are the outputs."""
    changes = advanced(scope="all", weight_granularity=granularity, activation_side="symmetric")
    arguments = {"advanced_parameters": changes, "weight_bits": 3}
    _, first, _ = quantize("torch", kind, **arguments)
    _, second, _ = quantize("openvino", kind, **arguments)
    nodes = fake_quantizes(second)
    modules = list(fake_quantizers(first).values())
    weights = {module.name: module for module in modules if module.kind == "weight"}
    assert len(nodes) == len(modules)
    if kind != "attention":  # products have no module to be named after
        assert nodes.keys() == {module.name for module in modules}
    assert weights.keys() == {name for name in nodes if name.endswith(".weight")}
    for name, module in weights.items():
        node, grid = nodes[name], module.snapped()
        low, high, *outputs = (node.input_value(i).get_node().data for i in (1, 2, 3, 4))
        assert node.get_attributes()["levels"] == 2**module.bits
        assert np.array_equal(low, outputs[0])
        assert np.array_equal(high, outputs[1])
        upper = grid.lower + grid.step * (2**module.bits - 1)
        np.testing.assert_allclose(np.unique(low), np.unique(grid.lower.numpy()), rtol=1e-6)
        np.testing.assert_allclose(np.unique(high), np.unique(upper.numpy()), rtol=1e-6)
        marker = Marker.from_text(node.get_rt_info()[NODE_KEY].astype(str))
        assert (marker.role, marker.label) == (Role.WHOLE, name)
        assert (marker.kind, marker.bits) == (module.kind, module.bits)
        assert marker.refinement == grid.refinement
        assert list(marker.zero) == grid.zero.reshape(-1).tolist()
    x = items()[0]
    with torch.no_grad():
        assert relative_error(infer(second, x), first(x).numpy()) < 1e-3


KINDS = st.sampled_from(["weight", "activation", "operand"])


@cache
def backend_and_layer():
    model = prepare(converted(network("conv_square")))
    backend = OVCondiQuantAlgoBackend(model, build_graph(model))
    nodes = [node for node in backend.graph.get_all_nodes() if backend.is_layer(node)]
    return backend, backend.layer(nodes[1])


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 8), KINDS, st.floats(-9, 0), st.floats(0.1, 9), st.integers(0, 2**31))
def test_a_placed_fake_quantize_computes_what_the_reference_does(bits, kind, low, width, seed):
    quantizer = FakeQuantizer(bits, kind, name="q")
    quantizer.set_bounds(low, low + width)
    grid = quantizer.snapped()
    backend, layer = backend_and_layer()
    placed = fake_quantizes(backend.insert_quantizers([(layer, 0, quantizer)]))["q"]
    x = np.random.default_rng(seed).uniform(-12, 12, (1, 8, 3, 3)).astype(np.float32)
    entry = ops.parameter([1, 8, 3, 3], np.float32)
    alone = ops.fake_quantize(entry, *placed.input_values()[1:], 2**grid.bits)
    found = infer(ov.Model([alone], [entry]), x)
    arrays = (tensor.numpy() for tensor in (grid.lower, grid.step, grid.zero))
    expected = reference.quantize(x, *arrays, grid.bits, grid.refinement)
    position = np.abs((x - grid.lower.numpy()) / grid.step.numpy() % 1 - 0.5)
    atol = 1e-5 * float(grid.step) * 2**grid.bits
    np.testing.assert_allclose(found[position > 1e-3], expected[position > 1e-3], rtol=0, atol=atol)


def test_fused_attention_is_taken_apart():
    model = converted(network("attention"))
    assert any(n.get_type_name() == "ScaledDotProductAttention" for n in model.get_ops())
    split = prepare(model)
    assert not any(n.get_type_name() == "ScaledDotProductAttention" for n in split.get_ops())
    x = items()[0]
    np.testing.assert_allclose(infer(split, x), infer(model, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_npu_gets_zero_on_the_grid_and_symmetric_weights(backend):
    arguments = {"advanced_parameters": advanced(scope="all")}
    target = nncf.TargetDevice.NPU
    _, model, _ = quantize(backend, "conv", target_device=target, **arguments)
    if backend == "torch":
        assert all(q.zero_on_grid for q in fake_quantizers(model).values())
    else:
        for node in fake_quantizes(model).values():
            low, high = (node.input_value(i).get_node().data for i in (1, 2))
            code = -low / ((high - low) / 15)
            assert np.allclose(code, code.round(), atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pipeline_composed_by_hand(backend):
    algorithm = host.CondiQuant(host.QuantizationConfig(scope="all", recondition=CONDITION))
    data = nncf.Dataset([x.numpy() if backend == "openvino" else x for x in items()])
    ptq = create_ptq_pipeline(subset_size=3, advanced_parameters=FAST)
    reconditioned = Pipeline([[algorithm]]).run(wrapped(backend, "conv"), data)
    int8 = Pipeline([[algorithm], *ptq.pipeline_steps]).run(wrapped(backend, "conv"), data)
    assert [r.name for r in algorithm.reports] == ["layer"]
    assert np.array_equal(layer_weight(int8), layer_weight(reconditioned))
    assert not np.array_equal(layer_weight(int8), layer_weight(wrapped(backend, "conv")))
    if backend == "openvino":
        nodes = fake_quantizes(int8).values()
        bits = [{255: 8, 256: 8}.get(n.get_attributes()["levels"]) for n in nodes]
    else:
        hooks = [hook for _, hook in get_hook_storage(int8.model).named_hooks()]
        bits = [hook.num_bits for hook in hooks if isinstance(hook, BaseQuantizer)]
    assert bits == 6 * [8]  # weights and inputs of three convolutions


@pytest.mark.parametrize("backend", BACKENDS)
def test_minmax_is_stock_int8_behind_condiquant(backend):
    arguments = {"then": "minmax", "preset": nncf.QuantizationPreset.MIXED}
    changes = advanced("condition", nncf=FAST)
    _, model, reports = quantize(backend, "conv", **arguments, advanced_parameters=changes)
    assert [r.name for r in reports] == ["layer"]
    _, stock, _ = quantize(backend, "conv", **arguments, advanced_parameters=advanced(nncf=FAST))
    nearest = advanced("condition", rounding="nearest")
    _, low_bit, _ = quantize(backend, "conv", advanced_parameters=nearest)
    if backend == "openvino":
        assert fake_quantizes(model).keys() == fake_quantizes(stock).keys()
        assert all(n.get_attributes()["levels"] > 100 for n in fake_quantizes(model).values())
        codes, scale = int8_weight(model)
        reconditioned = constants(low_bit)["self.layer.weight"]
        assert np.array_equal(codes, np.rint(reconditioned / scale))
        assert not np.array_equal(codes, int8_weight(stock)[0])
    else:
        assert not fake_quantizers(model)
        assert torch.equal(model.layer.weight, low_bit.layer.weight)
        assert not torch.equal(model.layer.weight, stock.layer.weight)


@pytest.mark.parametrize(("name", "quantizers"), [("edsr", 12), ("swinir", 54)])
def test_default_arguments_work_on_both_kinds_of_networks(name, quantizers):
    model, x = network(name), items(name)[0]
    data = nncf.Dataset(items(name, 2))
    quantized = host.quantize(model, data)
    assert [q.bits for q in fake_quantizers(quantized).values()] == quantizers * [4]
    finer = host.quantize(model, data, weight_bits=8, activation_bits=8)
    with torch.no_grad():
        expected = model(x).numpy()
        error = relative_error(quantized(x).numpy(), expected)
        assert relative_error(finer(x).numpy(), expected) < min(0.04, error / 5)
        assert error < 0.35


def test_least_squares_alone_says_what_to_do():
    settings = ReconditioningConfig(objective="least_squares")
    config = host.QuantizationConfig(scope="all", recondition=settings)
    with pytest.raises(InputError, match=r"create_condiquant_pipeline\(\)"):
        host.CondiQuant(config)
    subject = wrapped("torch", "edsr")
    late = host.CondiQuant(config, input_bounds=host.InputBounds(config))
    with pytest.raises(InputError, match="put InputBounds into an earlier step"):
        late.get_statistic_points(subject, build_graph(subject))


def test_per_channel_bounds_openvino_cannot_run_are_refused():
    changes = advanced(scope="all", weight_granularity="channel")
    with pytest.raises(InputError, match=r"layer: .*weight_granularity=.tensor"):
        quantize("openvino", "conv_transposed_grouped", advanced_parameters=changes)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_weight_used_twice_is_reconditioned_once(backend):
    class Twice(Toy):  # OpenVINO copies the weight of a grouped convolution
        def forward(self, x):
            return self.last(self.layer(self.layer(self.first(x).relu()).tanh()).tanh())

    model = Twice("conv_square")
    _, quantized, reports = quantize(
        backend, "twice", model, advanced_parameters=advanced("condition", scope="all")
    )
    assert [r.name for r in reports] == ["layer"]
    if backend == "torch":
        names = [q.name for q in fake_quantizers(quantized).values()]
    else:
        names = list(fake_quantizes(quantized))
        convolutions = [n for n in quantized.get_ops() if n.get_type_name() == "Convolution"]
        sources = [n.input_value(1).get_node().get_friendly_name() for n in convolutions]
        assert sources.count("layer.weight") == 2
    assert sorted(names) == ["layer#1.input", "layer.input", "layer.weight"]


@pytest.mark.parametrize("kind", sorted(LINEAR_ON_PIXELS))
@torch.no_grad()
def test_any_linear_layer_computes_the_same_behind_an_alignment(kind):
    settings = advanced(scope="transformer", rounding="nearest", transform="alignment")
    model, quantized, _ = quantize("torch", kind, advanced_parameters=settings)
    for quantizer in fake_quantizers(quantized).values():
        quantizer.enabled = False
    x = items(kind)[0]
    torch.testing.assert_close(quantized(x), model(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["edsr", "attention"])
def test_config_round_trip(kind):
    scope = "transformer" if kind == "attention" else None
    settings = advanced("condition", scope=scope, transform="alignment", softmax_scale="row")
    _, quantized, _ = quantize("torch", kind, advanced_parameters=settings)
    quantizers = fake_quantizers(quantized).values()
    assert any(q.transforms for q in quantizers) == (kind == "attention")
    assert any(q.softmax for q in quantizers) == (kind == "attention")
    config, state = nncf.torch.get_config(quantized), quantized.state_dict()
    restored = nncf.torch.load_from_config(
        network(kind), config, allowed_modules=("nncf.*", "condiquant_nncf.*")
    )
    restored.load_state_dict(state)
    x = items()[0]
    with torch.no_grad():
        expected = quantized(x)
        assert torch.equal(restored(x), expected)


def test_strip_leaves_the_quantizers_in():
    _, quantized, _ = quantize("torch", "edsr", advanced_parameters=advanced())
    x = items()[0]
    with torch.no_grad():
        expected = quantized(x)
        for kind in (nncf.StripFormat.NATIVE, nncf.StripFormat.DQ, nncf.StripFormat.IN_PLACE):
            stripped = nncf.strip(quantized, strip_format=kind, example_input=x)
            assert torch.equal(stripped(x), expected)
            assert fake_quantizers(stripped).keys() == fake_quantizers(quantized).keys()


def test_sample_is_flat_in_memory_and_bounds_are_those_of_everything():
    torch.manual_seed(0)
    data = [torch.randn(1, 60, 64, 64) * (1 + i / 10) for i in range(12)]
    aggregator = SampleAggregator()
    for item in data:
        aggregator.register_reduced_input(_Carrier(item))
        assert sum(s.untyped_storage().nbytes() for s in aggregator._sample._samples) <= 2 * 2**20
    sample, whole = aggregator.aggregate(), torch.cat(data).reshape(1, -1)
    assert sample.amin() == whole.amin()
    assert sample.amax() == whole.amax()
    found = bounds.search(sample[None], 4, "activation")
    expected = bounds.search(whole, 4, "activation")
    assert found.upper.item() == pytest.approx(expected.upper.item(), rel=0.05)
