import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from condiquant_plugin import InputError
from condiquant_plugin.layerwise.blocks import module_geometry
from condiquant_plugin.layerwise.moments import (
    LayerGeometry,
    _add_product,
    moments_of,
    no_moments,
    unfold,
    weight_from_matrix,
    weight_matrix,
)

LAYERS = {
    "linear": (nn.Linear(6, 5, bias=False), (2, 7, 6)),
    "linear 4-d": (nn.Linear(6, 5, bias=False), (2, 3, 7, 6)),
    "conv": (nn.Conv2d(4, 6, 3, padding=1, bias=False), (2, 4, 7, 8)),
    "conv strided dilated": (
        nn.Conv2d(4, 6, (3, 2), (2, 1), (2, 1), (2, 1), bias=False),
        (2, 4, 9, 8),
    ),
    "conv grouped": (nn.Conv2d(4, 6, 3, groups=2, bias=False), (2, 4, 7, 8)),
    "conv depthwise": (nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), (2, 4, 7, 8)),
    "conv reflect": (
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", bias=False),
        (2, 4, 7, 8),
    ),
    "conv circular": (
        nn.Conv2d(4, 6, 3, padding=(1, 0), padding_mode="circular", bias=False),
        (2, 4, 7, 8),
    ),
    "conv unbatched": (nn.Conv2d(4, 6, 3, bias=False), (4, 7, 8)),
    "transposed": (nn.ConvTranspose2d(4, 6, 4, 2, 1, bias=False), (2, 4, 5, 6)),
    "transposed grouped": (
        nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2, dilation=2, bias=False),
        (2, 4, 5, 6),
    ),
    "conv 1-d": (nn.Conv1d(4, 6, 3, 2, 1, groups=2, bias=False), (2, 4, 9)),
    "conv 3-d": (
        nn.Conv3d(4, 6, (2, 3, 1), (1, 2, 1), (1, 0, 0), (1, 2, 1), groups=2, bias=False),
        (2, 4, 3, 8, 5),
    ),
    "conv 3-d replicate": (
        nn.Conv3d(4, 6, 3, padding=(0, 1, 2), padding_mode="replicate", bias=False),
        (2, 4, 4, 5, 6),
    ),
    "transposed 1-d": (nn.ConvTranspose1d(4, 6, 3, 2, 1, 1, groups=2, bias=False), (2, 4, 5)),
    "transposed 3-d": (
        nn.ConvTranspose3d(4, 6, (2, 3, 4), (1, 2, 3), (0, 1, 2), (0, 1, 2), bias=False),
        (2, 4, 3, 4, 5),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_unfolded_product_is_the_layer(name):
    module, shape = LAYERS[name]
    x, geometry = torch.randn(shape), module_geometry(module)
    rows = unfold(x, geometry)
    product = rows @ weight_matrix(module.weight, geometry).mT
    expected = module(x[None]) if name == "conv unbatched" else module(x)
    if geometry.kind != "linear":
        expected = expected.flatten(2).mT.reshape(-1, expected.shape[1])
    expected = expected.reshape(-1, geometry.groups, product.shape[-1]).transpose(0, 1)
    torch.testing.assert_close(product, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "module"),
    [("conv", nn.Conv2d(4, 6, 1)), ("conv_transpose", nn.ConvTranspose2d(4, 6, 1))],
)
def test_a_geometry_is_by_default_that_of_the_layer_by_default(kind, module):
    assert LayerGeometry(kind) == module_geometry(module)


@pytest.mark.parametrize("name", LAYERS)
def test_weight_matrix_round_trip(name):
    module, _ = LAYERS[name]
    geometry = module_geometry(module)
    matrix = weight_matrix(module.weight, geometry)
    assert torch.equal(weight_from_matrix(matrix, module.weight, geometry), module.weight)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 7), st.sampled_from(sorted(LAYERS)))
def test_moments_add_up_over_batches(seed, cut, name):
    module, shape = LAYERS[name]
    if name == "conv unbatched":
        return
    geometry = module_geometry(module)
    x = torch.randn((8, *shape[1:]), generator=torch.Generator().manual_seed(seed))
    q = x.round()
    whole = moments_of(x, geometry, q)
    parts = moments_of(x[:cut], geometry, q[:cut]) + moments_of(x[cut:], geometry, q[cut:])
    for field in ("gram", "total", "quantized_gram", "quantized_cross", "quantized_total"):
        found, expected = getattr(parts, field), getattr(whole, field)
        assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert parts.samples == whole.samples


def test_moments_of_many_samples_keep_float64_accuracy():
    x = torch.randn(200_000, 3, generator=torch.Generator().manual_seed(0)) + 10
    exact = x.double().T @ x.double()
    torch.testing.assert_close(moments_of(x, LayerGeometry()).gram[0], exact, rtol=1e-6, atol=0)


def test_what_varies_little_around_a_large_mean_keeps_its_digits():
    generator = torch.Generator().manual_seed(0)
    x, q = (100 + 1e-2 * torch.randn(9000, 8, generator=generator) for _ in "xq")
    found = moments_of(x, LayerGeometry("linear"), q)
    x, q = x.double(), q.double()
    for gram, total, (a, b) in (
        (found.gram, found.total, (x, x)),
        (found.quantized_gram, found.quantized_total, (q, q)),
        (found.quantized_cross, found.quantized_total, (q, x)),
    ):
        mean = total / len(x)
        covariance = gram[0] - len(x) * mean.mT @ (found.total if b is x else total) / len(x)
        expected = (a - a.mean(0)).mT @ (b - b.mean(0))
        assert (covariance - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_activations_name_the_layer(value):
    x = torch.ones(3, 4)
    x[1, 2] = value
    with pytest.raises(InputError, match=r"input of body\.0\.fc1"):
        moments_of(x, LayerGeometry(), name="body.0.fc1")


def test_padding_of_a_convolution_enters_the_gram_matrix():
    x = torch.ones(1, 1, 2, 2)
    padded = moments_of(x, LayerGeometry("conv", (3, 3), padding=(1, 1))).gram[0]
    direct = F.unfold(F.pad(x, (1, 1, 1, 1)), 3)[0]
    assert torch.equal(padded, (direct @ direct.T).double())


@pytest.mark.parametrize("quantized", [False, True])
def test_no_moments_add_nothing(quantized):
    x, weight = torch.randn(5, 6), torch.randn(3, 6)
    seen = moments_of(x, LayerGeometry(), x.round() if quantized else None)
    total = seen + no_moments(weight, LayerGeometry(), quantized=quantized)
    assert total.samples == 5
    assert torch.equal(total.gram, seen.gram)
    assert (total.quantized_gram is not None) == quantized


@pytest.mark.parametrize("features", [511, 512, 514])
def test_gram_matrices_of_wide_layers_are_those_of_one_product(features):
    x = torch.randn(2, 70, features, generator=torch.Generator().manual_seed(0))
    found = torch.zeros(2, features, features, dtype=torch.float64)
    _add_product(found, None, x, x)
    torch.testing.assert_close(found, x.double().mT @ x.double(), rtol=1e-5, atol=1e-4)


def test_totals_are_exact_whatever_the_mean():
    x = torch.randn(4096, 6, generator=torch.Generator().manual_seed(0)) + 0.3
    expected = x.double().sum(0)
    torch.testing.assert_close(
        moments_of(x, LayerGeometry()).total[0], expected, rtol=1e-12, atol=0
    )
