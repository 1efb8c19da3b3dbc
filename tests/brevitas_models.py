"""Toy models over all layer types, after Brevitas' own tests/brevitas/graph."""

import torch
import torch.nn.functional as F
from torch import nn

from condiquant_brevitas import condiquant_mode

LAYERS = {
    "linear 2-d": (lambda: nn.Linear(12, 8), (40, 12)),
    "linear 3-d": (lambda: nn.Linear(12, 8), (2, 30, 12)),
    "linear 4-d": (lambda: nn.Linear(12, 8), (2, 5, 7, 12)),
    "conv1d": (lambda: nn.Conv1d(4, 10, 3, 2, 1), (2, 4, 30)),
    "conv2d": (lambda: nn.Conv2d(4, 10, 3, padding=1), (2, 4, 9, 8)),
    "conv2d dilated": (lambda: nn.Conv2d(4, 10, 3, dilation=2), (2, 4, 12, 9)),
    "conv2d grouped": (lambda: nn.Conv2d(4, 10, 3, groups=2), (2, 4, 9, 8)),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (2, 4, 9, 8)),
    "conv2d reflect": (
        lambda: nn.Conv2d(4, 10, 3, padding=1, padding_mode="reflect"),
        (2, 4, 5, 6),
    ),
    "conv2d circular": (
        lambda: nn.Conv2d(4, 10, 3, padding=(1, 0), padding_mode="circular"),
        (2, 4, 5, 6),
    ),
    "conv2d same, even kernel": (lambda: nn.Conv2d(4, 10, 2, padding="same"), (2, 4, 5, 6)),
    "conv2d unbatched": (lambda: nn.Conv2d(4, 10, 3, padding=1), (4, 9, 8)),
    "conv3d": (lambda: nn.Conv3d(3, 8, (2, 3, 1), (1, 2, 1), (0, 1, 0)), (2, 3, 4, 6, 5)),
    "conv transposed 1-d": (lambda: nn.ConvTranspose1d(8, 4, 3, 2, 1, 1), (2, 8, 20)),
    "conv transposed 2-d": (lambda: nn.ConvTranspose2d(8, 4, 3, 2, 1), (2, 8, 6, 7)),
    "conv transposed grouped": (
        lambda: nn.ConvTranspose2d(8, 6, 3, 2, 1, 1, groups=2),
        (2, 8, 6, 7),
    ),
    "conv transposed 3-d": (lambda: nn.ConvTranspose3d(6, 4, 2, 2), (2, 6, 3, 4, 5)),
}


class Toy(nn.Module):
    """Two layers in a row, the first of the kind under test."""

    def __init__(self, layer: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.layer = layer
        with torch.no_grad():
            columns = layer(torch.zeros(shape)).shape[-1]
        self.head = nn.Linear(columns, 5)

    def forward(self, x):
        return self.head(torch.relu(self.layer(x)))


class FusedAttention(nn.Module):
    """Attention between convolutions, fused or written out."""

    def __init__(self, arguments, fused=True):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 1)
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.arguments, self.fused = arguments, fused

    def forward(self, x):
        x = self.first(x)
        q, k, v = self.qkv(x.flatten(2).transpose(1, 2)).chunk(3, -1)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, **self.arguments)
        else:
            y = ((q * 8**-0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.last((x + self.proj(y).transpose(1, 2).unflatten(2, x.shape[2:])).tanh())


def toy(name: str) -> tuple[Toy, torch.Tensor]:
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    return Toy(build(), shape).eval(), torch.randn(shape)


def recondition(model, *batches, **settings):
    with condiquant_mode(model, **settings) as mode:
        for _ in range(mode.num_layers):
            for batch in batches:
                mode.model(batch)
            mode.update()
    return mode


def assert_hooks_gone(model):
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def assert_clean(model):
    assert_hooks_gone(model)
    assert "forward" not in model.__dict__
