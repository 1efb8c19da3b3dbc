import pytest
import torch

import condiquant_brevitas
import condiquant_nncf
import networks
from condiquant_plugin.layerwise.precision import (
    LayerBits,
    layer_bits,
    others,
    product_bits,
    usual,
)
from condiquant_plugin.uniform.bits import FLOAT_BITS

KEYS = {"weight_bits": 3, "activation_bits": 8, "recondition": None}


def quantized(host, name, **keys):
    network, crops = networks.build(name), torch.rand(2, 3, 16, 16)
    config = condiquant_nncf.QuantizationConfig(**KEYS, **keys)
    if host == "brevitas":
        return condiquant_brevitas.quantize_sr(network, crops, config)
    return condiquant_nncf.quantize_network(network, crops, config).model


@pytest.mark.parametrize("host", ["nncf", "brevitas"])
def test_bits_are_those_of_the_quantizers(host):
    model = quantized(host, "swinir")
    found = layer_bits(model)
    attention = "layers.0.residual_group.blocks.0.attn"
    assert found[f"{attention}.qkv"] == (3, 8)
    assert not any("product" in name for name in found)
    # Operands of a product have 7 bits where they are safe.
    products = product_bits(model)
    assert set(products.values()) == {7}
    assert len(products) == 8
    assert usual(found) == LayerBits(3, 8)
    assert others(found) == {}


@pytest.mark.parametrize("host", ["nncf", "brevitas"])
def test_layers_outside_the_scope_have_their_own(host):
    found = layer_bits(quantized(host, "compact", scope="all", other_bits=6))
    assert found == {"body.0": (6, 6), **{f"body.{i}": (3, 8) for i in (2, 4, 6)}, "body.8": (6, 6)}
    assert usual(found).label == "w3a8"
    assert others(found) == {"w6a6": 2}


def test_a_further_use_of_a_weight_has_its_bits():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(torch.relu(self.layer(x)))

    model = condiquant_nncf.quantize_network(
        Twice(), torch.rand(2, 3, 4, 4), condiquant_nncf.QuantizationConfig(**KEYS)
    ).model
    assert layer_bits(model) == {"layer": (3, 8), "layer#1": (3, 8)}


def test_of_equally_many_the_lower_bits_are_the_usual_ones():
    bits = {"a": LayerBits(8, 4), "b": LayerBits(2, 8)}
    assert usual(bits) == (2, 4)
    assert others(bits) == {"w2a8": 1, "w8a4": 1}
    assert usual({}) == (FLOAT_BITS, FLOAT_BITS)
