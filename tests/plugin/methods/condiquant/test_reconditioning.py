import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from condiquant_plugin import FakeQuantizer, InputError
from condiquant_plugin.layerwise.moments import LayerGeometry, moments_of
from condiquant_plugin.layerwise.problem import LayerProblem, fused_blocks
from condiquant_plugin.methods.condiquant import reconditioning, spectrum
from condiquant_plugin.methods.condiquant.reconditioning import ReconditioningConfig, recondition

CONDITION = ReconditioningConfig(objective="condition", strength=3e-3)
LEAST_SQUARES = ReconditioningConfig(objective="least_squares", damping=1e-2)


def problem(seed=0, rows=12, features=10, *, bits=3, bias=True, row_blocks=1, name="layer"):
    """A layer with decaying spectra of weight and inputs, as trained networks have."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, features, generator=generator)
    weight = weight * torch.logspace(0, -2, features)
    mixing = torch.randn(features, features, generator=generator)
    x = torch.randn(4000, features, generator=generator) * torch.logspace(0, -1.5, features)
    x = x @ mixing + 0.3
    quantizer = FakeQuantizer(bits, "activation")
    quantizer.search_bounds(x)
    moments = moments_of(x, LayerGeometry(), quantizer(x).detach())
    offset = torch.randn(rows, generator=generator) if bias else None
    return (
        LayerProblem(name, weight, offset, moments, row_blocks=row_blocks),
        x,
        quantizer(x).detach(),
    )


def plain_condition(weight, gram_matrix, tau, steps):
    """The paper's loop, one SVD a step."""
    largest = torch.linalg.eigvalsh(gram_matrix)[-1]
    current = weight.double()
    for _ in range(steps):
        current = current - (current - weight.double()) @ gram_matrix / largest
        current = spectrum.prox_spread_svd(current, tau)
    return current


def test_condition_equals_the_papers_loop():
    given_problem, *_ = problem()
    [solution] = recondition([given_problem], CONDITION)
    expected = plain_condition(given_problem.weight, given_problem.moments.gram[0], 3e-3, 100)
    error = (solution.weight - expected).norm() / expected.norm()
    assert error < 1e-3


def test_condition_lowers_the_condition_number_and_reports_the_change():
    given_problem, x, _ = problem()
    [solution] = recondition([given_problem], CONDITION)
    report = solution.report
    before = spectrum.condition_number(given_problem.weight).item()
    assert report.condition_before == pytest.approx(before, rel=1e-5)
    assert report.condition_after < 0.3 * report.condition_before
    change = (x @ (solution.weight - given_problem.weight).T).norm()
    expected = change / (x @ given_problem.weight.T).norm()
    assert report.output_error == pytest.approx(expected.item(), rel=1e-3)
    assert 0 < report.output_error < 0.2


@settings(max_examples=8)
@given(st.floats(0.003, 0.2), st.integers(0, 20))
def test_output_tolerance_is_kept_and_used(tolerance, seed):
    given_problem, *_ = problem(seed)
    config = dataclasses.replace(CONDITION, output_tolerance=tolerance)
    [solution] = recondition([given_problem], config)
    assert 0.3 * tolerance < solution.report.output_error <= tolerance * (1 + 1e-3)


def test_row_blocks_are_separate_matrices():
    fused, *_ = problem(rows=12, row_blocks=3)
    [together] = recondition([fused], CONDITION)
    for block, weight in zip(together.weight.chunk(3), fused.weight.chunk(3), strict=True):
        alone = dataclasses.replace(fused, weight=weight, bias=None, row_blocks=1)
        [separate] = recondition([alone], CONDITION)
        torch.testing.assert_close(block, separate.weight, atol=1e-4, rtol=1e-3)


def test_layers_of_all_shapes_in_one_call_equal_each_alone():
    problems = [
        problem(s, *shape, name=str(s))[0]
        for s, shape in enumerate([(12, 10), (10, 12), (12, 10), (7, 7)])
    ]
    for config in (CONDITION, LEAST_SQUARES):
        together = recondition(problems, config)
        for one, solution in zip(problems, together, strict=True):
            [alone] = recondition([one], config)
            torch.testing.assert_close(solution.weight, alone.weight, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("bias", [True, False])
def test_least_squares_minimises_its_objective(bias):
    given_problem, x, q = problem(bias=bias)
    [solution] = recondition([given_problem], LEAST_SQUARES)
    offset = given_problem.bias if bias else torch.zeros(12)
    target = x @ given_problem.weight.T + offset
    energy = given_problem.moments.quantized_gram[0].diagonal().mean() * LEAST_SQUARES.damping

    def objective(weight, intercept):
        fit = (q @ weight.T + intercept - target).double().square().sum()
        return fit + energy * (weight - given_problem.weight).double().square().sum()

    found = solution.bias if bias else torch.zeros(12)
    best = objective(solution.weight, found)
    for _ in range(20):
        step = 1e-2 * torch.randn_like(solution.weight)
        shift = 1e-2 * torch.randn(12) if bias else torch.zeros(12)
        assert best <= objective(solution.weight + step, found + shift)
    report = solution.report
    assert report.quantized_output_error_after < report.quantized_output_error_before
    error = (q @ solution.weight.T + found - target).norm() / target.norm()
    assert report.quantized_output_error_after == pytest.approx(error.item(), rel=1e-3)
    change = (x @ solution.weight.T + found - target).norm() / (x @ given_problem.weight.T).norm()
    assert report.output_error == pytest.approx(change.item(), rel=1e-3)


@pytest.mark.parametrize("config", [CONDITION, LEAST_SQUARES], ids=lambda c: c.objective)
def test_grouped_convolutions_keep_their_shape(config):
    geometry = LayerGeometry("conv", (3, 3), padding=(1, 1), groups=2)
    x = torch.randn(2, 4, 12, 12)
    moments = moments_of(x, geometry, x.mul(2).round().div(2))
    weight, bias = torch.randn(6, 2, 3, 3), torch.randn(6)
    [solution] = recondition([LayerProblem("conv", weight, bias, moments, geometry)], config)
    assert solution.weight.shape == weight.shape
    assert solution.bias.shape == bias.shape
    assert not torch.equal(solution.weight, weight)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_least_squares_are_those_of_all_samples(biased, noise):
    """Also where sums are rounded so much that their matrix is not positive definite."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(90, 6, generator=generator) + 2
    q, weight = x.mul(2).round().div(2), torch.randn(5, 6, generator=generator)
    bias = torch.randn(5, generator=generator) if biased else None
    moments = moments_of(x, LayerGeometry(), q)
    config = ReconditioningConfig(damping=1e-2)
    moments.quantized_gram[0, 2, 2] *= 1 - 1e3 * noise
    before = moments.quantized_gram.clone()
    [solution] = recondition([LayerProblem("a", weight, bias, moments)], config)
    assert torch.equal(moments.quantized_gram, before)
    ones = torch.ones(90, 1, dtype=torch.float64)
    inputs, codes = (torch.cat([t.double(), ones], 1) if biased else t.double() for t in (x, q))
    start = weight.double() if bias is None else torch.cat([weight, bias[:, None]], 1).double()
    system, pull = codes.T @ codes, torch.zeros(codes.shape[1], dtype=torch.float64)
    system[2, 2] = moments.quantized_gram[0, 2, 2]
    pull[:6] = config.damping * moments.quantized_gram.diagonal(dim1=-2, dim2=-1).mean()
    right = codes.T @ inputs @ start.T + pull[:, None] * start.T
    expected = torch.linalg.solve(system + pull.diag(), right).T
    torch.testing.assert_close(solution.weight.double(), expected[:, :6], rtol=1e-3, atol=1e-3)
    if biased:
        torch.testing.assert_close(solution.bias.double(), expected[:, 6], rtol=1e-3, atol=1e-3)
    definite = torch.linalg.cholesky_ex(moments.quantized_gram)[1] == 0
    assert bool(definite) == (noise == 0)


def test_dead_inputs_and_zero_weights_stay_finite():
    moments = moments_of(torch.zeros(50, 4), LayerGeometry(), torch.zeros(50, 4))
    for config in (CONDITION, LEAST_SQUARES, dataclasses.replace(CONDITION, output_tolerance=0.1)):
        for weight in (torch.randn(3, 4), torch.zeros(3, 4)):
            [solution] = recondition([LayerProblem("dead", weight, None, moments)], config)
            assert torch.isfinite(solution.weight).all()


def test_bad_weights_name_the_layer():
    given_problem, *_ = problem()
    broken = dataclasses.replace(
        given_problem, name="body.3.fc1", weight=given_problem.weight * float("nan")
    )
    with pytest.raises(InputError, match=r"weight of body\.3\.fc1"):
        recondition([broken], CONDITION)


def test_least_squares_without_quantized_inputs_is_refused():
    moments = moments_of(torch.randn(50, 4), LayerGeometry())
    with pytest.raises(InputError, match="no quantized inputs"):
        recondition([LayerProblem("a", torch.randn(3, 4), None, moments)], LEAST_SQUARES)


def test_log_condition_proxy_lowers_the_condition_number():
    given_problem, *_ = problem()
    config = dataclasses.replace(CONDITION, proxy="log_condition", strength=1e-4)
    [solution] = recondition([given_problem], config)
    assert solution.report.condition_after < solution.report.condition_before


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_default_lowers_the_error_of_the_quantized_output(bits):
    given_problem, *_ = problem(bits=bits)
    [solution] = recondition([given_problem], reconditioning.default_config(bits))
    report = solution.report
    assert report.quantized_output_error_after < report.quantized_output_error_before


@pytest.mark.parametrize("damping", [1e-3, 1e-2, 1.0])
def test_least_squares_is_damped_in_units_of_the_mean_input_energy(damping):
    given_problem, *_ = problem(bias=False)
    [solution] = recondition([given_problem], dataclasses.replace(LEAST_SQUARES, damping=damping))
    system, cross = (
        given_problem.moments.quantized_gram[0],
        given_problem.moments.quantized_cross[0],
    )
    pull = damping * system.trace() / len(system) * torch.eye(len(system), dtype=torch.float64)
    expected = given_problem.weight.double() @ (cross + pull).mT @ torch.linalg.inv(system + pull)
    torch.testing.assert_close(solution.weight.double(), expected, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize(
    ("name", "rows", "blocks"),
    [("a.qkv", 12, 3), ("qkv", 9, 3), ("a.qkv", 8, 1), ("a.qkv_norm", 9, 1), ("qkv.a", 9, 1)],
)
def test_only_a_fused_qkv_has_three_blocks(name, rows, blocks):
    assert fused_blocks(name, rows) == blocks
