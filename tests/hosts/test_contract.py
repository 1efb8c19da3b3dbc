"""What every host's entry keeps to: one config gives one network, whichever calibrates it."""

import nncf
import openvino as ov
import pytest
import torch
from torch import nn

import condiquant_nncf as nncf_host
from algorithm_networks import constants, network
from condiquant_brevitas import quantize_sr
from condiquant_nncf.quantize import create_condiquant_pipeline
from condiquant_plugin import InputError, fake_quantizers
from condiquant_plugin.layerwise import precision
from condiquant_plugin.methods.condiquant.reconditioning import ReconditioningConfig
from condiquant_plugin.uniform.bits import FLOAT_BITS
from entries import ENTRIES, TORCH_ENTRIES, by_network, by_training, converted
from networks import build

SCOPES = {"edsr": "all", "swinir": "transformer", "dat": "transformer"}
SIZES = {"edsr": 40, "swinir": 16, "dat": 32}
"""Some layers of EDSR and DAT have more values than there is room for in a sample."""
CONDITION = ReconditioningConfig("condition", strength=0.02, steps=20)
RULES = {
    "*.qkv": {"weight_bits": 6},
    "*/matmul/1": {"activation_bits": 3},
    "layers.1.*.fc?": {"weight_bits": "float", "activation_bits": "float"},
    "*.fc2": {"weight_bits": 2, "activation_bits": 5},
    "layers.0.*.fc1": {"activation_bits": "float"},
}
FAST = {"scope": "all", "recondition": None}
entries = pytest.mark.parametrize("quantize", ENTRIES.values(), ids=ENTRIES)
torch_entries = pytest.mark.parametrize("quantize", TORCH_ENTRIES.values(), ids=TORCH_ENTRIES)


def images(count=3, size=16):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def assert_equal(found, expected):
    """To the bit."""
    for mine, theirs in ((found.bounds, expected.bounds), (found.learned, expected.learned)):
        assert mine.keys() == theirs.keys()
        for name, pair in theirs.items():
            assert all(map(torch.equal, mine[name], pair)), name
    assert found.weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        assert torch.equal(found.weights[name], weight), name
    if found.report:
        assert list(found.report.items()) == list(expected.report.items())


def assert_close(found, expected):
    """To the rounding of another framework's floats."""
    assert found.bounds.keys() == {
        n for n in expected.bounds if n in found.bounds or not n.endswith(".bias")
    }
    for name, pair in expected.bounds.items():
        for mine, theirs in zip(found.bounds[name], pair, strict=True):
            error = (mine.flatten() - theirs.flatten()).abs()
            assert (error <= 1e-4 * (pair[1] - pair[0]).flatten()).all(), name
    names = {f"{name}.weight" for name in expected.report}
    assert names <= found.weights.keys()
    for name, weight in found.weights.items():
        theirs = expected.weights[name]
        assert (weight.reshape(theirs.shape) - theirs).norm() <= 1e-5 * theirs.norm(), name
    if found.report:
        assert found.report == pytest.approx(expected.report, rel=1e-4)


SETTINGS = [
    ("edsr", {"recondition": CONDITION}),
    ("edsr", {}),
    ("edsr", {"recondition": None}),
    ("edsr", {"weight_bits": 2, "activation_bits": 3, "weight_granularity": "channel"}),
    ("edsr", {"other_bits": 8, "zero_on_grid": True, "activation_side": "symmetric"}),
    ("swinir", {}),
    ("swinir", {"recondition": CONDITION, "weight_bits": 3}),
    ("swinir", {"layers": RULES}),
    ("edsr", {"layers": {"body.0.*": {"weight_bits": 3, "activation_bits": "float"}}}),
    ("dat", {"recondition": CONDITION}),
    ("dat", {}),
]


@pytest.mark.parametrize(("name", "settings"), SETTINGS, ids=str)
def test_all_entries_give_the_same_network(name, settings):
    crops = images(4, SIZES[name])
    settings = {"scope": SCOPES[name], **settings}
    expected = by_network(network(name), crops, **settings, bounds_crops=3)
    unseen = torch.rand(2, 3, 32, 32)
    output = expected.output(unseen)
    for quantize in list(TORCH_ENTRIES.values())[1:]:
        found = quantize(network(name), crops, **settings, bounds_crops=3)
        assert_equal(found, expected)
        assert found.report or not settings.get("recondition", True)
        assert torch.equal(found.output(unseen), output)
    if not {"zero_on_grid", "activation_side"} & settings.keys():
        found = by_training(network(name), crops, **settings, name=name, bounds_crops=3)
        assert_equal(found, expected)
        assert torch.equal(found.output(unseen), output)


@pytest.mark.parametrize("settings", [FAST, {"scope": "all", "recondition": CONDITION}], ids=str)
def test_an_ir_gets_the_bounds_and_weights_of_torch(settings):
    model, crops = network(), images(5, 48)
    found, expected = (ENTRIES[n](model, crops, **settings) for n in ("ir", "network"))
    assert_close(found, expected)
    output = expected.output(crops)
    error = (found.output(crops) - output).norm() / (output - model(crops)).detach().norm()
    assert error < 0.05


def test_defaults_are_the_same():
    crops = images(34, 8)
    crops[32:] *= 3  # bounds are searched on the first 32
    expected = by_network(network(), crops, scope="all")
    pipeline = nncf_host.quantize(network(), nncf.Dataset(list(crops.split(17))))
    brevitas = quantize_sr(network(), crops, scope="all")
    for model in (pipeline, brevitas):
        found = {q.name: q for q in fake_quantizers(model).values()}
        assert found.keys() == expected.learned.keys()
        for name, (lower, upper) in expected.learned.items():
            assert torch.equal(found[name].lower, lower)
            assert torch.equal(found[name].upper, upper)
        parameters = dict(model.named_parameters())
        assert all(torch.equal(parameters[n], w) for n, w in expected.weights.items())


def test_rules_give_single_layers_their_bits():
    model, crops = network("swinir"), images(2)
    for quantize in TORCH_ENTRIES.values():
        found = quantize(model, crops, scope="transformer", recondition=None, layers=RULES)
        bits = precision.layer_bits(found.model)
        assert {bits[n] for n in bits if n.endswith(".qkv")} == {(6, 4)}
        assert {bits[n] for n in bits if n.endswith(".proj")} == {(4, 4)}
        assert not any(n.startswith("layers.1.") and n.endswith("fc1") for n in bits)
        assert {bits[n] for n in bits if n.endswith(".fc1")} == {(4, FLOAT_BITS)}
        # The later rule has the last word.
        assert {bits[n] for n in bits if n.endswith(".fc2")} == {(2, 5)}
        products = precision.product_bits(found.model)
        assert {bits for n, bits in products.items() if n.endswith("0")} == {4}
        assert {bits for n, bits in products.items() if n.endswith("1")} == {3}


def test_float_inputs_beside_quantized_weights():
    rules = {
        "*": {"activation_bits": "float"},
        "*.proj": {"activation_bits": 8},
        "*.qkv": {"weight_bits": "float", "activation_bits": "float"},
    }
    model, crops = network("swinir"), images(2)
    for quantize in TORCH_ENTRIES.values():
        found = quantize(model, crops, scope="transformer", layers=rules)
        bits = precision.layer_bits(found.model)
        assert {bits[n] for n in bits if n.endswith((".fc1", ".fc2"))} == {(4, FLOAT_BITS)}
        assert {bits[n] for n in bits if n.endswith(".proj")} == {(4, 8)}
        assert not any(n.endswith(".qkv") for n in bits)
        # A product has no weight: its factors are floats.
        assert not precision.product_bits(found.model)
        inputs = []
        block = found.model.layers[0].residual_group.blocks[0].mlp.fc1
        block.register_forward_pre_hook(lambda _, args, seen=inputs: seen.append(args[0]))
        found.output(crops)
        assert all(len(x.unique()) > 2**8 for x in inputs)


def test_an_ir_follows_rules():
    rules = {
        "body.0.*": {"weight_bits": 2, "activation_bits": 5},
        "body.0.conv1": {"activation_bits": "float"},
        "body.1.conv1": {"weight_bits": "float", "activation_bits": "float"},
    }
    found = ENTRIES["ir"](network(), images(3, 24), **FAST, layers=rules)
    levels = {
        node.get_friendly_name(): node.get_attributes()["levels"]
        for node in found.model.get_ops()
        if node.get_type_name() == "FakeQuantize"
    }
    assert levels["body.0.conv1.weight"] == levels["body.0.conv2.weight"] == 2**2
    assert "body.0.conv1.input" not in levels
    assert levels["body.0.conv2.input"] == 2**5
    assert levels["body.1.conv2.weight"] == levels["body.1.conv2.input"] == 2**4
    assert "body.1.conv1.weight" not in levels


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            {"*.query": {"weight_bits": 8}},
            r"'\*\.query'\] matches no layer: names are like layers\.0",
        ),
        ({"conv_first": {"weight_bits": 8}}, r"'conv_first'\].* outside scope='transformer'"),
        ({"*": {"weight_bits": 9}}, r"layers\['\*'\]\.weight_bits=9 is not supported"),
        (
            {"*": {"weight_bits": "float"}},
            r"layers\['\*'\] leaves a weight float but not its inputs, .* give activation_bits: float",
        ),
        (
            {
                "*.fc?": {"weight_bits": "float", "activation_bits": "float"},
                "*.fc1": {"activation_bits": 8},
            },
            r"of layers, what is for layers\.0\..*\.fc1 leaves a weight float but not its inputs",
        ),
        ({"*": {"bits": 4}}, "has no bits: give weight_bits or activation_bits"),
        ({"*": 4}, r"layers\['\*'\]=4: give weight_bits"),
        ([("*", 4)], "give rules by pattern"),
        ({"*": {"weight_bits": "float", "activation_bits": "float"}}, "leave everything float"),
    ],
)
def test_rules_that_cannot_be(rules, message):
    for quantize in TORCH_ENTRIES.values():
        with pytest.raises(InputError, match=message):
            quantize(network("swinir"), images(2), scope="transformer", layers=rules)


@entries
@pytest.mark.parametrize(
    ("recondition", "size"), [(None, 48), (CONDITION, 12)], ids=["bounds", "weights"]
)
def test_how_crops_are_batched_makes_no_difference(quantize, recondition, size):
    model, crops = network(), images(5, size)
    layouts = [crops, list(crops), list(crops.split(1))]
    if quantize in (ENTRIES["pipeline"], ENTRIES["ir"]):  # datasets of items of any size
        layouts += [list(crops.split([3, 2])), [crops]]
    expected, *others = (
        quantize(model, layout, scope="all", recondition=recondition) for layout in layouts
    )
    for found in others:
        assert all(
            all(map(torch.equal, found.bounds[name], pair))
            for name, pair in expected.bounds.items()
        )
        assert all(torch.equal(found.weights[n], w) for n, w in expected.weights.items())
        assert found.report == expected.report
        assert found.output(crops).equal(expected.output(crops))


@torch_entries
def test_the_float_network_is_left_as_it_is(quantize):
    model = network()
    model.train()
    model.body[0].eval()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 2 == 0)
        parameter.grad = torch.ones_like(parameter)
    seen = []
    handle = model.body.register_forward_hook(lambda *_: seen.append(1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    types = [type(module) for module in model.modules()]
    result = quantize(model, images(), scope="all", recondition=CONDITION)
    assert [type(module) for module in model.modules()] == types
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert [module.training for module in model.modules()] == modes
    for module in model.modules():
        assert len(module._forward_hooks) == (module is model.body)
        assert not module._forward_pre_hooks
        assert not module._backward_hooks
    assert [p.requires_grad for p in model.parameters()] == [
        index % 2 == 0 for index, _ in enumerate(model.parameters())
    ]
    assert all(p.grad.eq(1).all() for p in model.parameters())
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    ours = [result.model.get_submodule(name) for name, _ in model.named_modules()]
    ours += fake_quantizers(result.model).values()
    assert not any(module.training for module in ours)
    given = dict(model.named_parameters())
    shared = {p.data_ptr() for p in given.values()}
    assert not shared & {p.data_ptr() for p in result.model.parameters()}
    handle.remove()
    weights = dict(result.model.named_parameters())
    assert all(weights[name].requires_grad == p.requires_grad for name, p in given.items())


def test_the_ir_given_is_left_as_it_is():
    model = converted(network(), images())
    before = {name: data.copy() for name, data in constants(model).items()}
    names = [node.get_friendly_name() for node in model.get_ordered_ops()]
    ENTRIES["ir"](model, images(), scope="all")
    assert [node.get_friendly_name() for node in model.get_ordered_ops()] == names
    after = constants(model)
    assert before.keys() == after.keys()
    assert all((after[name] == data).all() for name, data in before.items())
    assert isinstance(model, ov.Model)


@torch_entries
def test_no_hooks_of_the_calibration_are_left_behind(quantize):
    result = quantize(network(), images(), scope="all", recondition=CONDITION).model
    for module in result.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert not any(q.search_on_next_input for q in fake_quantizers(result).values())
    assert all(q.enabled for q in fake_quantizers(result).values())


@torch_entries
@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_gradient_modes_around_change_nothing(quantize, context):
    expected = quantize(network(), images(), scope="all", recondition=CONDITION)
    with context():
        found = quantize(network(), images(), scope="all", recondition=CONDITION)
    assert_equal(found, expected)
    tensors = [*found.model.parameters(), *found.model.buffers()]
    assert not [tensor for tensor in tensors if tensor.is_inference()]
    assert torch.equal(found.output(images()), expected.output(images()))


def refused(quantize, model, crops, words, **settings):
    with pytest.raises(InputError, match=words) as caught:
        quantize(model, crops, **settings)
    assert "\n" not in str(caught.value)


@entries
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(quantize, value):
    model = network()
    with torch.no_grad():
        model.body[1].conv2.weight[0, 0] = value
    refused(quantize, model, images(), r"NaN or Inf in .*body\.1\.conv2", scope="all")


@entries
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_image_that_is_not_finite_is_refused(quantize, value):
    crops = images()
    crops[1, 0, 3, 3] = value
    items = quantize in (ENTRIES["pipeline"], ENTRIES["ir"])
    place = r"the activation of body\.0\.conv1\.input" if items else "the calibration images"
    refused(quantize, network(), crops, f"NaN or Inf in {place}", scope="all")


@entries
def test_no_crops_are_refused(quantize):
    refused(
        quantize,
        network(),
        torch.empty(0, 3, 16, 16),
        "no calibration images|yields nothing",
        **FAST,
    )


@entries
@pytest.mark.parametrize("bits", [1, 9, 4.0, True])
@pytest.mark.parametrize("name", ["weight_bits", "activation_bits", "other_bits"])
def test_bits_outside_2_to_8_are_refused(quantize, name, bits):
    words = f"{name}={bits} is not supported: use an integer from 2"
    refused(quantize, network(), images(), words, scope="all", **{name: bits})


@entries
def test_a_scope_without_layers_is_refused(quantize):
    refused(
        quantize, network(), images(), 'use scope "all" for conv|matches no', scope="transformer"
    )
    refused(quantize, nn.ReLU(), images(), "has no linear layer", scope="all")
    words = "scope='every' is not known: use 'transformer' or 'all'"
    refused(quantize, network(), images(), words, scope="every")


@entries
def test_a_quantized_network_is_refused(quantize):
    model = quantize(network(), images(), **FAST).model
    refused(quantize, model, images(), "quantized already", **FAST)


@entries
@pytest.mark.parametrize("count", [0, -1])
def test_counts_below_one_are_refused(quantize, count):
    words = f"bounds_crops={count}: use at least 1"
    refused(quantize, network(), images(1), words, **FAST, bounds_crops=count)


@pytest.mark.parametrize("entry", [nncf_host.quantize_network, quantize_sr])
def test_batches_of_no_crops_are_refused(entry):
    config = nncf_host.QuantizationConfig(**FAST)
    with pytest.raises(InputError, match="batch_size=0"):
        entry(network(), images(1), config, batch_size=0)
    with pytest.raises(InputError, match="bounds_crops=-1"):
        create_condiquant_pipeline(config, bounds_crops=-1)


def test_a_config_with_layers_left_out_by_nncfs_rules_is_refused():
    config = nncf_host.QuantizationConfig(ignored_scope=nncf.IgnoredScope(types=["conv2d"]))
    with pytest.raises(InputError, match=r"ignored_scope .* use name_blacklist"):
        quantize_sr(build("swinir"), images(), config)
