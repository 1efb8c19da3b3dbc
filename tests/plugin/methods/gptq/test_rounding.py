import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from condiquant_plugin import FakeQuantizer, InputError
from condiquant_plugin.layerwise.moments import LayerGeometry, moments_of, unfold, weight_matrix
from condiquant_plugin.layerwise.problem import LayerProblem
from condiquant_plugin.methods.gptq.rounding import GPTQ
from condiquant_plugin.uniform.grid import smallest_step

GEOMETRIES = {
    "linear": (LayerGeometry(), (6, 8), (50, 8)),
    "conv": (LayerGeometry("conv", (3, 3), padding=(1, 1)), (6, 4, 3, 3), (2, 4, 9, 9)),
    "grouped": (LayerGeometry("conv", (3, 3), groups=2), (6, 2, 3, 3), (2, 4, 9, 9)),
    "transposed": (LayerGeometry("conv_transpose", (2, 2), (2, 2)), (4, 6, 2, 2), (2, 4, 9, 9)),
}


def problem(kind="linear", bits=3, *, seed=0, bias=True, row_blocks=1, name="layer", tails=1):
    """A layer whose inputs are correlated, as those of trained networks, and its quantized inputs."""
    geometry, weight_shape, input_shape = GEOMETRIES[kind]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(input_shape, generator=generator).cumsum(1) + 0.5
    weight = torch.randn(weight_shape, generator=generator) ** tails
    inputs = FakeQuantizer(4, "activation")
    inputs.search_bounds(x)
    codes = inputs(x).detach()
    axis = int(kind == "transposed")
    quantizer = FakeQuantizer(bits, "weight", row_blocks=row_blocks, axis=axis)
    quantizer.search_bounds(weight)
    offset = torch.randn(weight.shape[axis], generator=generator) if bias else None
    moments = moments_of(x, geometry, codes)
    grid = quantizer.levels_of(weight)
    return LayerProblem(name, weight, offset, moments, geometry, row_blocks, grid), codes


def conditional_minima(weight, gram, lower, step, last_code):
    """Each entry, heaviest column first, at the minimum over all columns that are not rounded yet."""
    order = np.argsort(-np.diag(gram), kind="stable")
    result = np.empty_like(weight)
    for row in range(len(weight)):
        error = np.zeros(weight.shape[1])
        for place, column in enumerate(order):
            rest, done = order[place:], order[:place]
            # of (w' - w)^T H (w' - w) over the rest, given the errors of what is done
            shift = -np.linalg.solve(
                gram[np.ix_(rest, rest)], gram[np.ix_(rest, done)] @ error[done]
            )
            low, size = lower[row, column], step[row, column]
            target = weight[row, column] + shift[0]
            code = np.clip(np.rint((target - low) / size), 0, last_code)
            error[column] = low + code * size - weight[row, column]
            result[row, column] = np.clip(target, low, low + last_code * size)
    return result


@pytest.mark.parametrize("kind", GEOMETRIES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@given(bits=st.integers(2, 4), seed=st.integers(0, 2**16))
@settings(max_examples=8, deadline=None)
def test_each_entry_makes_up_for_those_before(kind, bias, bits, seed):
    asked, _ = problem(kind, bits, seed=seed, bias=bias)
    (solution,) = GPTQ().solve([asked])
    found = weight_matrix(solution.weight, asked.geometry).double().numpy()
    start = weight_matrix(asked.weight, asked.geometry).double().numpy()
    seen = asked.moments
    total, second = (t.numpy() for t in (seen.quantized_total, seen.quantized_gram))
    spread = [
        weight_matrix(t.expand_as(asked.weight), asked.geometry)
        for t in (asked.grid.lower, asked.grid.step)
    ]
    for group in range(len(start)):
        gram = second[group] - bias * np.outer(total[group], total[group]) / seen.samples
        gram += 1e-2 * np.diag(gram).mean() * np.eye(len(gram))
        lower, step = (t[group].double().numpy() for t in spread)
        expected = conditional_minima(start[group], gram, lower, step, asked.grid.last_code)
        assert found[group] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", GEOMETRIES)
@pytest.mark.parametrize("row_blocks", [1, 3])
def test_the_output_on_quantized_inputs_is_kept_better_than_by_nearest_rounding(kind, row_blocks):
    if kind == "transposed" and row_blocks > 1:
        row_blocks = 6
    asked, codes = problem(kind, row_blocks=row_blocks)
    (solution,) = GPTQ().solve([asked])
    rows = unfold(codes, asked.geometry).double()

    def output(weight, bias):
        matrix = weight_matrix(asked.grid.quantize(weight), asked.geometry).double()
        return rows @ matrix.mT + bias.double().view(len(matrix), 1, -1)

    exact = rows @ weight_matrix(asked.weight, asked.geometry).double().mT
    target = exact + asked.bias.double().view(len(exact), 1, -1)
    nearest, rounded = output(asked.weight, asked.bias), output(solution.weight, solution.bias)
    errors = [(y - target).norm() / exact.norm() for y in (nearest, rounded)]
    assert errors[1] < 0.9 * errors[0]
    assert (rounded - target).mean(1).abs().max() < 1e-4
    assert solution.report.nearest_error == pytest.approx(float(errors[0]), rel=1e-4)
    assert solution.report.rounding_error == pytest.approx(float(errors[1]), rel=1e-3)


@pytest.mark.parametrize("kind", GEOMETRIES)
@pytest.mark.parametrize("row_blocks", [1, 6])
@given(seed=st.integers(0, 2**16))
@settings(max_examples=8, deadline=None)
def test_8_bit_weights_are_rounded_on_a_grid_that_no_pair_widens(kind, row_blocks, seed):
    asked, _ = problem(kind, 8, seed=seed, row_blocks=row_blocks, tails=3)
    (solution,) = GPTQ().solve([asked])
    axis = int(kind == "transposed")
    rows = asked.grid.integers(asked.grid.codes(solution.weight)).movedim(axis, 0).flatten(1)
    pairs = torch.stack([s.clamp_min(0).topk(2, 1).values.sum(1) for s in (rows, -rows)])
    assert pairs.max() <= 128
    step = asked.grid.step.expand_as(asked.weight).movedim(axis, 0).flatten(1)[:, 0]
    assert (smallest_step(solution.weight.movedim(axis, 0).flatten(1)) <= step).all()
    assert solution.report.rounding_error < solution.report.nearest_error


def test_layers_of_one_shape_are_solved_as_if_alone():
    asked = [
        problem(seed=seed, bits=bits, name=f"{seed}")[0] for seed, bits in enumerate((3, 3, 2))
    ]
    together = GPTQ().solve(asked)
    for layer, solution in zip(asked, together, strict=True):
        (alone,) = GPTQ().solve([layer])
        assert solution.report.name == layer.name
        assert torch.equal(solution.weight, alone.weight)
        assert torch.equal(solution.bias, alone.bias)


@pytest.mark.parametrize("kind", GEOMETRIES)
def test_a_layer_on_several_grids_is_solved_on_each_as_if_alone(kind, monkeypatch):
    factored = []
    factor = torch.cholesky_inverse
    monkeypatch.setattr(torch, "cholesky_inverse", lambda x: factored.append(x) or factor(x))
    first, _ = problem(kind, 3)
    other = problem(kind, seed=1, name="another")[0]
    without_bias = replace(first, bias=None)
    grids = [replace(first, grid=problem(kind, bits)[0].grid) for bits in (2, 4, 6)]
    asked = [first, other, *grids, without_bias]
    together = GPTQ().solve(asked)
    assert sum(len(x) for x in factored) == 3 * len(weight_matrix(first.weight, first.geometry))
    for layer, solution in zip(asked, together, strict=True):
        (alone,) = GPTQ().solve([layer])
        assert solution.report.name == layer.name
        assert torch.allclose(solution.weight, alone.weight, rtol=1e-5, atol=1e-6)
        quantize = layer.grid.quantize
        assert torch.allclose(quantize(solution.weight), quantize(alone.weight))
        assert (solution.bias is None) == (layer.bias is None)
        if layer.bias is not None:
            assert torch.allclose(solution.bias, alone.bias, atol=1e-6)


def test_inputs_that_are_all_zero_round_to_the_nearest():
    asked, codes = problem()
    moments = moments_of(torch.zeros_like(codes), asked.geometry, torch.zeros_like(codes))
    (solution,) = GPTQ().solve([replace(asked, moments=moments)])
    quantize = asked.grid.quantize
    assert torch.equal(quantize(solution.weight), quantize(asked.weight))
    assert torch.equal(solution.bias, asked.bias)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"grid": None}, "layer has no grid: search bounds before rounding"),
        (
            {"moments": moments_of(torch.ones(3, 8), LayerGeometry())},
            "layer has no moments of quant",
        ),
        ({"weight": torch.full((6, 8), torch.nan)}, "NaN or Inf in the weight of layer"),
    ],
    ids=["grid", "moments", "nan"],
)
def test_problems_that_cannot_be_rounded_are_named(changes, words):
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        GPTQ().solve([replace(problem()[0], **changes)])
    assert "\n" not in str(caught.value)


def test_damping_of_nothing_is_refused():
    with pytest.raises(InputError, match="damping=0: use more than 0"):
        GPTQ(damping=0)
