import pytest
import torch
from torch import nn

from condiquant_plugin.layerwise.collecting import Collector, share_equal
from condiquant_plugin.layerwise.moments import LayerGeometry, moments_of

NAMES = ("query", "key", "value")


def collector(width=6, quantized=False):
    layers = {name: nn.Linear(width, 4) for name in NAMES}
    geometries = dict.fromkeys(NAMES, LayerGeometry())
    return Collector(layers, geometries, dtype=torch.float64, quantized=quantized)


def assert_moments(found, inputs, codes=None):
    codes = codes or [None] * len(inputs)
    expected = [moments_of(x, LayerGeometry(), q) for x, q in zip(inputs, codes, strict=True)]
    total = sum(expected[1:], expected[0])
    assert found.samples == total.samples
    for field in ("gram", "total", "quantized_gram", "quantized_cross", "quantized_total"):
        mine, theirs = getattr(found, field), getattr(total, field)
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


def test_layers_share_a_tensor_in_any_batch_they_like():
    found = collector()
    inputs = {name: [] for name in NAMES}
    for batch, groups in enumerate(("aab", "abb", "abc", "aaa", "aba")):
        tensors = {letter: torch.randn(3 + batch, 6) for letter in "abc"}
        found.next_batch(18 + 6 * batch)
        for name, letter in zip(NAMES, groups, strict=True):
            inputs[name].append(tensors[letter])
            found.add(name, tensors[letter])
    for name in NAMES:
        assert_moments(found.moments[name], inputs[name])


def test_codes_are_of_one_layer_each():
    found = collector(quantized=True)
    batches = [torch.randn(5, 6) for _ in range(3)]
    for x in batches:
        found.next_batch(x.numel())
        for step, name in enumerate(NAMES, 1):
            found.add(name, x, x.mul(step).round())
    for step, name in enumerate(NAMES, 1):
        assert_moments(found.moments[name], batches, [x.mul(step).round() for x in batches])


def test_equal_gram_matrices_are_one():
    found = collector()
    for _ in range(2):
        x, other = torch.randn(5, 6), torch.randn(5, 6)
        found.next_batch(30)
        for name, given in zip(NAMES, (x, x, other), strict=True):
            found.add(name, given)
    share_equal(found.moments)
    assert found.moments["query"] is found.moments["key"]
    assert found.moments["value"] is not found.moments["key"]
    assert list(found.moments) == list(NAMES)


def test_inputs_of_equal_sums_share_nothing():
    found = collector()
    x = torch.arange(12.0).view(2, 6)
    found.next_batch(12)
    found.add("query", x)
    found.add(
        "key", torch.stack([torch.cat([x[0, :3], x[1, 3:]]), torch.cat([x[1, :3], x[0, 3:]])])
    )
    share_equal(found.moments)
    assert torch.equal(found.moments["query"].total, found.moments["key"].total)
    assert found.moments["query"] is not found.moments["key"]


@pytest.mark.parametrize(("parts", "ends"), [(1, 3), (2, 6)])
def test_a_batch_is_over_when_every_layer_saw_its_share(parts, ends):
    found = collector()
    found.next_batch(12)
    for name in NAMES:
        found.add(name, torch.randn(2, 6))
        assert not found.has_all  # the first batch says how much there is
    found.next_batch(24)
    seen = []
    for _ in range(parts):
        for name in NAMES:
            found.add(name, torch.randn(4 // parts, 6))
            seen.append(found.has_all)
    assert seen.index(True) == ends - 1


def test_a_batch_is_not_over_while_a_layer_was_never_called():
    found = collector()
    for _ in range(2):
        found.next_batch(12)
        found.add("query", torch.randn(2, 6))
        found.add("key", torch.randn(2, 6))
        assert not found.has_all
