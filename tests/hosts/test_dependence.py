"""Layers that gradients do not reach are quantized as well, as by NNCF."""

import pytest
import torch
from brevitas.nn import QuantConv2d
from torch import nn

import condiquant_nncf
from condiquant_brevitas import quantize_sr
from condiquant_plugin.calls import Dependence


def without_gradient(layer, x):
    with torch.no_grad():
        return layer(x.relu())


def written_into_a_buffer(layer, x):
    buffer = torch.zeros(x.shape)
    buffer[:, :2] = x.detach()[:, :2]
    return layer(buffer)


BREAKS = {
    "no_grad": without_gradient,
    "detach": lambda layer, x: layer(x.relu().detach()),
    "integers": lambda layer, x: layer(torch.sign(x).to(torch.int8).float()),
    "choice": lambda layer, x: layer(torch.zeros(16)[(x > 0).long()] + 1),
    "round": lambda layer, x: layer(x.round()),
    "keyword": lambda layer, x: layer(input=x.detach()),
    "buffer": written_into_a_buffer,
}


class Broken(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.head, self.tail = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)
        self.first, self.layer, self.last, self.table = (nn.Conv2d(4, 4, 1) for _ in range(4))
        self.kind = kind

    def forward(self, x):
        x = self.first(self.head(x))
        x = BREAKS[self.kind](self.layer, x)
        return self.tail(self.last(x) + self.table(torch.ones(1, 4, 1, 1)))


@pytest.mark.parametrize("kind", BREAKS)
def test_both_hosts_take_the_layers_behind_a_break(kind):
    torch.manual_seed(0)
    network, crops = Broken(kind).eval(), torch.rand(2, 3, 8, 8)
    model = quantize_sr(network, crops, scope="all")
    found = {name for name, m in model.named_modules() if isinstance(m, QuantConv2d)}
    assert found == {"first", "layer", "last"}
    if kind == "buffer":
        return  # NNCF's graph ends where a tensor is written into another
    wrapped = condiquant_nncf.wrap(network, crops[:1])
    assert {layer.name for layer in condiquant_nncf.find_layers(wrapped, "all")} == found


def test_attention_by_keywords_in_any_order():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            x = self.head(x)
            mask = torch.zeros(8, 8)
            attend = nn.functional.scaled_dot_product_attention
            return attend(attn_mask=mask, value=x, key=x, query=x)[:, :3]

    model = quantize_sr(Attention().eval(), torch.rand(2, 3, 8, 8))
    assert any("product_stubs" in name for name, _ in model.named_modules())


def test_what_depends_on_a_tensor():
    x, other = torch.ones(2, 3), torch.ones(2, 3)
    with Dependence() as followed:
        followed.start(x)
        reached = [x.view(-1), x + other, other.clone().mul_(x), x.detach().sign().long()]
        apart = [other, other + 1, torch.zeros(x.shape), x.shape, None]
    assert all(map(followed.reaches, reached))
    assert not any(map(followed.reaches, apart))
