import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from condiquant_plugin import FakeQuantizer
from condiquant_plugin.uniform.bounds_search import search_bounds
from condiquant_plugin.uniform.straight_through import StraightThrough


def softmax_map(seed, temperature=1.0, shape=(2, 5, 16)):
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (scores * temperature).softmax(-1)


def by_row(bits, upper=1.0):
    quantizer = FakeQuantizer(bits, "operand", softmax=True)
    quantizer.set_bounds(0.0, upper)
    return quantizer


@given(st.integers(2, 8), st.integers(0, 99), st.floats(0.01, 30), st.floats(0.7, 1.0))
def test_rows_keep_their_sums_and_the_ratios_to_their_largest_entries(
    bits, seed, temperature, upper
):
    x, quantizer = softmax_map(seed, temperature), by_row(bits, upper)
    rounded = quantizer(x)
    torch.testing.assert_close(rounded.sum(-1), torch.ones(2, 5))
    ratios = rounded / rounded.amax(-1, keepdim=True)
    exact = (x / x.amax(-1, keepdim=True)).clamp_max(upper) / upper
    assert (ratios - exact).abs().max() <= 0.51 * quantizer.snapped().step / upper


def test_a_row_of_equal_entries_stays_what_it_is():
    x = torch.full((1, 3, 256), 1 / 256)
    torch.testing.assert_close(by_row(2)(x), x)


def test_it_passes_on_what_it_gets_when_it_is_off():
    x, quantizer = softmax_map(0), by_row(2)
    quantizer.enabled = False
    assert torch.equal(quantizer(x), x)


def test_whatever_training_does_to_bounds_rows_have_sums():
    x, quantizer = softmax_map(0, 5.0, (2, 5, 256)), by_row(4)
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.1)
    for parameter in quantizer.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    rounded = quantizer(x)
    assert (rounded >= 0).all()
    torch.testing.assert_close(rounded.sum(-1), torch.ones(2, 5))


@given(st.integers(2, 4), st.integers(0, 99), st.floats(0.5, 1.2))
def test_gradients_are_those_of_its_parts(bits, seed, upper):
    quantizer = by_row(bits, upper).double()
    x = softmax_map(seed, 3.0).double().requires_grad_(True)
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).double()
    (quantizer(x) * weights).sum().backward()
    found = x.grad.clone(), quantizer.upper.grad.clone()
    x.grad, quantizer.upper.grad = None, None
    step = quantizer.upper / (2**bits - 1)
    zero = torch.zeros((), dtype=torch.float64)
    scaled = x / x.detach().amax(-1, keepdim=True)
    rounded = StraightThrough.apply(scaled, zero, step, zero, bits, 1)
    (quantizer.finished(rounded) * weights).sum().backward()
    torch.testing.assert_close(found, (x.grad, quantizer.upper.grad))


def test_the_upper_bound_is_trained_whatever_else_is():
    quantizer = by_row(2, 0.8)
    quantizer(softmax_map(0)).square().sum().backward()
    assert quantizer.upper.grad.abs() > 0


def test_bounds_are_those_of_the_rounded_ratios():
    class Map(nn.Module):
        def __init__(self):
            super().__init__()
            self.quantizer = FakeQuantizer(4, "operand", softmax=True)

        def forward(self, scores):
            return self.quantizer(scores.softmax(-1))

    model = Map()
    scores = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))
    search_bounds(model, [scores])
    assert model.quantizer.lower == 0
    assert 0.5 < model.quantizer.upper <= 1.001


def test_the_gradient_is_that_of_the_map_where_nothing_is_clipped():
    scores = torch.randn(4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = torch.randn(4, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = []
    for quantized in (True, False):
        given_scores = scores.clone().requires_grad_(True)
        x = given_scores.softmax(-1)
        (weights * (by_row(8).double()(x) if quantized else x)).sum().backward()
        gradients.append(given_scores.grad)
    torch.testing.assert_close(*gradients, rtol=0.05, atol=2e-3)


@torch.no_grad()
def test_diffuse_rows_beside_peaked_ones_are_rounded_finer():
    scores = torch.randn(2, 32, 64, generator=torch.Generator().manual_seed(0))
    scores[:, ::4] *= 5
    values = torch.randn(2, 64, 8, generator=torch.Generator().manual_seed(1))
    x = scores.softmax(-1)
    errors = []
    for softmax in (True, False):
        quantizer = FakeQuantizer(4, "operand", softmax=softmax)
        quantizer.search_bounds(quantizer.transformed(x))
        errors.append(float(((quantizer(x) - x) @ values).norm()))
    assert errors[0] < 0.5 * errors[1]
