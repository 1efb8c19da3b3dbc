"""FakeQuantize nodes of an ``ov.Model`` become the IR that the torch network would give."""

from collections import Counter

import nncf
import numpy as np
import openvino as ov
import openvino.opset13 as ops
import pytest
import torch
from openvino.frontend.pytorch import ConversionExtension

import condiquant_nncf
from condiquant_openvino import convert, layer_executions, pack
from condiquant_plugin import InputError
from networks import build

F32 = {"INFERENCE_PRECISION_HINT": "f32"}


def plain_fake_quantize(model, image):
    """Every fake quantizer as one FakeQuantize, of weights too."""

    def translate(context):
        lower, step = (
            np.array(context.get_values_from_const_input(i), np.float32).reshape(
                tuple(context.get_input(i).get_shape())
            )
            for i in (1, 2)
        )
        levels = 2 ** int(context.get_values_from_const_input(3))
        bounds = [ops.constant(lower), ops.constant(lower + step * np.float32(levels - 1))]
        node = ops.fake_quantize(context.get_input(0), *bounds, *bounds, levels)
        node.set_friendly_name(context.get_values_from_const_input(5))
        return node.outputs()

    with torch.no_grad():
        traced = torch.jit.trace(model.eval(), image, strict=False, check_trace=False)
    extension = ConversionExtension("condiquant::fake_quantize", translate)
    shape = ov.PartialShape([1, 3, -1, -1])
    return ov.convert_model(traced, example_input=image, input=[shape], extension=[extension])


def quantized(name, bits, **settings):
    images = torch.rand(2, 3, 16, 24)
    scope = "transformer" if name == "swinir" else "all"
    config = condiquant_nncf.QuantizationConfig(
        weight_bits=bits, activation_bits=bits, scope=scope, recondition=None, **settings
    )
    return condiquant_nncf.quantize_network(build(name), images, config).model, images[:1]


@pytest.mark.parametrize(
    ("name", "bits", "settings"),
    [
        ("compact", 4, {"weight_granularity": "channel"}),
        ("edsr", 2, {"zero_on_grid": True}),
        ("swinir", 3, {}),
        ("swinir", 8, {}),
    ],
)
def test_packed_fake_quantize_is_what_the_network_converts_to(name, bits, settings):
    model, image = quantized(name, bits, **settings)
    simulated = plain_fake_quantize(model, image)
    operators = len(simulated.get_ops())
    packed, converted = pack(simulated), convert(model, image)
    assert len(simulated.get_ops()) == operators
    core = ov.Core()
    compiled = [core.compile_model(ir, "CPU", F32) for ir in (packed, converted)]
    runs_as = [
        Counter((layer.operator, layer.runs_as) for layer in layer_executions(ir, network))
        for ir, network in zip((packed, converted), compiled, strict=True)
    ]
    assert runs_as[0] == runs_as[1]
    outputs = [network([image.numpy()])[0] for network in compiled]
    assert np.abs(outputs[0] - outputs[1]).mean() <= 1e-4 * np.ptp(outputs[1])


def test_a_model_without_low_bits_is_refused():
    image = torch.rand(1, 3, 16, 16).numpy()
    model = ov.convert_model(build("edsr"), example_input=torch.from_numpy(image))
    with pytest.raises(InputError, match=r"no low-bit FakeQuantize to pack: .*condiquant_nncf"):
        pack(model)
    int8 = nncf.quantize(model, nncf.Dataset([image]), subset_size=1)
    with pytest.raises(InputError, match="no low-bit FakeQuantize to pack"):
        pack(int8)
