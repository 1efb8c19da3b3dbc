import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from condiquant_nncf import QuantizationConfig, insert_quantizers, quantize_network, wrap
from condiquant_nncf.network import quantized_layers
from condiquant_plugin import InputError
from condiquant_plugin.calibration import fidelity_in_db
from condiquant_plugin.layerwise.quantized import computing_floats
from condiquant_plugin.methods.equalization.links import Link
from condiquant_plugin.methods.equalization.scaling import (
    Scaling,
    equalize,
    factors_of,
    find_scalings,
)
from networks import build, skewed


def crops(count=9, size=16):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def quantized(network, images, **changes):
    config = QuantizationConfig(scope="all", **changes)
    wrapped = wrap(network, images[:1])
    layers = config.find_layers(wrapped)
    model = insert_quantizers(wrapped, layers, config)
    return model, quantized_layers(model, layers)


@given(
    st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=9), st.sampled_from([0, 0.25, 0.5, 0.75, 1])
)
def test_factors_are_powers_with_a_mean_of_one(ranges, exponent):
    ranges = torch.tensor(ranges, dtype=torch.float64)
    factors = factors_of(ranges, exponent)
    assert float(factors.log().mean()) == pytest.approx(0, abs=1e-9)
    used = ranges >= 1e-2 * ranges.median()
    ratio = (factors / ranges**exponent)[used]
    assert torch.allclose(ratio, ratio[:1].expand_as(ratio))
    assert bool((factors > 0).all())


def test_channels_never_used_get_a_factor():
    assert factors_of(torch.zeros(4), 1.0).isfinite().all()
    assert factors_of(torch.tensor([1.0, 0, 1, 1]), 1.0).isfinite().all()


def test_skewed_channels_are_found_and_put_right():
    images = crops()
    model, layers = quantized(skewed(), images)
    scalings = find_scalings(model, layers, images)
    assert [s.readers for s in scalings] == [("body.2",), ("body.4",), ("body.6",)]
    assert all(s.exponent >= 0.5 for s in scalings)
    with torch.no_grad(), computing_floats(model):
        before = model(images)
        state = copy.deepcopy(model.state_dict())
        assert equalize(model, scalings, images) == scalings
        assert torch.allclose(model(images), before, atol=1e-5 * float(before.abs().max()))
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, state[n])}
    assert changed == {f"body.{i}.{n}" for i in (0, 2, 4, 6) for n in ("weight", "bias")} - {
        "body.6.bias"
    }


def test_ranges_alike_are_left_alone():
    """What a factor wins there by chance is not worth a change."""
    images = crops(4)
    model, layers = quantized(build("edsr"), images)
    found = find_scalings(model, layers, images)
    assert [s.readers for s in found] == [("body.0.conv2",), ("body.1.conv2",)]
    assert all(s.exponent == 0 and bool((s.factors == 1).all()) for s in found)


class Hidden(nn.Module):
    """A second reader that no function of torch's shows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

    def forward(self, x):
        y = self.first(x)
        return self.last(self.second(y)) + _Hidden.apply(y)


class _Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        with torch._C.DisableTorchFunction():
            return x.square()


@torch.no_grad()
def test_what_would_change_the_output_is_taken_back():
    model, images = Hidden(), crops()
    good = Link(model.second.weight, model.second.bias, [model.last.weight])
    bad = Link(model.first.weight, model.first.bias, [model.second.weight])
    factors = torch.tensor([0.5, 3.0, 1.0])
    before = copy.deepcopy(model.state_dict())
    scalings = [Scaling(link, factors, 1.0, ()) for link in (bad, good)]
    assert equalize(model, scalings, images) == scalings[1:]
    after = model.state_dict()
    assert torch.equal(after["first.weight"], before["first.weight"])
    assert torch.equal(after["first.bias"], before["first.bias"])
    assert torch.allclose(after["second.bias"] * factors, before["second.bias"])
    assert torch.allclose(model(images), Hidden()(images), atol=1e-5)  # built of the same seed


def test_a_network_with_skewed_channels_gains_and_says_so():
    network, images = skewed(), crops()
    results = {
        way: quantize_network(
            network, images, QuantizationConfig(scope="all", equalize=way), held_out=crops(2, 16)
        )
        for way in (True, False)
    }
    found = results[True].calibration
    assert found.chosen.endswith(", equalized")
    assert set(found.equalized) == {"body.2", "body.4", "body.6"}
    assert results[False].calibration.equalized == {}
    target = network(images)
    score = {w: fidelity_in_db(r.model(images), target) for w, r in results.items()}
    assert score[True] > score[False] + 3
    untouched = dict(skewed().named_parameters())
    assert all(torch.equal(p, untouched[n]) for n, p in network.named_parameters())


def test_without_a_gain_the_network_stays_as_it_was(monkeypatch):
    from condiquant_plugin.calibration import job

    images = crops()
    scores = iter((2.0, 1.0, 0.0, 0.0))
    monkeypatch.setattr(job, "fidelity_in_db", lambda *_: next(scores))
    network = skewed()
    result = quantize_network(network, images, QuantizationConfig(scope="all"))
    found = result.calibration
    assert found.chosen == "least squares"
    assert list(found.fidelity) == [
        "least squares",
        "least squares, equalized",
        "as trained",
        "least squares, in sequence",
    ]
    assert found.equalized == {}
    monkeypatch.undo()
    alone = quantize_network(
        network, images[[0, 1, 2, 3, 4, 5, 6, 8]],
        QuantizationConfig(scope="all", equalize=False, recondition=QuantizationConfig().reconditioning()),
    )  # fmt: skip
    assert torch.equal(alone.model(images), result.model(images))


def test_nan_is_named():
    images = crops(2)
    images[0, 0, 0, 0] = float("nan")
    model, layers = quantized(skewed(), crops(2))
    with pytest.raises(InputError, match="NaN or Inf"):
        find_scalings(model, layers, images)
