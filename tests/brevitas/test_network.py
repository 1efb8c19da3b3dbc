"""The whole Brevitas flow on unpatched super-resolution networks, against the NNCF path."""

import pickle
from copy import deepcopy
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from brevitas import nn as qnn
from torch import nn

import condiquant_nncf as nncf_host
from condiquant_brevitas import condiquant_mode, feature_blocks, quantize_sr, trainable_weights
from condiquant_brevitas.layers import find_layers
from condiquant_brevitas.products import ProductOperand, insert_stubs
from condiquant_plugin import InputError, fake_quantizers
from condiquant_plugin.distillation import DistillationConfig, distill
from condiquant_plugin.methods.condiquant.reconditioning import ReconditioningConfig
from networks import build

SCOPES = {"swinir": "transformer", "dat": "transformer", "edsr": "all"}
PAPER = ReconditioningConfig("condition", strength=0.02, steps=20)


@cache
def network(name):
    return build(name)


def crops(name, count=3):
    size = 32 if name == "dat" else 16
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@cache
def quantized(name):
    """Do not change it."""
    return quantize_sr(network(name), crops(name), scope=SCOPES[name])


@torch.no_grad()
def computed(model, x):
    return model(x)


@pytest.mark.parametrize(("name", "products"), [("swinir", 8), ("dat", 6), ("edsr", 0)])
def test_stubs_leave_the_float_output_as_it_is_to_the_bit(name, products):
    model = deepcopy(network(name))
    layers = find_layers(model, crops(name)[:1], SCOPES[name])
    insert_stubs(model, [layer.product for layer in layers if layer.product])
    assert sum(isinstance(m, ProductOperand) for m in model.modules()) == 2 * products
    assert model.state_dict().keys() == network(name).state_dict().keys()
    for image in (crops(name), torch.rand(1, 3, 32, 32)):
        assert torch.equal(computed(model, image), computed(network(name), image))


@pytest.mark.parametrize("name", SCOPES)
def test_disabled_quantizers_leave_the_float_output_as_it_is_to_the_bit(name):
    images = crops(name)
    before = deepcopy(network(name).state_dict())
    settings = {"scope": SCOPES[name], "reconditioning": None, "rounding": "nearest"}
    model = quantize_sr(network(name), images, **settings)
    expected = computed(network(name), images)
    assert not torch.equal(computed(model, images), expected)
    for quantizer in fake_quantizers(model).values():
        quantizer.enabled = False
    assert torch.equal(computed(model, images), expected)
    for key, value in network(name).state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize(
    ("name", "scope"),
    [("swinir", "transformer"), ("dat", "transformer"), ("dat", "all"), ("edsr", "all")],
)
def test_the_same_layers_as_through_nncf(name, scope):
    image = crops(name)[:1]
    ours = find_layers(network(name), image, scope, others=True)
    theirs = nncf_host.find_layers(nncf_host.wrap(network(name), image), scope, others=True)
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.name == other.name or (one.product and other.weight_name is None)
        assert one.in_scope == other.in_scope


def test_copies_and_saved_states_compute_the_same():
    model, images = quantized("swinir"), crops("swinir")
    expected = computed(model, images)
    copied = deepcopy(model)
    assert torch.equal(computed(copied, images), expected)
    assert copied.report == model.report
    loaded = quantize_sr(network("swinir"), 0.5 * images[:1], reconditioning=None)
    assert not torch.equal(computed(loaded, images), expected)
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(computed(loaded, images), expected)
    for quantizer in fake_quantizers(copied).values():
        quantizer.enabled = False
    assert not torch.equal(computed(copied, images), expected)
    assert torch.equal(computed(model, images), expected)


@pytest.mark.parametrize("name", ["swinir", "edsr", "fused"])
def test_pickling(name):
    images = torch.rand(2, 3, 4, 4) if name == "fused" else crops(name)
    model = quantize_sr(Outer(name), images) if name == "fused" else deepcopy(quantized(name))
    loaded = pickle.loads(pickle.dumps(model))
    for copied in (loaded, deepcopy(loaded)):
        assert torch.equal(computed(copied, images), computed(model, images))
        assert copied.report == model.report
    saved = [p.clone() for p in model.parameters()]
    for one in (loaded, model):
        with torch.no_grad(), condiquant_mode(one, strength=0.1) as mode:
            mode.model(images)
            mode.update()
        assert torch.equal(computed(loaded, images), computed(model, images)) == (one is model)
    assert not all(torch.equal(*pair) for pair in zip(saved, model.parameters(), strict=True))


def test_inference_mode():
    with torch.inference_mode():
        torch.manual_seed(0)
        own, images = Outer("fused"), torch.rand(4, 3, 4, 4)
        model = quantize_sr(own, images)
    torch.manual_seed(0)
    expected = quantize_sr(Outer("fused"), images.clone())
    assert torch.equal(computed(model, images), computed(expected, images))
    assert not [t for t in (*model.parameters(), *model.buffers()) if t.is_inference()]


def test_tracing():
    image = torch.rand(2, 3, 4, 4)
    model = quantize_sr(Outer(), image)
    with torch.no_grad():
        traced = torch.jit.trace(model, image, check_trace=False)
    assert torch.equal(computed(traced, image), computed(model, image))


def test_other_sizes():
    assert computed(quantized("swinir"), torch.rand(1, 3, 24, 40)).shape == (1, 3, 48, 80)


def test_distillation_trains_bounds_and_weights():
    teacher, images = network("swinir"), crops("swinir", 8)
    model = quantize_sr(teacher, images[:6], weight_bits=2, activation_bits=2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    result = distill(
        model, teacher, images[:6], images[6:],
        DistillationConfig(iterations=10, validate_every=2, feature_weight=0.01),
        trainable_weights=trainable_weights(model), blocks=feature_blocks(model),
    )  # fmt: skip
    assert result.best_loss < 0.99 * result.initial_loss
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    bounds = {n for n in before if n.endswith((".lower", ".upper"))}
    weights = {f"{layer}.{kind}" for layer in model.report for kind in ("weight", "bias")}
    assert len(moved & bounds) > 0.9 * len(bounds)
    assert moved - bounds == weights


def test_blacklisted_layers_stay_float():
    blacklist = ["layers.0", "layers.1.residual_group.blocks.0.attn.product_stubs.1"]
    model = quantize_sr(network("swinir"), crops("swinir"), name_blacklist=blacklist)
    named = {quantizer.name for quantizer in fake_quantizers(model).values()}
    assert not [name for name in named if name.startswith("layers.0.")]
    in_block = [name for name in named if name.startswith("layers.1.residual_group.blocks.0.attn")]
    assert len(in_block) == 6  # qkv, proj and one of two products
    assert type(model.layers[0].residual_group.blocks[0].mlp.fc1) is nn.Linear


class Attention(nn.Module):
    """One attention on 8 channels, its products computed in many ways."""

    def __init__(self, way):
        super().__init__()
        self.way, self.qkv, self.proj = way, nn.Linear(8, 24), nn.Linear(8, 8)
        self.table = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        q, k, v = self.qkv(x @ self.table).chunk(3, -1)
        if self.way == "fused":
            return self.proj(F.scaled_dot_product_attention(q, k, value=v))
        if self.way == "einsum":
            scores = torch.einsum("b i c, b j c -> b i j", q, k).softmax(-1)
            gated = torch.einsum("bic,bjc->bijc", q, k).mean((1, 3))[..., None]  # not a product
            return self.proj(torch.einsum("bij,bjc->bic", scores, v + gated))
        if self.way == "bmm":
            return self.proj(torch.bmm(q.bmm(mat2=k.mT).softmax(-1), v))
        scores = torch.matmul(q, other=k.mT) if self.way == "matmul" else q @ k.mT
        return self.proj(scores.softmax(-1).matmul(v))


class Outer(nn.Module):
    """A network whose blocks hold products next to a module with products of its own."""

    def __init__(self, way="@"):
        super().__init__()
        self.embed, self.inner, self.last = nn.Linear(3, 8), Attention(way), nn.Linear(8, 3)

    def forward(self, x):
        x = self.embed(x.flatten(2).mT)
        x = x + (x @ x.mT) @ self.inner(x) + (x @ x.mT).softmax(-1) @ x
        return self.last(x).mT.unflatten(2, (4, 4))


@pytest.mark.parametrize("way", ["@", "matmul", "bmm", "einsum", "fused"])
def test_products_in_all_ways_of_writing_them(way):
    torch.manual_seed(0)
    model, images = Outer(way), torch.rand(4, 3, 4, 4)
    result = quantize_sr(model, images, weight_bits=8, activation_bits=8)
    named = {q.name: q for q in fake_quantizers(result).values() if q.kind == "operand"}
    inner = {name for name in named if name.startswith("inner.product_stubs")}
    assert len(inner) == 4
    assert {name.rpartition(".")[0] for name in named.keys() - inner} == {
        f"product_stubs.{index}" for index in range(4)
    }
    seen = []
    for quantizer in fake_quantizers(result).values():
        quantizer.register_forward_hook(lambda module, *_: seen.append(module))
    with torch.no_grad():
        error = result(images) - model(images)
    assert len(seen) == len(set(seen)) == len(fake_quantizers(result))
    assert error.norm() < 0.05 * computed(model, images).norm()
    for quantizer in fake_quantizers(result).values():
        quantizer.enabled = False
    weights = {n: p for n, p in result.named_parameters() if n in dict(model.named_parameters())}
    expected = torch.func.functional_call(model, weights, images)
    torch.testing.assert_close(result(images), expected, rtol=0, atol=1e-5)


def test_products_in_hooks_and_behind_errors_are_not_the_networks():
    images = torch.rand(4, 3, 4, 4)
    result = quantize_sr(Outer(), images)
    expected = computed(result, images)
    hook = result.inner.qkv.register_forward_pre_hook(lambda _, x: (x[0] @ x[0].mT, None)[1])
    assert torch.equal(computed(result, images), expected)
    hook.remove()
    with pytest.raises(RuntimeError):
        result(torch.rand(1, 5, 4, 4))
    matrix = torch.rand(1, 16, 8)
    assert torch.equal(matrix @ matrix.mT, torch.matmul(matrix, matrix.mT))
    assert torch.equal(computed(result, images), expected)


class Twice(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.tied = tied
        if tied:
            self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x)) if self.tied else self.first(self.first(x))


@pytest.mark.parametrize(
    ("arguments", "settings", "words"),
    [
        (("swinir",), {"name_blacklist": ["layers"]}, "check name_blacklist"),
        (("swinir",), {"name_blacklist": ["nowhere"]}, "no module 'nowhere' in SwinIR"),
        (("swinir",), {"weight_granularity": "row"}, "weight_granularity='row' is not known"),
        (("swinir",), {"reconditioning": "paper"}, "reconditioning='paper' is not known"),
        (("swinir",), {"bits": 4}, "bits is no key of the quantization: use weight_bits"),
        (("swinir",), {"bounds_inputs": "quantized"}, 'bounds_inputs="quantized" is for NNCF'),
        (
            ("swinir",),
            {"transform": "alignment"},
            "transform='alignment' is for NNCF's quantize_network",
        ),
        (("swinir",), {"softmax_scale": "row"}, "softmax_scale='row' is for NNCF's"),
        ((Twice(),), {}, "first is used more than once"),
        ((Twice(tied=True),), {}, "first is used more than once"),
        (("swinir", torch.rand(16, 16)), {}, r"shape \(16, 16\): give \(count, channels"),
    ],
)
def test_bad_input(arguments, settings, words):
    model, *images = arguments
    if isinstance(model, str):
        model = network(model)
    images = images[0] if images else torch.rand(2, 3, 16, 4 if isinstance(model, Twice) else 16)
    with pytest.raises(InputError, match=words) as caught:
        quantize_sr(model, images, **settings)
    assert "\n" not in str(caught.value)


def test_networks_quantized_by_brevitas_are_refused():
    with pytest.raises(InputError, match="quantized already: give the float network"):
        quantize_sr(nn.Sequential(qnn.QuantReLU()), crops("swinir"))
