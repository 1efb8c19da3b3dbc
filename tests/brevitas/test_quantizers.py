"""Learned-bounds quantizers against the core's fake quantizer, and Brevitas' rules for quantizers."""

import io
from copy import deepcopy

import pytest
import torch
from brevitas import config
from brevitas import nn as qnn
from brevitas.graph.calibrate import calibration_mode
from brevitas.graph.quantize import layerwise_quantize
from torch import nn

from condiquant_brevitas import (
    LearnedBoundsActPerTensor,
    LearnedBoundsActPerTensorOneSided,
    LearnedBoundsQuant,
    LearnedBoundsWeightPerChannel,
    LearnedBoundsWeightPerTensor,
)
from condiquant_plugin import FakeQuantizer, InputError, fake_quantizers
from condiquant_plugin.distillation import DistillationConfig, distill

WEIGHT_QUANTIZERS = {
    "tensor": LearnedBoundsWeightPerTensor,
    "channel": LearnedBoundsWeightPerChannel,
}
LAYERS = {
    "linear": (lambda **k: qnn.QuantLinear(12, 8, True, **k), 0),
    "conv1d": (lambda **k: qnn.QuantConv1d(4, 6, 3, **k), 0),
    "conv2d": (lambda **k: qnn.QuantConv2d(4, 6, 3, groups=2, **k), 0),
    "conv3d": (lambda **k: qnn.QuantConv3d(4, 6, 2, **k), 0),
    "conv transposed": (lambda **k: qnn.QuantConvTranspose2d(4, 6, 3, **k), 1),
}


def assert_same_numbers(ours, core, x):
    """Forward within 1e-6, gradients of input and bounds within 1e-4."""
    results = []
    for quantizer, bounds in ((ours[0], ours[1]), (core, core)):
        leaf = x.detach().clone().requires_grad_()
        for parameter in (bounds.lower, bounds.upper):
            parameter.grad = None
        y = quantizer(leaf)
        y = getattr(y, "value", y)
        (y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum().backward()
        results.append((y.detach(), leaf.grad, bounds.lower.grad, bounds.upper.grad))
    mine, theirs = results
    torch.testing.assert_close(mine[0], theirs[0], rtol=0, atol=1e-6)
    for a, b in zip(mine[1:], theirs[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("per", WEIGHT_QUANTIZERS)
@pytest.mark.parametrize("layer", LAYERS)
def test_weights_are_those_of_the_core(layer, per, bits):
    torch.manual_seed(bits)
    build, axis = LAYERS[layer]
    module = build(weight_quant=WEIGHT_QUANTIZERS[per], weight_bit_width=bits)
    rows = module.weight.shape[axis] if per == "channel" else 1
    core = FakeQuantizer(bits, "weight", row_blocks=rows, axis=axis)
    core.search_bounds(module.weight)
    module.quant_weight()  # the first use searches the bounds
    tensor_quant = module.weight_quant.tensor_quant
    for shift in (0.0, 0.013):  # the optimiser moves the bounds off the lattice
        for quantizer in (tensor_quant.quantizer, core):
            with torch.no_grad():
                quantizer.lower.add_(shift)
        assert_same_numbers((module.weight_quant, tensor_quant.quantizer), core, module.weight)
    assert_consistent(module.quant_weight(), bits)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("side", ["symmetric", "one_sided"])
@pytest.mark.parametrize("shape", [(2, 30, 12), (2, 4, 6, 5)])
def test_activations_are_those_of_the_core(shape, side, bits):
    torch.manual_seed(bits)
    one_sided = side == "one_sided"
    quant = LearnedBoundsActPerTensorOneSided if one_sided else LearnedBoundsActPerTensor
    stub = qnn.QuantIdentity(act_quant=quant, bit_width=bits, return_quant_tensor=True)
    x = torch.randn(shape).relu() if one_sided else torch.randn(shape)
    core = FakeQuantizer(bits, "activation", side=side)
    core.search_bounds(x)
    y = stub(x)
    tensor_quant = stub.act_quant.fused_activation_quant_proxy.tensor_quant
    assert_same_numbers((stub, tensor_quant.quantizer), core, x)
    assert_consistent(y, bits)
    assert float(stub.act_quant.scale()) == pytest.approx(float(core.snapped().step))


def assert_consistent(quant_tensor, bits):
    """Codes, scale and zero point tell the same story as the value."""
    codes = quant_tensor.value / quant_tensor.scale + quant_tensor.zero_point
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=2e-3)
    assert codes.round().min() >= 0
    assert codes.round().max() <= 2**bits - 1
    assert torch.equal(quant_tensor.int(float_datatype=True), codes.round())
    assert int(quant_tensor.bit_width) == bits
    assert not quant_tensor.signed


def test_zero_on_grid_makes_weights_symmetric():
    layer = qnn.QuantLinear(
        12, 8, True, weight_quant=LearnedBoundsWeightPerTensor, weight_zero_on_grid=True
    )
    weight = layer.quant_weight()
    assert float(weight.zero_point) == 8
    assert int(weight.bit_width) == 4


def test_row_blocks_for_a_fused_qkv():
    layer = qnn.QuantLinear(
        6, 12, True, weight_quant=LearnedBoundsWeightPerTensor, weight_row_blocks=3
    )
    layer.weight.data[4:8] *= 10
    weight = layer.quant_weight()
    assert weight.scale.shape == (12, 1)
    assert float(weight.scale[5]) == pytest.approx(10 * float(weight.scale[0]), rel=0.5)


@pytest.mark.parametrize("bits", [1, 9, 4.0])
def test_other_bits_are_refused(bits):
    with pytest.raises(InputError, match="use an integer from 2 to 8"):
        qnn.QuantLinear(
            4, 4, True, weight_quant=LearnedBoundsWeightPerTensor, weight_bit_width=bits
        )


def test_brevitas_jit_is_refused(monkeypatch):
    monkeypatch.setattr(config, "JIT_ENABLED", True)
    with pytest.raises(InputError, match="BREVITAS_JIT=1"):
        LearnedBoundsQuant(4, "weight")


def network(bits=4):
    torch.manual_seed(0)
    return nn.Sequential(
        qnn.QuantConv2d(
            3, 6, 3, padding=1, weight_quant=LearnedBoundsWeightPerChannel, weight_bit_width=bits
        ),
        qnn.QuantReLU(act_quant=LearnedBoundsActPerTensorOneSided, bit_width=bits),
        qnn.QuantConv2d(
            6,
            3,
            3,
            padding=1,
            weight_quant=LearnedBoundsWeightPerTensor,
            weight_bit_width=bits,
            input_quant=LearnedBoundsActPerTensor,
            input_bit_width=bits,
        ),
    ).eval()


def calibrate(model, *batches):
    with torch.no_grad(), calibration_mode(model):
        for batch in batches:
            model(batch)


def test_deepcopy_and_state_dict():
    model, x = network(), torch.randn(2, 3, 8, 8)
    calibrate(model, x)
    expected = model(x)
    copied = deepcopy(model)
    assert torch.equal(copied(x), expected)
    fake_quantizers(copied)["2.weight_quant.tensor_quant.quantizer"].upper.data.mul_(2)
    assert torch.equal(model(x), expected)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    loaded = network()
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(loaded(x), expected)


def test_unknown_bounds_are_neither_saved_nor_demanded(monkeypatch):
    model = network()
    state = model.state_dict()
    assert not [key for key in state if key.endswith(("lower", "upper"))]
    with pytest.raises(RuntimeError, match=r"weight_quant\.tensor_quant\.quantizer\.lower"):
        network().load_state_dict(state)
    monkeypatch.setattr(config, "IGNORE_MISSING_KEYS", True)
    loaded = network()
    assert loaded.load_state_dict(state).missing_keys == []
    assert all(q.search_on_next_input for q in fake_quantizers(loaded).values())


def test_float_weights_load_into_the_quantized_layer(monkeypatch):
    layer, plain = network()[0], nn.Conv2d(3, 6, 3, padding=1)
    layer.quant_weight()
    monkeypatch.setattr(config, "IGNORE_MISSING_KEYS", True)
    layer.load_state_dict(plain.state_dict())
    core = FakeQuantizer(4, "weight", row_blocks=6)
    core.search_bounds(plain.weight)
    assert torch.equal(layer.quant_weight().value, core(plain.weight))


def test_meta_device():
    with torch.device("meta"):
        model = network()
    assert all(p.is_meta for p in model.parameters())
    real = network()
    x = torch.randn(2, 3, 8, 8)
    calibrate(real, x)
    expected = real(x)
    model.load_state_dict(real.state_dict(), assign=True)
    assert torch.equal(model(x), expected)
    layer = qnn.QuantLinear(6, 4, True, weight_quant=LearnedBoundsWeightPerTensor, device="meta")
    layer.to_empty(device="cpu")
    nn.init.normal_(layer.weight)
    nn.init.zeros_(layer.bias)
    assert layer(torch.randn(2, 6)).isfinite().all()


def test_layerwise_quantize():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 3, 3), nn.Linear(8, 5)
    )
    reference = deepcopy(model)
    settings = {"weight_quant": LearnedBoundsWeightPerChannel, "weight_bit_width": 3}
    layers = {
        nn.Conv2d: (qnn.QuantConv2d, settings),
        nn.ConvTranspose2d: (qnn.QuantConvTranspose2d, settings),
        nn.Linear: (qnn.QuantLinear, settings),
    }
    model = layerwise_quantize(model, layers)
    model(torch.randn(1, 3, 8, 8))
    for index, axis in ((0, 0), (2, 1), (3, 0)):
        weight = reference[index].weight
        core = FakeQuantizer(3, "weight", row_blocks=weight.shape[axis], axis=axis)
        core.search_bounds(weight)
        assert torch.equal(model[index].quant_weight().value, core(weight))


def test_calibration_searches_on_all_batches_without_quantizing():
    stub = qnn.QuantIdentity(act_quant=LearnedBoundsActPerTensor, bit_width=4).eval()
    batches = [torch.randn(4, 5000), 3 * torch.randn(4, 5000)]
    with torch.no_grad(), calibration_mode(stub):
        for batch in batches:
            assert torch.equal(stub(batch), batch)
    core = FakeQuantizer(4, "activation")
    core.search_bounds(torch.cat(batches))
    (quantizer,) = fake_quantizers(stub).values()
    assert float(quantizer.upper) == pytest.approx(float(core.upper), rel=0.02)
    calibrated = quantizer.upper.clone()
    stub(10 * batches[0])
    assert torch.equal(quantizer.upper, calibrated)
    calibrate(stub, 10 * batches[0])  # calibrating anew searches anew
    assert quantizer.upper > 2 * calibrated


def test_reading_a_scale_searches_nothing():
    stub = qnn.QuantIdentity(act_quant=LearnedBoundsActPerTensor, bit_width=4)
    assert stub.act_quant.scale() is not None
    (quantizer,) = fake_quantizers(stub).values()
    assert quantizer.search_on_next_input
    x = torch.randn(100)
    stub(x)
    assert float(quantizer.upper) == pytest.approx(float(x.max()), rel=0.5)


def test_half_precision_stays_half():
    model = network().bfloat16()
    x = torch.randn(1, 3, 8, 8).bfloat16()
    assert model(x).dtype == torch.bfloat16


def test_distillation_trains_the_bounds():
    model, crops = network(2), torch.rand(8, 3, 8, 8)
    calibrate(model, crops)
    model(crops)
    teacher = deepcopy(model)
    for module in teacher.modules():
        if hasattr(module, "disable_quant"):
            module.disable_quant = True
    before = deepcopy(model.state_dict())
    settings = DistillationConfig(iterations=40, bounds_rate=2e-2, validate_every=10, weights=False)
    result = distill(model, teacher, crops, crops, settings)
    assert result.best_loss < 0.97 * result.initial_loss
    moved = [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])]
    assert {key.rpartition(".")[2] for key in moved} == {"lower", "upper"}
