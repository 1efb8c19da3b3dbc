"""Rates of bounds and weights, for every host's optimizer."""

import pytest
import torch
from torch import nn

from condiquant_plugin import FakeQuantizer, InputError
from condiquant_plugin.distillation import DistillationConfig, parameter_groups

BOUNDS = [
    ("weight", -0.3, 0.3),
    ("weight", -0.6, 0.6),
    ("activation", 0.0, 3.0),
    ("activation", 0.0, 30.0),
]


def quantizers(weight_bits: int, activation_bits: int) -> nn.ModuleList:
    """Two of weights, two of inputs."""
    bits = {"weight": weight_bits, "activation": activation_bits}
    made = nn.ModuleList(FakeQuantizer(bits[kind], kind) for kind, _, _ in BOUNDS)
    for quantizer, (_, lower, upper) in zip(made, BOUNDS, strict=True):
        quantizer.set_bounds(lower, upper)
    return made


def rates(student, **settings):
    """Of the bounds, quantizer by quantizer, and of the weights."""
    weights = [nn.Parameter(torch.ones(2))]
    groups = parameter_groups(student, DistillationConfig(**settings), weights)
    assert [id(p) for p in groups[-1]["params"]] == [id(p) for p in weights]
    *bounds, trained = [group["lr"] for group in groups]
    return bounds, trained


@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(2, 2), (3, 3), (8, 4), (4, 8)])
def test_rates_go_by_the_steps_of_grids(weight_bits, activation_bits):
    bounds, trained = rates(quantizers(weight_bits, activation_bits), rate=0.03)
    weight_levels, levels = 2**weight_bits - 1, 2**activation_bits - 1
    expected = [0.018 / weight_levels, 0.036 / weight_levels, 0.09 / levels, 0.9 / levels]
    assert bounds == pytest.approx(expected)
    assert trained == pytest.approx(0.03 * 0.9 / min(weight_levels, levels))


def test_rates_that_are_given_stay_as_they_are():
    student = quantizers(4, 4)
    usual, trained = rates(student)
    assert rates(student, bounds_rate=0.1) == (pytest.approx([0.06, 0.12, 0.3, 3.0]), trained)
    assert rates(student, weights_rate=0.7) == (usual, 0.7)


def test_weights_without_grids_need_a_rate_of_their_own():
    student = quantizers(4, 4)[2:]
    message = r"^distillation\.rate=0\.01 is in grid steps, .*weights_rate"
    with pytest.raises(InputError, match=message):
        rates(student)
    assert rates(student, weights_rate=1e-3)[1] == 1e-3
