"""Moments of wide 3x3 convolutions, which are not summed over unfolded patches."""

import pytest
import torch

from condiquant_plugin.layerwise import moments, patches
from condiquant_plugin.layerwise.moments import LayerGeometry, MomentSums, moments_of, unfold

GEOMETRY = LayerGeometry("conv", (3, 3), padding=(1, 1))
NARROW = 57  # times 9 is 513


def inputs(count, channels, height, width, mean=3.0, spread=1.0):
    generator = torch.Generator().manual_seed(height * width + count)
    x = mean + spread * torch.randn(count, channels, height, width, generator=generator)
    return x, (x * 2 / spread).round() * spread / 2


def exact(x, q):
    rows, codes = (unfold(each.double(), GEOMETRY)[0] for each in (x, q))
    return {
        "gram": rows.mT @ rows, "total": rows.sum(0),
        "quantized_gram": codes.mT @ codes, "quantized_cross": codes.mT @ rows,
        "quantized_total": codes.sum(0),
    }  # fmt: skip


def assert_exact(found, batches, tolerance=1e-7):
    expected = [exact(x, q) for x, q in batches]
    for name in expected[0]:
        total = sum(each[name] for each in expected)
        assert (getattr(found, name)[0] - total).norm() <= tolerance * total.norm(), name
    assert found.samples == sum(x.shape[0] * x.shape[-2] * x.shape[-1] for x, _ in batches)


@pytest.fixture
def never_unfolded(monkeypatch):
    monkeypatch.setattr(moments, "unfold", None)


@pytest.mark.parametrize(
    "shape",
    [(2, NARROW, 8, 8), (3, NARROW, 9, 13), (1, 64, 16, 8), (9, NARROW, 32, 32), (1, 60, 100, 120)],
)
def test_moments_are_those_of_unfolded_patches(shape, never_unfolded):
    x, q = inputs(*shape)
    assert_exact(moments_of(x, GEOMETRY, q), [(x, q)])
    alone = moments_of(x[:1], GEOMETRY)
    assert torch.equal(alone.gram, moments_of(x[0], GEOMETRY).gram)
    assert alone.quantized_gram is None


def test_batches_of_several_sizes_add_up():
    batches = [inputs(2, NARROW, *size) for size in ((8, 8), (12, 17), (5, 9), (30, 9))]
    sums = MomentSums(GEOMETRY, name="a layer")
    for x, q in batches:
        sums.add(x, q)
    assert_exact(sums.moments(), batches)
    total = None
    for x, q in batches:
        total = moments_of(x, GEOMETRY, q, into=total)
    assert_exact(total, batches)


def test_what_varies_little_around_a_large_mean_keeps_its_digits():
    x, q = inputs(4, NARROW, 16, 16, mean=100, spread=1e-2)
    found, expected = moments_of(x, GEOMETRY, q), exact(x, q)
    inner = torch.arange(4, 9 * NARROW, 9)  # the middle taps see no padding
    for gram, first, second in (
        ("gram", "total", "total"),
        ("quantized_gram", "quantized_total", "quantized_total"),
        ("quantized_cross", "quantized_total", "total"),
    ):
        means = torch.outer(expected[first][inner], expected[second][inner]) / found.samples
        mine, theirs = (
            m[inner][:, inner] - means for m in (getattr(found, gram)[0], expected[gram])
        )
        assert (mine - theirs).norm() <= 1e-4 * theirs.norm(), gram


def test_known_moments_of_floats_are_not_summed_again(monkeypatch):
    x, q = inputs(2, NARROW, 8, 8)
    known = moments_of(x, GEOMETRY, q)
    pairs, create = [], patches.PatchSums
    monkeypatch.setattr(
        patches, "PatchSums", lambda given, *a, **k: pairs.append(given) or create(given, *a, **k)
    )
    for size in ((8, 8), (5, 5)):
        x, q = inputs(2, NARROW, *size)
        known = moments_of(x, GEOMETRY, q)
        sums = MomentSums(GEOMETRY, name="a layer", floats=known)
        sums.add(x, q)
        found = sums.moments()
        assert found.gram is known.gram
        assert found.total is known.total
        assert_exact(found, [(x, q)])
    assert pairs == [[(0, 0), (1, 1), (1, 0)], [(1, 1), (1, 0)]]


@pytest.mark.parametrize(
    ("geometry", "shape"),
    [
        (LayerGeometry("conv", (3, 3), padding=(1, 1), padding_mode="reflect"), (2, NARROW, 9, 9)),
        (LayerGeometry("conv", (3, 3), padding=(0, 0)), (2, NARROW, 9, 9)),
        (LayerGeometry("conv", (3, 3), (2, 2), padding=(1, 1)), (2, NARROW, 9, 9)),
        (LayerGeometry("conv", (3, 3), padding=(2, 2), dilation=(2, 2)), (2, NARROW, 9, 9)),
        (LayerGeometry("conv", (5, 5), padding=(2, 2)), (2, 24, 9, 9)),
        (LayerGeometry("conv", (3, 3), padding=(1, 1), groups=2), (2, 2 * NARROW, 9, 9)),
        (LayerGeometry("conv", (3, 3), padding=(1, 1)), (2, NARROW, 7, 9)),
    ],
)
def test_other_layers_are_unfolded(geometry, shape):
    x, q = inputs(*shape)
    rows, codes = (unfold(each.double(), geometry) for each in (x, q))
    found = moments_of(x, geometry, q)
    for gram, expected in (
        (found.gram, rows.mT @ rows),
        (found.quantized_gram, codes.mT @ codes),
        (found.quantized_cross, codes.mT @ rows),
    ):
        assert (gram - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_inputs_stay_as_they_are(memory_format):
    x, q = (each.to(memory_format=memory_format) for each in inputs(2, NARROW, 8, 8))
    before = x.clone(), q.clone()
    assert_exact(moments_of(x, GEOMETRY, q), [before])
    assert torch.equal(x, before[0])
    assert torch.equal(q, before[1])
