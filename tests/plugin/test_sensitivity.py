"""What layers' bits are predicted to cost, and the network assembled from several widths."""

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

import condiquant_nncf as host
from condiquant_plugin import InputError, fake_quantizers
from condiquant_plugin.layerwise.precision import LayerBits, layer_bits, product_bits
from condiquant_plugin.sensitivity import WIDTHS
from condiquant_plugin.uniform.bits import FLOAT_BITS
from networks import build

SCOPES = {"edsr": "all", "swinir": "transformer"}


def study(name, network=None, count=8, **settings):
    config = host.QuantizationConfig(scope=SCOPES.get(name, "all"), **settings)
    crops = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    network = build(name) if network is None else network
    return host.study_precision(network, crops, config, bounds_crops=4), network, crops


@pytest.mark.parametrize("name", SCOPES)
def test_predictions_rank_what_single_layers_cost(name):
    made, network, crops = study(name)
    found = made.sensitivity(crops.repeat(4, 1, 1, 1).split(1))
    with torch.no_grad():
        targets = [network(crop) for crop in crops.split(1)]
    assert found.weights.keys() == made.layers.keys()
    assert found.inputs.keys() == {*made.layers, *made.products}
    pairs = []
    for kind, parts in (("weight", found.weights), ("input", found.inputs)):
        for layer in list(parts)[::3]:
            for bits in (2, 4, 8):
                pair = (bits, FLOAT_BITS) if kind == "weight" else (FLOAT_BITS, bits)
                errors = made.errors({layer: LayerBits(*pair)}, crops.split(1), targets)
                pairs.append((parts[layer][bits], np.mean(errors)))
    predicted, measured = np.array(pairs).T
    assert spearmanr(predicted, measured).statistic > 0.95
    ratio = np.log(predicted.sum() / measured.sum())
    assert abs(ratio) < np.log(2)


def test_a_bias_makes_up_for_the_mean_of_what_rounding_does():
    network = build("edsr")
    with torch.no_grad():
        network.body[0].conv1.bias.add_(2000)  # what conv2 gets has a mean far above its spread
    made, network, crops = study("edsr", network)
    name = "body.0.conv2"
    predicted = made.sensitivity(crops.repeat(4, 1, 1, 1).split(1)).weights[name][3]
    bits = {name: LayerBits(3, FLOAT_BITS)}
    measured = np.mean(made.errors(bits, crops.split(1)))
    trained = network.body[0].conv2.bias
    with torch.no_grad():
        made.assemble(bits)
        made.layers[name].bias.copy_(trained)
        outputs = [(made.model(crop), network(crop)) for crop in crops.split(1)]
        kept = np.mean([float((output - target).square().mean()) for output, target in outputs])
        made.assemble({})
        assert torch.equal(made.layers[name].bias, trained)
    assert measured < 0.1 * kept
    assert abs(np.log(predicted / measured)) < np.log(3)


def test_an_assembled_network_has_the_bits_that_it_is_given():
    made, network, crops = study("swinir")
    with torch.no_grad():
        expected = network(crops[:1])
        made.assemble({})
        assert torch.equal(made.model(crops[:1]), expected)
        qkv, proj = (n for n in list(made.layers)[:2])
        product = made.products[0]
        made.assemble({qkv: LayerBits(3, 8), product: LayerBits(8, 4)})
        enabled = {q.name: q.bits for q in fake_quantizers(made.model).values() if q.enabled}
        assert enabled == {
            f"{qkv}.weight": 3, f"{qkv}.input": 8, f"{product}.input0": 4, f"{product}.input1": 4,
        }  # fmt: skip
        assert not torch.equal(made.model(crops[:1]), expected)
        made.assemble(made.uniform(4, 6))
        assert set(layer_bits(made.model).values()) == {(4, 6)}
        assert set(product_bits(made.model).values()) == {6}
        made.assemble({})
        assert torch.equal(made.model(crops[:1]), expected)
    assert proj in made.layers


def test_layers_outside_the_scope_have_their_own_bits():
    rules = {"conv_last": {"activation_bits": "float"}}
    made, network, crops = study("edsr", other_bits=6, layers=rules)
    assert made.fixed == {"conv_first": (6, 6), "conv_last": (6, FLOAT_BITS)}
    assert not made.fixed.keys() & made.sensitivity(crops.split(1)).inputs.keys()
    with torch.no_grad():
        made.assemble({**made.uniform(3, 8), **made.fixed})
        bits = layer_bits(made.model)
        assert bits["conv_first"] == (6, 6)
        assert bits["conv_after_body"] == (3, 8)
        made.assemble({})
        assert torch.equal(made.model(crops[:1]), network(crops[:1]))


def test_more_bits_are_closer_to_the_float_network():
    made, _, crops = study("edsr")
    errors = [np.mean(made.errors(made.uniform(b, 8), crops.split(1))) for b in (2, 4, 6)]
    assert errors == sorted(errors, reverse=True)
    assert all(later < earlier / 4 for earlier, later in itertools.pairwise(errors))
    found = made.sensitivity(crops.split(1))
    predicted = [found.predicted(made.uniform(b, 8)) for b in (2, 4, 6)]
    assert predicted == sorted(predicted, reverse=True)
    assert found.predicted({}) == 0


def test_what_else_reads_a_layers_input_adds_nothing():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 4, 3, padding=1)
            self.layer = nn.Conv2d(4, 4, 3, padding=1)
            self.last = nn.Conv2d(4, 3, 3, padding=1)
            nn.init.zeros_(self.layer.weight)

        def forward(self, x):
            x = self.first(x)
            return self.last(x + self.layer(x))

    made, _, crops = study("residual", Residual())
    found = made.sensitivity(crops.split(1))
    assert set(found.inputs["layer"].values()) == {0.0}
    assert set(found.inputs["layer"]) == set(WIDTHS)


def test_studies_are_repeatable_and_leave_the_network_alone():
    network = build("edsr")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = []
    for _ in range(2):
        made, _, crops = study("edsr", network)
        frozen = made.layers["body.0.conv1"]
        frozen.weight.requires_grad_(False)
        frozen.bias.requires_grad_(False)
        needing = [n for n, p in made.model.named_parameters() if p.requires_grad]
        found.append(made.sensitivity(crops.split(1)))
        assert needing == [n for n, p in made.model.named_parameters() if p.requires_grad]
        assert found[-1].weights["body.0.conv1"][2] > 0
    assert found[0] == found[1]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_bounds_at_every_width_are_those_of_a_search_at_it():
    def bounds(model):
        return {
            q.name: (q.lower.tolist(), q.upper.tolist()) for q in fake_quantizers(model).values()
        }

    made, network, crops = study("edsr")
    for bits in (2, 8):
        made.assemble(made.uniform(bits, bits))
        config = host.QuantizationConfig(
            scope="all",
            weight_bits=bits,
            activation_bits=bits,
            recondition=None,
            rounding="nearest",
        )
        alone = host.quantize_network(network, crops, config, bounds_crops=4)
        assert bounds(made.model) == bounds(alone.model)


def test_a_weight_that_is_a_buffer_is_judged_and_needs_no_gradient_afterwards():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
            self.register_buffer("weight", torch.randn(3, 3, 1, 1))

        def forward(self, x):
            return self.last(nn.functional.conv2d(self.first(x), self.weight))

    made, _, crops = study("fixed", Fixed())
    found = made.sensitivity(crops.split(1))
    ((name, layer),) = made.layers.items()
    assert found.weights[name][2] > found.weights[name][8]
    assert not layer.weight.requires_grad


def test_errors_are_those_of_each_image_however_they_are_batched():
    made, _, crops = study("edsr")
    bits = made.uniform(3, 8)
    alone = made.errors(bits, crops.split(1))
    # Sums of batches in another order move values across ties.
    assert made.errors(bits, crops.split([5, 3])) == pytest.approx(alone, rel=1e-3)


def test_transforms_are_refused():
    with pytest.raises(InputError, match="transform='rotation' knows no search for bits"):
        study("swinir", transform="rotation")
    with pytest.raises(InputError, match="softmax_scale='row' knows no search for bits"):
        study("swinir", softmax_scale="row")
