import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from condiquant_plugin import spectrum

shapes = st.tuples(st.integers(2, 9), st.integers(2, 9))
taus = st.floats(1e-4, 3.0)
seeds = st.integers(0, 2**31)


def matrix(seed: int, shape: tuple[int, int], decay: float = 2.0) -> torch.Tensor:
    """Random matrix whose singular values span ``10**decay``."""
    generator = torch.Generator().manual_seed(seed)
    u, _, v = torch.linalg.svd(torch.randn(shape, generator=generator, dtype=torch.float64))
    n = min(shape)
    return u[:, :n] * torch.logspace(0, -decay, n, dtype=torch.float64) @ v[:n]


@given(seeds, shapes, st.floats(0, 4))
def test_condition_number_is_the_ratio_of_singular_values(seed, shape, decay):
    kappa = spectrum.condition_number(matrix(seed, shape, decay))
    assert kappa == pytest.approx(10**decay, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_condition_number_of_singular_matrices_is_infinite(dtype):
    rank_one = torch.outer(torch.arange(1.0, 5), torch.arange(1.0, 4)).to(dtype)
    batch = torch.stack([torch.zeros(4, 3, dtype=dtype), rank_one, torch.eye(4, 3, dtype=dtype)])
    assert spectrum.condition_number(batch).tolist() == [float("inf"), float("inf"), 1.0]


@given(seeds, shapes, taus, st.floats(1e-4, 0.3))
def test_prox_minimises_its_objective(seed, shape, tau, distance):
    weight = matrix(seed, shape)
    prox = spectrum.prox_spread_svd(weight, tau)

    def objective(v: torch.Tensor) -> float:
        return float(0.5 * (v - weight).square().sum() + tau * spectrum.spread(v))

    step = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1)).double()
    assert objective(prox) <= objective(prox + distance * step / step.norm()) + 1e-12


@given(seeds, shapes, taus, st.floats(1e-4, 0.3))
def test_log_prox_minimises_its_objective_locally(seed, shape, tau, distance):
    weight = matrix(seed, shape, decay=0.7)
    tau = 0.01 * tau
    prox = spectrum.prox_log_condition(weight, tau)

    def objective(v: torch.Tensor) -> float:
        return float(0.5 * (v - weight).square().sum() + tau * spectrum.log_condition(v))

    step = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1)).double()
    assert objective(prox) <= objective(prox + 1e-3 * distance * step / step.norm()) + 1e-12


@given(seeds, shapes, taus)
def test_svd_and_polar_forms_agree(seed, shape, tau):
    weight = matrix(seed, shape)
    by_polar, _ = spectrum.prox_spread(weight, tau, tolerance=1e-10)
    torch.testing.assert_close(by_polar, spectrum.prox_spread_svd(weight, tau), atol=1e-9, rtol=0)


@given(seeds, shapes, st.floats(0, 3))
def test_polar_factor_of_float32_is_orthonormal(seed, shape, decay):
    weight = matrix(seed, shape, decay).float()[None]
    factor, _ = spectrum.polar_factor(weight)
    u, _, vh = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(factor, u @ vh, atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", ["zero", "rank one"])
def test_polar_factor_of_singular_matrices_falls_back_to_svd(kind):
    weight = torch.zeros(2, 4, 3)
    if kind == "rank one":
        weight[1] = torch.outer(torch.arange(1.0, 5), torch.arange(1.0, 4))
    factor, _ = spectrum.polar_factor(weight)
    torch.testing.assert_close(factor.mT @ factor, torch.eye(3).expand(2, 3, 3), atol=1e-5, rtol=0)


@settings(max_examples=40)
@given(seeds, shapes, taus, st.sampled_from(["svd", "polar", "log"]))
def test_condition_number_never_rises(seed, shape, tau, form):
    weight = matrix(seed, shape)
    forms = {
        "svd": lambda: spectrum.prox_spread_svd(weight, tau),
        "polar": lambda: spectrum.prox_spread(weight, tau)[0],
        "log": lambda: spectrum.prox_log_condition(weight, tau),
    }
    after = spectrum.condition_number(forms[form]())
    assert after <= spectrum.condition_number(weight) * (1 + 1e-6)


def test_a_strength_per_matrix_equals_each_alone():
    batch = torch.stack([matrix(0, (5, 4)), matrix(1, (5, 4))])
    together = spectrum.prox_spread_svd(batch, torch.tensor([0.1, 2.0]).view(2, 1, 1).double())
    alone = [spectrum.prox_spread_svd(w, t) for w, t in zip(batch, (0.1, 2.0), strict=True)]
    torch.testing.assert_close(together, torch.stack(alone))
