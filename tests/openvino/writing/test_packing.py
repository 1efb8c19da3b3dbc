"""``condiquant_nncf.quantize`` on an ``ov.Model``, packed: the simulation's values in int8 kernels."""

import nncf
import numpy as np
import openvino as ov
import openvino.opset13 as ops
import pytest
import torch

import condiquant_nncf
from condiquant_openvino import layer_executions, pack, read_ir, save
from condiquant_openvino.writing.packing import _marked_zero, _zero_on
from condiquant_plugin import InputError
from condiquant_plugin.uniform import grid
from condiquant_plugin.uniform.marking import Marker, Role
from networks import build

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "LP_TRANSFORMS_MODE": "NO"}
F32 = {"INFERENCE_PRECISION_HINT": "f32"}


def converted(name, image):
    shape = ov.PartialShape([1, 3, -1, -1])
    return ov.convert_model(build(name), example_input=torch.from_numpy(image), input=[shape])


@pytest.fixture
def image():
    return torch.rand(1, 3, 16, 24).numpy()


@pytest.mark.parametrize(
    ("name", "bits", "device", "granularity", "int8"),
    [
        ("compact", 4, nncf.TargetDevice.ANY, "channel", 3),
        ("edsr", 2, nncf.TargetDevice.NPU, "tensor", 6),
        ("swinir", 3, nncf.TargetDevice.ANY, "tensor", 18),
        ("swinir", 8, nncf.TargetDevice.ANY, "tensor", 18),
    ],
)
def test_packed_model_computes_what_was_simulated(name, bits, device, granularity, int8, tmp_path):
    image, *others = (torch.rand(1, 3, 16, 24).numpy() for _ in range(3))
    model = converted(name, image)
    simulated = condiquant_nncf.quantize(
        model,
        nncf.Dataset([image]),
        target_device=device,
        model_type=nncf.ModelType.TRANSFORMER if name == "swinir" else None,
        advanced_parameters=condiquant_nncf.AdvancedCondiQuantParameters(
            recondition=None, rounding="nearest", weight_granularity=granularity
        ),
        subset_size=1,
        weight_bits=bits,
        activation_bits=bits,
    )
    operators = len(simulated.get_ops())
    save(pack(simulated), tmp_path / "model.xml")
    assert len(simulated.get_ops()) == operators
    packed = read_ir(tmp_path / "model.xml")
    core = ov.Core()
    compiled = core.compile_model(packed, "CPU", F32)
    layers = layer_executions(packed, compiled)
    assert sum(layer.runs_as == "int8" for layer in layers) >= int8
    simulation = core.compile_model(simulated, "CPU", EXACT)
    # One value on a rounding tie moves the whole output of a small network, but not of most images.
    outputs = [(compiled([x])[0], simulation([x])[0]) for x in (image, *others)]
    differences = [
        np.abs(found - expected).mean() / np.ptp(expected) for found, expected in outputs
    ]
    assert np.median(differences) <= 1e-3
    assert not np.array_equal(outputs[0][1], core.compile_model(model, "CPU", F32)([image])[0])


def test_a_weight_is_packed_behind_a_float_input(image):
    model = converted("edsr", image)
    rules = {"body.*": {"activation_bits": "float"}}
    simulated = condiquant_nncf.quantize(
        model,
        nncf.Dataset([image]),
        advanced_parameters=condiquant_nncf.AdvancedCondiQuantParameters(layers=rules),
        subset_size=1,
    )
    packed = pack(simulated)
    codes = [n for n in packed.get_ops() if n.get_output_element_type(0) == ov.Type.u4]
    quantized = [n for n in simulated.get_ops() if n.get_type_name() == "FakeQuantize"]
    weights = [n for n in quantized if n.get_friendly_name().endswith(".weight")]
    assert len(quantized) < 2 * len(weights)
    assert len(codes) == len(weights)
    core = ov.Core()
    found, expected = (
        core.compile_model(m, "CPU", p)([image])[0] for m, p in ((packed, F32), (simulated, EXACT))
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.ptp(expected))


def test_a_model_without_low_bits_is_refused(image):
    model = converted("edsr", image)
    with pytest.raises(InputError, match=r"no low-bit FakeQuantize to pack: .*condiquant_nncf"):
        pack(model)
    int8 = nncf.quantize(model, nncf.Dataset([image]), subset_size=1)
    with pytest.raises(InputError, match="no low-bit FakeQuantize to pack"):
        pack(int8)


def bounds_on_lattice(kind, lower, upper):
    """Input and output bounds of a 4-bit FakeQuantize."""
    snapped = grid.snap(torch.tensor(lower), torch.tensor(upper), 4, kind)
    return [snapped.lower.numpy(), (snapped.lower + 15 * snapped.step).numpy()] * 2


def linear(inputs, weights, axes=(0, 1, 2)):
    """A linear layer, both factors behind a FakeQuantize of the bounds; ``axes``: what is in between."""
    x = ops.parameter([1, 8, 16], np.float32)
    x.set_friendly_name("image")
    weight = ops.constant(np.random.default_rng(0).normal(size=(12, 16)).astype(np.float32))
    factors = [
        ops.fake_quantize(values, *map(ops.constant, bounds), levels=16)
        for values, bounds in ((x, inputs), (weight, weights))
    ]
    if list(axes) != sorted(axes):
        factors[0] = ops.transpose(factors[0], ops.constant(np.array(axes)))
    return ov.Model([ops.matmul(*factors, False, True)], [x])


@pytest.mark.parametrize("axes", [(0, 1, 2), (1, 0, 2)])
@pytest.mark.parametrize("inputs", [(-1.3, 2.1), (0.0, 3.0), (-3.0, 0.0)])
def test_levels_on_the_lattice_are_packed(inputs, axes):
    bounds = bounds_on_lattice("activation", *inputs), bounds_on_lattice("weight", -1.5, 1.2)
    model = linear(*bounds, axes)
    packed = pack(model)
    assert "u4" in {node.get_output_element_type(0).get_type_name() for node in packed.get_ops()}
    x = np.random.default_rng(0).uniform(-3, 3, (1, 8, 16)).astype(np.float32)
    core = ov.Core()
    expected = core.compile_model(model, "CPU", EXACT)([x])[0]
    compiled = core.compile_model(packed, "CPU", F32)
    assert [layer.runs_as for layer in layer_executions(packed, compiled)] == ["int8"]
    np.testing.assert_allclose(compiled([x])[0], expected, rtol=0, atol=1e-5 * np.ptp(expected))


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("factor", ["activation", "weight"])
def test_levels_that_bytes_do_not_hold_are_left_as_they_are(factor, place):
    """One bound differs: values are mapped to others, or none of the levels is zero."""
    given = {
        "activation": bounds_on_lattice("activation", -1.3, 2.1),
        "weight": bounds_on_lattice("weight", -1.5, 1.2),
    }
    pack(linear(*given.values()))
    given[factor][place] = given[factor][place] * np.float32(1.02)
    with pytest.raises(InputError, match="no low-bit FakeQuantize to pack"):
        pack(linear(*given.values()))
    given[factor][(place + 2) % 4] = given[factor][place]
    with pytest.raises(InputError, match="no low-bit FakeQuantize to pack"):
        pack(linear(*given.values()))


def test_a_marked_zero_is_taken_unless_the_bounds_were_changed_since():
    cells = grid.lattice(4, "weight")
    snapped = grid.snap(torch.tensor([-1.5, -0.9]), torch.tensor([1.2, 1.1]), 4, "weight")
    zeros = tuple(snapped.zero.int().tolist())
    marker = Marker(Role.WHOLE, "w", "weight", 4, snapped.refinement, zeros)
    rows = snapped.map(lambda bound: bound.repeat_interleave(3)[:, None])
    lower, step = rows.lower.numpy(), rows.step.numpy()
    found = _marked_zero(marker, cells, lower, step)
    np.testing.assert_array_equal(found, rows.zero.numpy())
    np.testing.assert_array_equal(_zero_on(cells, lower, step), found)
    moved = lower + step / cells.refinement
    assert _marked_zero(marker, cells, moved, step) is None
    np.testing.assert_array_equal(_zero_on(cells, moved, step), found - 1)
    on_grid = grid.snap(torch.tensor(-1.5), torch.tensor(1.2), 4, "weight", zero_on_grid=True)
    marker = Marker(Role.WHOLE, "w", "weight", 4, 1, (8,))
    arrays = on_grid.lower.numpy(), on_grid.step.numpy()
    assert _marked_zero(marker, cells, *arrays) == 8 * cells.refinement
