"""The IR follows the simulation whatever the plugin is told, and whatever was done to the file."""

import numpy as np
import openvino as ov
import pytest
import torch
from torch import nn

import condiquant_nncf
import networks
from condiquant_openvino import check_parity, convert, halve, read_ir, save
from condiquant_openvino.parity.check import PROPERTIES, check_parities
from condiquant_openvino.parity.example import ROOM
from condiquant_openvino.parity.simulation import Rounding, record, simulate
from condiquant_openvino.running.instruction_sets import lower_instruction_sets
from networks import build


def quantized(name, bits, size, **changes):
    images = torch.rand(2, 3, *size)
    config = condiquant_nncf.QuantizationConfig(
        weight_bits=bits,
        activation_bits=bits,
        scope="transformer" if name in ("swinir", "dat") else "all",
        recondition=None,
        **changes,
    )
    return condiquant_nncf.quantize_network(build(name), images, config).model, images[:1]


@pytest.mark.parametrize(
    ("name", "bits", "static", "fp16", "changes"),
    [
        ("compact", 2, False, True, {}),
        ("edsr", 8, True, True, {}),
        ("edsr", 3, False, False, {}),
        ("swinir", 4, False, True, {}),
        ("swinir", 3, False, False, {"transform": "alignment", "softmax_scale": "row"}),
        ("dat", 8, True, False, {}),
        ("dat", 4, True, True, {"softmax_scale": "row"}),
    ],
)
def test_parity_with_every_property_after_saving_twice(
    name, bits, static, fp16, changes, tmp_path, monkeypatch
):
    # Narrower, DAT's position-bias network has width 0, and OpenVINO crashes on empty MVN.
    monkeypatch.setitem(networks.SECTIONS["dat"], "embed_dim", 32)
    monkeypatch.setitem(networks.SECTIONS["swinir"], "depths", [2])
    monkeypatch.setitem(networks.SECTIONS["swinir"], "num_heads", [2])
    # Traced at its img_size, a network has its masks as constants.
    size = {"dat": (32, 32) if static else (32, 48), "swinir": (16, 24)}.get(name, (16, 16))
    model, image = quantized(name, bits, size, **changes)
    ir = convert(model, image, static=static)
    if fp16:
        halve(ir)
    save(ir, tmp_path / "first.xml")
    save(read_ir(tmp_path / "first.xml"), tmp_path / "second.xml")
    again = read_ir(tmp_path / "second.xml")
    images = [image] if static else [image, torch.rand(1, 3, size[1], size[0])]
    parities = check_parities(model, again, images)
    lowered = [name for name in parities if name not in PROPERTIES]
    assert [name for name in parities if name not in lowered] == list(PROPERTIES)
    assert lowered == lower_instruction_sets()
    for name in lowered:
        assert parities[name].instruction_set == name
        assert len(parities[name].layers) == len(parities["f32"].layers)
    for parity in parities.values():
        parity.raise_if_broken()
    in_f32, default = parities["f32"], parities["default"]
    assert (in_f32.precision, parities["accuracy"].precision) == ("f32", "f32")
    assert in_f32.layers
    assert in_f32.code_flip_rate is not None
    assert max(layer.error for layer in in_f32.layers) <= 1e-5
    if default.precision == "bf16":
        # As much as in torch, with room to spare.
        assert all(entry.error < entry.tolerance * 2 / ROOM for entry in default.inputs)


def test_halving_costs_more_than_nothing_and_is_allowed_for():
    model, image = quantized("compact", 4, (16, 16))
    ir = convert(model, image)
    whole = check_parity(model, ir, [image], max_layers=0)
    halve(ir)
    halved = check_parity(model, ir, [image], max_layers=0)
    assert halved.ok
    errors = [{entry.name: entry.error for entry in parity.inputs} for parity in (whole, halved)]
    assert max(errors[1].values()) > 1e-6 > max(errors[0].values())


@pytest.mark.parametrize("properties", PROPERTIES.values(), ids=PROPERTIES)
def test_a_wrong_layer_is_found_with_every_property(exported_convolutions, properties):
    model, ir, x = exported_convolutions
    with torch.no_grad():
        model.back.layer.bias[3] += 0.1 if properties else 2.0  # far beyond bfloat16
    parity = check_parity(model, ir, [x], max_layers=0, properties=properties)
    assert not parity.ok
    assert ["back.input" in name for name in parity.bisect().layers] == [True]
    given = "default" if not properties else "=".join(*properties.items())
    assert f"with {given} properties" in parity.complaint()


def test_properties_are_those_given_and_no_others(exported_convolutions):
    model, ir, x = exported_convolutions
    precision = ov.Core().get_property("CPU", "INFERENCE_PRECISION_HINT").get_type_name()
    parity = check_parity(model, ir, [x], max_layers=2, properties={})
    assert parity.ok
    assert parity.precision == ("bf16" if precision == "bf16" else "f32")
    strict = check_parity(model, ir, [x], max_layers=2)
    assert strict.precision == "f32"
    if precision == "bf16":
        assert strict.layer_tolerance == 1e-5 < parity.layer_tolerance == ROOM / 2**8
    else:
        assert parity.layer_tolerance == strict.layer_tolerance == 1e-5


class Stateful(nn.Module):
    """Keeps what functions pass on unchanged, and changes tensors in place, as networks do."""

    def __init__(self):
        super().__init__()
        self.mean = torch.tensor([0.4488])
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        self.mean = self.mean.type_as(x)
        x = x - self.mean
        x.view(-1)[0] = 0.5
        return self.layer(x.add_(1).relu_())


def test_rounding_leaves_the_model_alone_and_reaches_every_operator():
    model, x = Stateful().eval(), torch.rand(8, 4)
    before = record(model, x).output

    def ignore(*_):
        return None

    rounded = simulate(model, x, ignore, Rounding(8, 8, 0.0))
    np.testing.assert_array_equal(record(model, x).output, before)
    np.testing.assert_array_equal(rounded, torch.from_numpy(rounded).bfloat16().float().numpy())
    largest = np.abs(rounded - before).max() / np.abs(before).max()
    assert 2**-10 < largest < 2**-6
    noisy = simulate(model, x, ignore, Rounding(24, 24, 0.01))
    assert 0.001 < np.abs(noisy - before).max() / np.ptp(before) <= 0.0101
    np.testing.assert_array_equal(noisy, simulate(model, x, ignore, Rounding(24, 24, 0.01)))
    np.testing.assert_array_equal(simulate(model, x, ignore, Rounding(24, 24, 0.0)), before)
