"""Networks and calls for the tests of the algorithms on both backends."""

import nncf
import numpy as np
import openvino as ov
import torch
from torch import nn

import condiquant_nncf as host
from condiquant_plugin.methods.condiquant.reconditioning import ReconditioningConfig
from networks import build

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "LP_TRANSFORMS_MODE": "NO"}
LINEAR_ON_PIXELS = {"linear", "linear_without_bias", "matmul", "matmul_left", "attention"}
LAYERS = {
    "conv": lambda: nn.Conv2d(8, 12, (3, 5), padding=(1, 2)),
    "conv_square": lambda: nn.Conv2d(8, 8, 3, padding=1),
    "conv_strided": lambda: nn.Conv2d(8, 12, 3, stride=2, dilation=2, bias=False),
    "conv_grouped": lambda: nn.Conv2d(8, 12, 3, padding="same", groups=4),
    "conv_depthwise": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8),
    "conv_transposed": lambda: nn.ConvTranspose2d(8, 6, 4, stride=2, padding=1),
    "conv_transposed_grouped": lambda: nn.ConvTranspose2d(
        8, 12, 3, stride=2, padding=1, output_padding=1, groups=4
    ),
    "linear": lambda: nn.Linear(8, 12),
    "linear_without_bias": lambda: nn.Linear(8, 12, bias=False),
    "matmul": lambda: Product(left=False),
    "matmul_left": lambda: Product(left=True),
    "attention": lambda: Attention(),
}


class Product(nn.Module):
    def __init__(self, left):
        super().__init__()
        self.left = left
        self.weight = nn.Parameter(torch.randn(12, 8) / 3 if left else torch.randn(8, 12) / 3)

    def forward(self, x):
        return (self.weight @ x.transpose(1, 2)).transpose(1, 2) if self.left else x @ self.weight


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 12)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj((3 * q @ k.transpose(1, 2)).softmax(-1) @ v)


class Toy(nn.Module):
    """A convolution, the layer of interest, a convolution."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.first, self.layer = kind, nn.Conv2d(3, 8, 3, padding=1), LAYERS[kind]()
        channels = 12 if kind in LINEAR_ON_PIXELS else self.layer.out_channels
        self.last = nn.Conv2d(channels, 3, 1)

    def forward(self, x):
        x = self.first(x).relu()
        if self.kind in LINEAR_ON_PIXELS:
            tokens = self.layer(x.flatten(2).transpose(1, 2))
            x = tokens.transpose(1, 2).unflatten(2, x.shape[2:])
        else:
            x = self.layer(x)
        return self.last(x.tanh())


def network(name="edsr"):
    """A toy or one of ``networks``, with biases: OpenVINO removes those that are zero."""
    if name == "none":
        return nn.ReLU()
    result = Toy(name) if name in LAYERS else build(name)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter_name, parameter in result.named_parameters():
            if parameter_name.endswith("bias") and parameter.ndim == 1:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return result.eval()


def items(name="edsr", count=3):
    size = 16 if name == "swinir" else 12
    generator = torch.Generator().manual_seed(2)
    return [torch.rand(1, 3, size, size, generator=generator) for _ in range(count)]


def converted(model, name="edsr"):
    return ov.convert_model(model, example_input=items(name)[0])


def advanced(objective=None, **changes):
    settings = objective and ReconditioningConfig(objective=objective, strength=0.02, steps=20)
    return host.AdvancedCondiQuantParameters(recondition=settings, **changes)


def quantize(backend, name, model=None, **arguments):
    """``(network, quantized model, reports)`` of one backend."""
    model = model or network(name)
    reports = []
    data, subject = items(name), model
    if backend == "openvino":
        data, subject = [x.numpy() for x in data], converted(model, name)
    arguments.setdefault("subset_size", 3)
    result = host.quantize(subject, nncf.Dataset(data), reports=reports, **arguments)
    return model, result, reports


def constants(model):
    found = [n for n in model.get_ordered_ops() if n.get_type_name() == "Constant"]
    return {n.get_friendly_name(): n.data for n in found}


def fake_quantizes(model):
    found = [n for n in model.get_ordered_ops() if n.get_type_name() == "FakeQuantize"]
    return {n.get_friendly_name(): n for n in found}


def infer(model, x, **properties):
    return ov.compile_model(model, "CPU", {**EXACT, **properties})([np.asarray(x)])[0]
