import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from condiquant_plugin import InputError
from condiquant_plugin.binary.binarizers import (
    ActivationBinarizer,
    binarize_op,
    surrogate,
    weight_scale,
    weight_signs,
)

GRADIENTS = ("hardtanh", "polynomial", "straight_through")


def away_from_kinks(generator: torch.Generator) -> torch.Tensor:
    x = 4 * torch.rand(2, 3, 5, 5, generator=generator, dtype=torch.float64) - 2
    near = ((x.abs() - 1).abs() < 1e-3) | (x.abs() < 1e-3)
    return torch.where(near, x + 2e-3, x)


@given(st.sampled_from(GRADIENTS), st.integers(0, 10**6))
def test_gradient_of_the_sign_is_the_slope_of_its_surrogate(gradient, seed):
    generator = torch.Generator().manual_seed(seed)
    x = away_from_kinks(generator)
    binarizer = ActivationBinarizer(3, gradient).double()
    upstream = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    inputs = x.clone().requires_grad_()
    (binarizer(inputs) * upstream).sum().backward()

    step = 1e-5
    above, below = (surrogate(x + sign * step, gradient) for sign in (1, -1))
    slope = (above - below) / (2 * step)
    torch.testing.assert_close(inputs.grad, upstream * slope, atol=1e-8, rtol=1e-8)
    expected = -(upstream * slope).sum((0, 2, 3))
    torch.testing.assert_close(binarizer.threshold.grad, expected, atol=1e-7, rtol=1e-7)


def test_surrogates_are_those_of_the_papers():
    x = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0])
    assert surrogate(x, "hardtanh").tolist() == [-1, -1, -0.5, 0, 0.5, 1, 1]
    assert surrogate(x, "polynomial").tolist() == [-1, -1, -0.75, 0, 0.75, 1, 1]
    assert surrogate(x, "straight_through").tolist() == x.tolist()


def test_signs_are_those_behind_the_threshold_of_each_channel():
    binarizer = ActivationBinarizer(2)
    with torch.no_grad():
        binarizer.threshold.copy_(torch.tensor([0.5, -0.5]))
    x = torch.tensor([-1.0, 0.0, 0.5, 1.0]).repeat(2, 1).view(1, 2, 1, 4)
    assert binarizer(x)[0, :, 0].tolist() == [[-1, -1, -1, 1], [-1, 1, 1, 1]]


def test_zero_is_minus_one_as_what_a_relu_has_cut_off():
    assert ActivationBinarizer(1, learned=False)(torch.zeros(1, 1, 1, 1)).item() == -1


@pytest.mark.parametrize("learned", [True, False])
def test_tracing_writes_one_operator_of_the_same_values(learned):
    binarizer = ActivationBinarizer(3, learned=learned)
    if learned:
        torch.nn.init.normal_(binarizer.threshold)
    x = torch.randn(1, 3, 8, 8)
    traced = torch.jit.trace(binarizer, x, check_trace=False)
    assert "condiquant::binarize" in str(traced.graph)
    assert torch.equal(traced(x), binarizer(x))


def test_the_operator_is_registered_in_full():
    torch.library.opcheck(binarize_op, (torch.randn(1, 3, 4, 4), torch.randn(3), "name"))


def test_scale_makes_the_nearest_binarized_weight():
    weight = torch.randn(4, 3, 3, 3)
    scale = weight_scale(weight)
    assert torch.equal(scale, weight.abs().mean((1, 2, 3)))
    signs = weight_signs(weight)

    def error(factor):
        return (weight - factor * scale.view(-1, 1, 1, 1) * signs).square().sum()

    assert error(1.0) < min(error(0.99), error(1.01))


def test_gradient_of_a_weight_is_that_of_clipped_signs_times_the_mean():
    weight = (3 * torch.rand(4, 3, 3, 3, dtype=torch.float64) - 1.5).requires_grad_()
    upstream = torch.randn_like(weight)
    (weight_signs(weight) * weight_scale(weight).view(-1, 1, 1, 1) * upstream).sum().backward()
    w = weight.detach()
    through_signs = upstream * weight_scale(w).view(-1, 1, 1, 1) * (w.abs() <= 1)
    through_mean = w.sign() * (upstream * w.sign()).mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(weight.grad, through_signs + through_mean)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [((3, "sigmoid"), ["gradient='sigmoid'", "hardtanh"]), ((0,), ["channels=0"])],
)
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(InputError) as caught:
        ActivationBinarizer(*arguments)
    message = str(caught.value)
    assert all(word in message for word in words)
    assert "\n" not in message
