import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from condiquant_plugin import InputError
from condiquant_plugin.layerwise.moments import weight_matrix
from condiquant_plugin.methods.gptq.integers import IntegerGPTQ, group_grids
from weight_problems import matrices, problem

seeds = st.integers(0, 2**16)


@pytest.mark.parametrize("kind", ["linear", "tall", "grouped"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_weights_are_integers_between_scales_and_all_is_counted(kind, bits):
    layer = problem(kind)
    (solution,) = IntegerGPTQ(bits=bits, group_size=8).solve([layer])
    form, matrix = solution.form, weight_matrix(layer.weight, layer.geometry)
    scales = form.scales.float().repeat_interleave(8, -1)
    codes = weight_matrix(solution.weight, layer.geometry) / scales
    assert torch.allclose(codes, codes.round(), atol=1e-4)
    by_group = codes.round().unflatten(-1, (-1, 8))
    assert float((by_group.amax(-1) - by_group.amin(-1)).max()) <= 2**bits - 1
    groups = matrix.numel() // 8
    assert sum(form.stored_bits().values()) == bits * matrix.numel() + (16 + bits) * groups
    assert form.bits_per_weight == pytest.approx(bits + (16 + bits) / 8)


@given(seed=seeds, bits=st.integers(2, 8))
def test_a_grid_holds_zero_and_is_no_worse_than_that_of_the_whole_range(seed, bits):
    weight = matrices(seed)[0]
    scales, zero_points = (t.double() for t in group_grids(weight, 8, bits))
    last, groups = 2**bits - 1, weight.unflatten(-1, (-1, 8))

    def error(scale, zero):
        codes = (groups / scale[..., None] + zero[..., None]).round().clamp(0, last)
        return (groups - (codes - zero[..., None]) * scale[..., None]).square().sum(-1)

    assert ((zero_points >= 0) & (zero_points <= last)).all()
    low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    whole = (high - low) / last
    # Float16 moves the scale by 2**-11 at most, and a code's value with it.
    slack = 8 * (whole * 2**-10 * last) ** 2 + 2e-2 * error(whole, (-low / whole).round())
    assert (error(scales, zero_points) <= error(whole, (-low / whole).round()) + slack).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_errors_made_up_for_cost_the_output_less(bits):
    nearest, exact = (
        IntegerGPTQ(bits=bits, group_size=8, compensation=kind) for kind in ("none", "exact")
    )
    layers = [problem(seed=seed, name=str(seed)) for seed in range(8)]
    lost = [
        sum(solution.report.output_error for solution in method.solve(layers))
        for method in (nearest, exact)
    ]
    assert lost[1] < 0.8 * lost[0]


def test_more_bits_and_a_residual_cost_less():
    def lost(**settings):
        layers = [problem(seed=seed) for seed in range(4)]
        solved = IntegerGPTQ(group_size=8, **settings).solve(layers)
        return sum(solution.report.output_error for solution in solved)

    assert lost(bits=4) < lost(bits=3) < lost(bits=2)
    assert lost(bits=2, residual_rank=4) < 0.8 * lost(bits=2)


def test_a_row_of_zeros_stays_zero():
    layer = problem()
    layer.weight[3] = 0
    (solution,) = IntegerGPTQ(bits=2, group_size=8).solve([layer])
    assert not solution.weight[3].any()
    assert torch.isfinite(solution.weight).all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bits": 1}, "bits=1 is not supported: use an integer from 2 to 8"),
        ({"compensation": "billm"}, "compensation='billm' is for binary weights"),
        ({"group_size": 0}, "group_size=0: use at least 1"),
        ({"group_size": 7}, "group_size=7 does not divide the 16 inputs of layer: use 8"),
    ],
)
def test_bad_settings_are_named(settings, words):
    with pytest.raises(InputError, match=re.escape(words)):
        IntegerGPTQ(**settings).solve([problem()])
