"""From Brevitas to OpenVINO by way of the core's fake quantizers: the same IR as from NNCF."""

import pytest
import torch
from brevitas import nn as qnn
from brevitas.nn.mixin.base import QuantLayerMixin
from torch import nn

import condiquant_nncf as nncf_host
from brevitas_models import FusedAttention
from condiquant_brevitas import (
    LearnedBoundsActPerTensor,
    LearnedBoundsActPerTensorOneSided,
    LearnedBoundsWeightPerChannel,
    LearnedBoundsWeightPerTensor,
    quantize_sr,
    to_fake_quantizers,
)
from condiquant_openvino import check_parity, convert, save
from condiquant_plugin import InputError, fake_quantizers
from networks import build

WEIGHT = {"weight_quant": LearnedBoundsWeightPerTensor}
INPUT = {"input_quant": LearnedBoundsActPerTensor}
OUTPUT = {"output_quant": LearnedBoundsActPerTensor}


@pytest.fixture(scope="module", autouse=True)
def _no_telemetry():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CI", "true")
        yield


@torch.no_grad()
def computed(model, x):
    return model(x)


def test_a_layer_with_float_inputs_has_no_input_quantizer():
    network, images = build("edsr"), torch.rand(2, 3, 16, 16)
    rules = {"body.0.conv1": {"activation_bits": "float"}}
    model = quantize_sr(network, images, scope="all", layers=rules)
    layer = model.body[0].conv1
    assert not layer.input_quant.is_quant_enabled
    assert layer.weight_quant.is_quant_enabled
    assert not hasattr(layer, "input_quantizer")
    plain = to_fake_quantizers(model)
    torch.testing.assert_close(computed(plain, images), computed(model, images), rtol=0, atol=1e-6)
    check_parity(plain, convert(plain, images[:1]), [images[:1]]).raise_if_broken()


@pytest.mark.parametrize(
    ("name", "scope", "bits"),
    [
        ("swinir", "transformer", 4),
        ("dat", "transformer", 4),
        ("edsr", "all", 4),
        ("edsr", "all", 2),
    ],
)
def test_the_same_ir_as_through_nncf(tmp_path, name, scope, bits):
    network, size = build(name), 32 if name == "dat" else 16
    images = torch.rand(2, 3, size, size)
    model = quantize_sr(network, images, scope=scope, weight_bits=bits, activation_bits=bits)
    plain = to_fake_quantizers(model)
    assert not [m for m in plain.modules() if isinstance(m, QuantLayerMixin)]
    assert len(fake_quantizers(plain)) == len(fake_quantizers(model))
    torch.testing.assert_close(computed(plain, images), computed(model, images), rtol=0, atol=1e-6)

    config = nncf_host.QuantizationConfig(bits, bits, scope)
    other = nncf_host.quantize_network(network, images, config).model
    irs = [convert(m, images[:1], static=True) for m in (plain, other)]
    sizes = [save(ir, tmp_path / f"{i}.xml") for i, ir in enumerate(irs)]
    types = [[node.get_type_name() for node in ir.get_ordered_ops()] for ir in irs]
    assert types[0] == types[1]
    assert (tmp_path / "0.bin").read_bytes() == (tmp_path / "1.bin").read_bytes()
    assert sizes[0]["xml_bytes"] < 1.05 * sizes[1]["xml_bytes"]
    check_parity(plain, irs[0], [images[:1]]).raise_if_broken()


_SEEN = torch.rand(64, 64, generator=torch.Generator().manual_seed(1)) > 0.4
_SEEN[5] = False


@pytest.mark.parametrize(
    "arguments",
    [{}, {"scale": 0.2}, {"attn_mask": _SEEN}, {"attn_mask": 3.0 * _SEEN}, {"is_causal": True}],
    ids=["plain", "scaled", "boolean mask", "float mask", "causal"],
)
def test_fused_attention(arguments):
    network, images = FusedAttention(arguments).eval(), torch.rand(2, 3, 8, 8)
    finest = quantize_sr(network, images, weight_bits=8, activation_bits=8, overflow="vnni")
    error = computed(finest, images) - computed(network, images)
    assert error.abs().max() < 0.05 * computed(network, images).std()
    model = quantize_sr(network, images, weight_bits=8, activation_bits=8)
    plain = to_fake_quantizers(model)
    assert torch.equal(computed(plain, images), computed(model, images))
    assert len(fake_quantizers(plain)) == 8
    ir = convert(plain, images[:1], static=True)
    check_parity(plain, ir, [images[:1]]).raise_if_broken()


def test_fused_attention_is_the_ir_of_its_products(tmp_path):
    images = torch.rand(2, 3, 8, 8)
    for fused in (False, True):
        plain = to_fake_quantizers(quantize_sr(FusedAttention({}, fused), images))
        save(convert(plain, images[:1], static=True), tmp_path / f"{fused}.xml")
    assert (tmp_path / "False.bin").read_bytes() == (tmp_path / "True.bin").read_bytes()


class Users(nn.Module):
    """A network that a Brevitas user quantized by hand, with a layer in two places."""

    def __init__(self):
        super().__init__()
        channel = {"weight_quant": LearnedBoundsWeightPerChannel, "weight_bit_width": 3}
        self.head = qnn.QuantConv2d(3, 6, 3, padding=1, padding_mode="reflect", **channel)
        self.act = qnn.QuantReLU(act_quant=LearnedBoundsActPerTensorOneSided, bit_width=3)
        self.body = qnn.QuantConv2d(6, 6, 3, padding=1, groups=2, bias=False, **channel, **INPUT)
        self.tail = qnn.QuantConvTranspose2d(6, 3, 4, 2, 1, **WEIGHT)
        self.again = self.body

    def forward(self, x):
        x = self.act(self.head(x))
        return self.tail(self.again(input=x + self.body(x)))


def test_a_network_quantized_by_hand():
    model, image = Users().eval(), torch.rand(1, 3, 12, 12)
    expected = computed(model, image)
    plain = to_fake_quantizers(model)
    torch.testing.assert_close(computed(plain, image), computed(model, image), rtol=0, atol=1e-6)
    assert plain.again is plain.body
    assert type(model.body) is qnn.QuantConv2d
    assert torch.equal(computed(model, image), expected)
    check_parity(plain, convert(plain, image), [image]).raise_if_broken()


def test_a_layer_alone():
    layer = qnn.QuantLinear(6, 4, True, **WEIGHT, **INPUT)
    x = torch.rand(5, 6)
    expected = computed(layer, x)
    assert torch.equal(computed(to_fake_quantizers(layer), x), expected)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (lambda: qnn.QuantLinear(4, 4, True), "0 is not quantized with learned bounds"),
        (lambda: qnn.QuantReLU(), "0 is not quantized with learned bounds but with"),
        (lambda: qnn.QuantLinear(4, 4, True, **WEIGHT), "0 has no bounds yet: calibrate"),
        (lambda: qnn.QuantLinear(4, 4, True, **WEIGHT, **OUTPUT), "0 has an output_quant"),
        (lambda: qnn.QuantConv1d(4, 4, 3, **WEIGHT), "0 is a QuantConv1d"),
        (lambda: qnn.QuantConv2d(4, 4, 3, 2, "same", **WEIGHT), "0 is a QuantConv2d"),
    ],
)
def test_what_has_no_counterpart_is_refused(layer, words):
    with pytest.raises(InputError, match=words) as caught:
        to_fake_quantizers(nn.Sequential(layer()))
    assert "\n" not in str(caught.value)
