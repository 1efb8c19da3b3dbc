"""One config gives one network, whichever entry point calibrates it."""

import nncf
import pytest
import torch

import condiquant_nncf as nncf_host
from condiquant_brevitas import quantize_sr
from condiquant_nncf.quantize import create_condiquant_pipeline
from condiquant_plugin import InputError, fake_quantizers
from condiquant_plugin.methods.condiquant.reconditioning import ReconditioningConfig
from networks import build

CASES = {
    "edsr": ("all", 40),
    "swinir": ("transformer", 24),
    "dat": ("transformer", 32),
}
COUNT, BOUNDS_CROPS = 7, 5
STUBS = ".product_stubs."
"""Where Brevitas keeps the quantizers of the factors of a product."""


def images(name):
    size = CASES[name][1]  # some layers have more values than there is room for in a sample
    return torch.rand(COUNT, 3, size, size, generator=torch.Generator().manual_seed(0))


def pipeline(name, config, sizes):
    """By NNCF's pipeline, from items of these numbers of images."""
    crops = images(name)
    steps = create_condiquant_pipeline(config, subset_size=COUNT, bounds_crops=BOUNDS_CROPS)
    data = nncf.Dataset(list(crops.split(sizes)))
    return steps.run(nncf_host.wrap(build(name), crops[:1]), data).model


def assert_same(found, expected):
    mine, theirs = (
        {q.name.replace(STUBS, "/matmul/"): q for q in fake_quantizers(m).values()}
        for m in (found, expected)
    )
    assert mine.keys() == theirs.keys()
    for name, quantizer in theirs.items():
        for bound in ("lower", "upper"):
            error = (getattr(mine[name], bound) - getattr(quantizer, bound)).abs()
            assert (error <= 1e-6 * (quantizer.upper - quantizer.lower)).all(), name
    named = dict(found.named_parameters())
    weights = {n: p for n, p in expected.named_parameters() if n.endswith(("weight", "bias"))}
    assert weights.keys() <= named.keys()
    for name, weight in weights.items():
        assert (named[name] - weight).norm() <= 1e-6 * weight.norm(), name


@pytest.mark.parametrize(
    ("name", "objective"),
    [
        ("edsr", "condition"),
        ("edsr", "least_squares"),
        ("swinir", "least_squares"),
        ("dat", "condition"),
    ],
)
def test_all_entry_points_give_the_same_network(name, objective):
    settings = ReconditioningConfig(objective=objective, steps=20)
    config = nncf_host.QuantizationConfig(scope=CASES[name][0], recondition=settings)
    expected = nncf_host.quantize_network(
        build(name), images(name), config, bounds_crops=BOUNDS_CROPS
    ).model
    assert_same(pipeline(name, config, [1] * COUNT), expected)
    assert_same(pipeline(name, config, [3, 4]), expected)
    by_brevitas = quantize_sr(
        build(name),
        images(name),
        scope=CASES[name][0],
        reconditioning=settings,
        bounds_crops=BOUNDS_CROPS,
    )
    assert_same(by_brevitas, expected)


def test_defaults_are_the_same():
    crops = torch.rand(34, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    crops[32:] *= 3  # bounds are searched on the first 32
    config = nncf_host.QuantizationConfig(scope="all")
    expected = nncf_host.quantize_network(build("edsr"), crops, config).model
    assert_same(nncf_host.quantize(build("edsr"), nncf.Dataset(list(crops.split(17)))), expected)
    assert_same(quantize_sr(build("edsr"), crops, scope="all"), expected)


def test_a_config_with_layers_left_out_by_nncfs_rules_is_refused():
    config = nncf_host.QuantizationConfig(ignored_scope=nncf.IgnoredScope(types=["conv2d"]))
    with pytest.raises(InputError, match=r"ignored_scope .* use name_blacklist"):
        quantize_sr(build("swinir"), images("swinir"), config)
