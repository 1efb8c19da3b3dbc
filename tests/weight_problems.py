"""Layers with correlated inputs, as those of trained networks, for methods that store few bits."""

import torch

from condiquant_plugin.layerwise.moments import LayerGeometry, moments_of
from condiquant_plugin.layerwise.problem import LayerProblem

GEOMETRIES = {
    "linear": (LayerGeometry(), (24, 16), (60, 16)),
    "tall": (LayerGeometry(), (12, 32), (90, 32)),
    "grouped": (LayerGeometry("conv", (2, 2), groups=2), (12, 4, 2, 2), (2, 8, 7, 7)),
}


def matrices(seed, rows=12, features=16, samples=None):
    """A weight ``(1, rows, features)`` and the Gram matrix of inputs, float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples or 3 * features, features, generator=generator, dtype=torch.float64)
    x = x.cumsum(1)
    weight = torch.randn(1, rows, features, generator=generator, dtype=torch.float64)
    return weight, (x.mT @ x / len(x))[None]


def mask_of(seed, rows=12, features=16):
    generator = torch.Generator().manual_seed(seed + 1)
    return (torch.rand(1, rows, features, generator=generator) < 0.6).double()


def problem(kind="linear", seed=0, name="layer", bias=False):
    geometry, weight_shape, input_shape = GEOMETRIES[kind]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(input_shape, generator=generator).cumsum(1)
    weight = torch.randn(weight_shape, generator=generator)
    offset = torch.randn(len(weight), generator=generator) if bias else None
    return LayerProblem(name, weight, offset, moments_of(x, geometry), geometry)
