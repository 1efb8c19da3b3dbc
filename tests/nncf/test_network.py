import dataclasses

import pytest
import torch
from torch import nn

import condiquant_nncf as host
from condiquant_plugin import InputError, fake_quantizers
from condiquant_plugin.distillation import DistillationConfig, distill
from condiquant_plugin.layerwise.moments import moments_of
from condiquant_plugin.methods.condiquant.reconditioning import ReconditioningConfig
from networks import build

CONDITION = ReconditioningConfig(objective="condition", strength=0.03, steps=30)
CASES = {"swinir": ("transformer", 16), "dat": ("transformer", 32), "edsr": ("all", 16)}


def config(name, bits=4, **changes):
    base = host.QuantizationConfig(weight_bits=bits, activation_bits=bits, scope=CASES[name][0])
    return dataclasses.replace(base, **changes)


def crops(name, count=4):
    return torch.rand(count, 3, CASES[name][1], CASES[name][1])


def hooked_moments(network, layer, batches):
    """Moments collected with plain PyTorch hooks."""
    found = []
    module = network.get_submodule(layer.name)
    handle = module.register_forward_pre_hook(
        lambda _, inputs: found.append(moments_of(inputs[0], layer.geometry))
    )
    with torch.no_grad():
        for batch in batches:
            network(batch)
    handle.remove()
    total = found[0]
    for other in found[1:]:
        total = total + other
    return total


@pytest.mark.parametrize("name", CASES)
def test_moments_are_those_of_plain_hooks(name):
    network, batches = build(name), crops(name).split(3)
    wrapped = host.wrap(network, batches[0])
    layers = [n for n in host.find_layers(wrapped, CASES[name][0]) if n.weight_name]
    collected = host.collect_moments(wrapped, layers, batches)
    for layer in (layers[0], layers[-1]):
        expected = hooked_moments(network, layer, batches)
        torch.testing.assert_close(collected[layer.name].gram, expected.gram, rtol=1e-6, atol=1e-8)
        assert collected[layer.name].samples == expected.samples


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("objective", ["condition", "least_squares"])
def test_quantized_network_follows_the_float_one(name, objective):
    network, images = build(name), crops(name)
    recondition = dataclasses.replace(CONDITION, objective=objective)
    before = {n: p.clone() for n, p in network.named_parameters()}
    result = host.quantize_network(network, images, config(name, 8, recondition=recondition))
    with torch.no_grad():
        expected, output = network(images), result.model(images)
    assert (output - expected).norm() < 0.2 * (expected - expected.mean()).norm()
    assert not torch.equal(output, expected)
    assert all(torch.equal(before[n], p) for n, p in network.named_parameters())
    quantizers = {q.name for q in fake_quantizers(result.model).values()}
    for layer in result.layers:
        suffixes = ("weight", "input") if layer.weight_name else ("input0", "input1")
        assert {f"{layer.name}.{s}" for s in suffixes} <= quantizers
    if objective == "condition":
        assert all(r.condition_after < r.condition_before for r in result.reports)


@pytest.mark.parametrize("name", ["swinir", "edsr"])
def test_quantized_network_takes_other_sizes(name):
    images = crops(name)
    result = host.quantize_network(build(name), images, config(name))
    with torch.no_grad():
        assert result.model(torch.rand(1, 3, 24, 40)).shape == (1, 3, 48, 80)


def test_values_inside_the_quantized_network_are_on_the_grid():
    images = crops("swinir")
    result = host.quantize_network(build("swinir"), images, config("swinir", 2))
    seen = {}
    for quantizer in fake_quantizers(result.model).values():
        quantizer.register_forward_hook(
            lambda module, _, output: seen.__setitem__(module.name, output.unique().numel())
        )
    with torch.no_grad():
        result.model(images)
    assert len(seen) == len(fake_quantizers(result.model))
    for name, values in seen.items():
        blocks = 3 if name.endswith("qkv.weight") else 1
        assert values <= 4 * blocks


def test_per_channel_bounds():
    result = host.quantize_network(
        build("edsr"), crops("edsr"), config("edsr", weight_granularity="channel")
    )
    shapes = {q.lower.numel() for q in fake_quantizers(result.model).values() if q.kind == "weight"}
    assert shapes == {16, 64}


def test_without_reconditioning_weights_stay_as_trained():
    network = build("swinir")
    settings = config("swinir", recondition=None, rounding="nearest")
    result = host.quantize_network(network, crops("swinir"), settings)
    name = result.layers[0].weight_name
    assert torch.equal(result.model.get_parameter(name), network.get_parameter(name))
    assert all(r.condition_before == r.condition_after for r in result.reports)


def test_bounds_are_searched_on_the_inputs_that_were_asked_for():
    network, images = build("swinir"), crops("swinir")
    first, last = [], []
    for way in ("float", "quantized"):
        changed = config("swinir", 2, bounds_inputs=way, recondition=None)
        model = host.quantize_network(network, images, changed).model
        inputs = [q for q in fake_quantizers(model).values() if q.kind == "activation"]
        named = {q.name: q.upper.item() for q in inputs}
        first.append(named["layers.0.residual_group.blocks.0.attn.qkv.input"])
        last.append(named["layers.1.residual_group.blocks.1.mlp.fc2.input"])
    # Kernels sum in another order for images that pass together.
    assert first[0] == pytest.approx(first[1], rel=1e-6)
    assert last[0] != pytest.approx(last[1], rel=1e-3)


def test_two_runs_give_identical_networks():
    first, second = (
        host.quantize_network(
            build("dat"), torch.full((2, 3, 32, 32), 0.3).add_(0.1), config("dat")
        )
        for _ in range(2)
    )
    for one, other in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_distillation_trains_through_nncfs_hooks():
    network, images = build("swinir"), crops("swinir", 8)
    result = host.quantize_network(network, images, config("swinir", 2))
    outcome = distill(
        result.model, network, images[:6], images[6:],
        DistillationConfig(iterations=20, validate_every=5, feature_weight=0.01),
        blocks=host.feature_blocks(network, result.layers),
        trainable_weights=host.trainable_weights(result.model, result.layers),
    )  # fmt: skip
    assert outcome.best_loss < outcome.initial_loss


def test_computed_weights_are_refused():
    class Computed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
            self.weight = nn.Parameter(torch.rand(3, 3, 1, 1))

        def forward(self, x):
            return self.last(nn.functional.conv2d(self.first(x), self.weight.exp()))

    with pytest.raises(InputError, match="computed"):
        host.quantize_network(Computed(), torch.rand(2, 3, 8, 8), config("edsr"))


def test_crops_that_the_network_cannot_run_on():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)

        def forward(self, image):
            return self.conv(nn.functional.pad(image, (18, 18, 18, 18), "reflect"))

    with pytest.raises(InputError, match=r"Padded cannot run on crops of 12x16 \(.*\): give crops"):
        host.quantize_network(
            Padded(), torch.rand(2, 3, 16, 12), host.QuantizationConfig(scope="all")
        )


@pytest.mark.parametrize("transform", ["rotation", "alignment"])
@pytest.mark.parametrize(("name", "transformed"), [("swinir", 16), ("dat", 8), ("edsr", 0)])
def test_transformed_layers_compute_the_same_in_floats(name, transformed, transform):
    network, images = build(name), crops(name)
    settings = config(name, recondition=None, rounding="nearest", transform=transform)
    found = host.quantize_network(network, images, settings)
    quantizers = fake_quantizers(found.model)
    assert sum(bool(q.transforms) for q in quantizers.values()) == transformed
    for quantizer in quantizers.values():
        quantizer.enabled = False
    torch.testing.assert_close(found.model(images), network(images), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("inputs", ["original", "compressed"])
@torch.no_grad()
def test_least_squares_of_transformed_layers_see_what_their_quantizers_see(inputs):
    network, images = build("swinir"), crops("swinir", 4)
    errors = {}
    for transform in ("none", "rotation", "alignment"):
        recondition = ReconditioningConfig("least_squares", inputs=inputs)
        settings = config("swinir", 3, recondition=recondition, transform=transform)
        found = host.quantize_network(network, images, settings)
        errors[transform] = (found.model(images) - network(images)).norm()
    assert errors["rotation"] < 1.2 * errors["none"]
    assert errors["alignment"] < 0.9 * errors["none"]


def test_a_layer_without_a_bias_is_aligned_about_zero():
    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 24, bias=False)
            self.second = nn.Linear(24, 3)

        def forward(self, image):
            x = image.permute(0, 2, 3, 1)
            return self.second(self.first(x).relu()).permute(0, 3, 1, 2)

    torch.manual_seed(0)
    network, images = Narrow(), torch.rand(2, 3, 16, 16)
    settings = host.QuantizationConfig(recondition=None, rounding="nearest", transform="alignment")
    found = host.quantize_network(network, images, settings)
    quantizers = [q for q in fake_quantizers(found.model).values() if q.transforms]
    assert [bool(q.shift.any()) for q in quantizers] == [False, True]
    for quantizer in fake_quantizers(found.model).values():
        quantizer.enabled = False
    torch.testing.assert_close(found.model(images), network(images), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_weight_used_twice_has_one_matrix_and_no_shift():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.layer = nn.Linear(3, 24), nn.Linear(24, 24)

        def forward(self, image):
            x = self.first(image.permute(0, 2, 3, 1))
            return self.layer(self.layer(x).relu())[..., :3].permute(0, 3, 1, 2)

    torch.manual_seed(0)
    network, images = Tied(), torch.rand(2, 3, 16, 16)
    settings = host.QuantizationConfig(recondition=None, rounding="nearest", transform="auto")
    found = host.quantize_network(network, images, settings)
    quantizers = fake_quantizers(found.model).values()
    one, other = (q for q in quantizers if q.transforms == 24)
    assert torch.equal(one.matrix, other.matrix)
    assert not one.shift.any()
    for quantizer in quantizers:
        quantizer.enabled = False
    torch.testing.assert_close(found.model(images), network(images), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "maps"), [("swinir", 4), ("dat", 3), ("edsr", 0)])
@torch.no_grad()
def test_softmax_maps_by_row_change_nothing_in_floats(name, maps):
    network, images = build(name), crops(name)
    settings = config(name, 3, recondition=None, rounding="nearest", softmax_scale="row")
    found = host.quantize_network(network, images, settings)
    quantizers = fake_quantizers(found.model).values()
    assert sum(q.softmax for q in quantizers) == maps
    for quantizer in quantizers:
        quantizer.enabled = False
    torch.testing.assert_close(found.model(images), network(images), atol=1e-5, rtol=1e-4)


def test_rows_have_scales_by_default_only_where_bits_are_few():
    network, images = build("swinir"), crops("swinir")
    for bits, maps in ((4, 4), (5, 0)):
        settings = config("swinir", bits, recondition=None, softmax_scale="auto")
        quantizers = fake_quantizers(host.quantize_network(network, images, settings).model)
        assert sum(q.softmax for q in quantizers.values()) == maps


class Mixing(nn.Module):
    """A product of two activations, of which ``mix`` makes the result."""

    def __init__(self, mix):
        super().__init__()
        self.mix = mix
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 3)

    def forward(self, image):
        x = self.first(image.flatten(2).mT)
        mixed = self.last(self.mix(x @ x.mT, x))
        return mixed.mT.view(image.shape)


@pytest.mark.parametrize(
    ("mix", "maps"),
    [
        (lambda scores, x: scores.softmax(-1) @ x, 1),
        (lambda scores, x: torch.softmax(scores, dim=2) @ x, 1),
        (lambda scores, x: nn.functional.dropout(scores.softmax(-1), 0.1, False) @ x, 1),
        # The product does not sum over the rows of these, or they are no longer shares.
        (lambda scores, x: scores.softmax(1) @ x, 0),
        (lambda scores, x: scores.softmax(-1).mT @ x, 0),
        (lambda scores, x: (x.mT @ scores.softmax(-1)).mT, 0),
        (lambda scores, x: (2 * scores.softmax(-1)) @ x, 0),
        (lambda scores, x: scores.relu() @ x, 0),
    ],
)
def test_only_rows_that_are_summed_over_have_scales(mix, maps):
    torch.manual_seed(0)
    images = torch.rand(2, 3, 4, 6)
    settings = host.QuantizationConfig(recondition=None, softmax_scale="row")
    found = host.quantize_network(Mixing(mix).eval(), images, settings)
    assert sum(q.softmax for q in fake_quantizers(found.model).values()) == maps
