"""What can be scaled, in networks that really compute; whether it is exact is asked of the output."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from condiquant_brevitas import quantize_sr
from condiquant_nncf import QuantizationConfig, insert_quantizers, wrap
from condiquant_plugin.layerwise.quantized import computing_floats
from condiquant_plugin.methods.equalization.links import find_links
from networks import build


def names(model, links):
    """``{producer: consumers}`` by the names of their weights."""
    name = {id(p): n.removesuffix(".weight") for n, p in model.named_parameters()}
    return {name[id(link.weight)]: [name[id(c)] for c in link.consumers] for link in links}


class Between(nn.Module):
    """Two layers with a function between them."""

    def __init__(self, function, first=None, second=None):
        super().__init__()
        torch.manual_seed(0)
        self.first = first or nn.Conv2d(3, 8, 3, padding=1)
        self.second = second or nn.Conv2d(8, 3, 3, padding=1)
        self.slopes = nn.Parameter(torch.rand(8))
        self.function = function

    def forward(self, x):
        return self.second(self.function(self, self.first(x)))


HOMOGENEOUS = {
    "nothing": lambda _, x: x,
    "relu": lambda _, x: F.relu(x),
    "relu_": lambda _, x: x.relu_(),
    "leaky": lambda _, x: F.leaky_relu(x, 0.2, inplace=True),
    "prelu": lambda m, x: F.prelu(x, m.slopes),
    "zeros": lambda _, x: F.pad(x, (1, 1, 1, 1)),
    "reflected": lambda _, x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "rolled": lambda _, x: torch.roll(x, (1, 2), (2, 3)),
    "cut": lambda _, x: x[:, :, 1:-1].contiguous().clone(),
    "there and back": lambda _, x: x.flatten(2).transpose(1, 2).permute(0, 2, 1).reshape(x.shape),
}
OTHERS = {
    "ones around": lambda _, x: F.pad(x, (1, 1, 1, 1), value=1.0),
    "gelu": lambda _, x: F.gelu(x),
    "clipped": lambda _, x: F.relu6(x),
    "plus one": lambda _, x: x + 1,
    "read twice": lambda _, x: F.relu(x) + x,
    "gathered": lambda _, x: torch.take_along_dim(x, torch.zeros_like(x, dtype=torch.long), 1),
    "its own slopes": lambda m, x: F.prelu(x, m.first.weight[:, 0, 0, 0]),
    "normed": lambda _, x: F.normalize(x, dim=1),
}


@pytest.mark.parametrize("between", HOMOGENEOUS)
def test_what_lies_between_may_carry_a_factor(between):
    model = Between(HOMOGENEOUS[between]).eval()
    x = torch.rand(2, 3, 12, 12)
    links = find_links(model, x)
    assert names(model, links) == {"first": ["second"]}
    with torch.no_grad():
        before = model(x)
        links[0].scale(torch.rand(8) + 0.5)
        assert torch.allclose(model(x), before, atol=1e-5)


@pytest.mark.parametrize("between", OTHERS)
def test_what_may_not(between):
    model = Between(OTHERS[between]).eval()
    assert find_links(model, torch.rand(2, 3, 12, 12)) == []


class Shared(nn.Module):
    """One norm in front of two layers, as queries and keys of their own have it."""

    def __init__(self, way):
        super().__init__()
        torch.manual_seed(0)
        self.way, self.norm, self.other = way, nn.LayerNorm(4), nn.LayerNorm(4)
        self.query, self.key = nn.Linear(4, 6), nn.Linear(4, 6)
        if way == "tied":
            self.key.weight = self.query.weight

    def forward(self, x):
        y = self.norm(x)
        if self.way == "another reads":
            return self.query(y) + self.key(y) + y.mean()
        if self.way == "fed by another":
            return self.query(y) + self.key(self.other(x)) + self.key(y)
        if self.way == "weight read":
            return self.query(y) + self.key(y) * self.query.weight.sum()
        if self.way == "returned":
            return self.query(y) + self.key(y), y
        return self.query(y) + self.key(y)


@pytest.mark.parametrize("way", ["plain", "tied"])
def test_all_readers_take_the_factor_back(way):
    model, x = Shared(way), torch.rand(2, 5, 4)
    links = find_links(model, x)
    readers = ["query"] if way == "tied" else ["query", "key"]
    assert names(model, links) == {"norm": readers}
    with torch.no_grad():
        before = model(x)
        links[0].scale(torch.tensor([0.5, 2.0, 3.0, 1.0]))
        assert torch.allclose(model(x), before, atol=1e-5)


@pytest.mark.parametrize("way", ["another reads", "fed by another", "weight read", "returned"])
def test_a_reader_that_cannot_leaves_no_link(way):
    assert find_links(Shared(way), torch.rand(2, 5, 4)) == []


@pytest.mark.parametrize("second", [nn.Conv2d(8, 8, 3, groups=8), nn.ConvTranspose2d(8, 3, 3)])
def test_layers_whose_inputs_have_no_column(second):
    assert find_links(Between(lambda _, x: x, second=second), torch.rand(1, 3, 8, 8)) == []


def test_layers_without_a_bias_and_a_norm():
    model = Between(HOMOGENEOUS["nothing"], nn.LayerNorm(3), nn.Linear(3, 5))
    assert names(model, find_links(model, torch.rand(2, 5, 3))) == {"first": ["second"]}
    model = Between(HOMOGENEOUS["relu"], nn.Conv2d(3, 8, 1, bias=False))
    (link,) = find_links(model, torch.rand(2, 3, 5, 5))
    assert len(link.tensors()) == 2


EXPECTED = {
    "compact": {f"body.{i}": [f"body.{i + 2}"] for i in (0, 2, 4, 6)},
    "edsr": {f"body.{i}.conv1": [f"body.{i}.conv2"] for i in (0, 1)},
    "swinir": {
        f"layers.{i}.residual_group.blocks.{j}.norm{k}": [
            f"layers.{i}.residual_group.blocks.{j}.{reader}"
        ]
        for i in (0, 1)
        for j in (0, 1)
        for k, reader in ((1, "attn.qkv"), (2, "mlp.fc1"))
    }
    | {"norm": ["conv_after_body"]},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_links_of_published_networks(name):
    network, x = build(name), torch.rand(1, 3, 16, 16)
    assert names(network, find_links(network, x)) == EXPECTED[name]


@pytest.mark.parametrize("host", ["nncf", "brevitas"])
@pytest.mark.parametrize("name", EXPECTED)
def test_hosts_quantizers_are_no_hindrance(name, host):
    x = torch.rand(4, 3, 16, 16)
    scope = "transformer" if name == "swinir" else "all"
    config = QuantizationConfig(scope=scope, recondition=None, rounding="nearest", equalize=False)
    if host == "nncf":
        wrapped = wrap(build(name), x[:1])
        model = insert_quantizers(wrapped, config.find_layers(wrapped), config)
    else:
        model = quantize_sr(build(name), x, config)
    with computing_floats(model):
        assert names(model, find_links(model, x[:1])) == EXPECTED[name]
