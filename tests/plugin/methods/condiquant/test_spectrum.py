import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from condiquant_plugin.methods.condiquant import spectrum

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


FORMS = {
    "condition number": lambda w, tau: spectrum.condition_number(w),
    "spread": lambda w, tau: spectrum.spread(w),
    "log condition": lambda w, tau: spectrum.log_condition(w),
    "svd": spectrum.prox_spread_svd,
    "polar": lambda w, tau: spectrum.prox_spread(w, tau, tolerance=1e-10)[0],
    "log": spectrum.prox_log_condition,
    "factor": lambda w, tau: spectrum.polar_factor(w, tolerance=1e-10)[0],
}


@pytest.mark.parametrize("shape", [(5, 4), (4, 5), (4, 4), (3, 3)])
@pytest.mark.parametrize("form", FORMS)
def test_a_batch_equals_each_of_its_matrices_alone(form, shape):
    batch = torch.stack([matrix(seed, shape, 0.5 + 0.2 * seed) for seed in range(6)])
    tau = torch.logspace(-3, -1, 6, dtype=torch.float64)
    together = FORMS[form](batch.view(2, 3, *shape), tau.view(2, 3, 1, 1)).flatten(0, 1)
    alone = torch.stack([FORMS[form](w, t) for w, t in zip(batch, tau.tolist(), strict=True)])
    torch.testing.assert_close(together, alone, atol=1e-8, rtol=1e-8)


@given(seeds, shapes, st.floats(0, 2))
def test_spread_is_half_the_sum_of_squared_distances_from_the_mean(seed, shape, decay):
    weight = matrix(seed, shape, decay)
    sigma = torch.logspace(0, -decay, min(shape), dtype=torch.float64)
    expected = (sigma - sigma.sum() / len(sigma)).square().sum() / 2
    assert spectrum.spread(weight).item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-12)
    assert spectrum.log_condition(weight).item() == pytest.approx(decay * 2.302585092994046)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(8, 3), (3, 8)])
def test_what_counts_as_rank_deficient_is_what_matrix_rank_says(dtype, shape):
    resolution = 8 * torch.finfo(dtype).eps
    for factor in (0.5, 0.9, 1.1, 2.0):
        weight = torch.zeros(shape, dtype=dtype)
        weight[range(3), range(3)] = torch.tensor([4.0, 1.0, 4 * resolution * factor], dtype=dtype)
        is_full = torch.linalg.matrix_rank(weight) == 3
        assert is_full == (factor > 1)
        assert torch.isfinite(spectrum.condition_number(weight)) == is_full


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5)])
@pytest.mark.parametrize("lifts", [0, 8, 20])
def test_well_conditioned_matrices_need_no_svd(monkeypatch, shape, lifts):
    weight = torch.stack([matrix(0, shape, 1.0), matrix(1, shape, 2.0)])
    u, _, vh = torch.linalg.svd(weight, full_matrices=False)

    def refuse(*_arguments, **_options):
        raise AssertionError("an SVD")

    monkeypatch.setattr(torch.linalg, "svd", refuse)
    factor, _ = spectrum.polar_factor(weight, tolerance=1e-10, lifts=lifts)
    torch.testing.assert_close(factor, u @ vh, atol=1e-8, rtol=0)


def test_only_matrices_that_do_not_converge_get_an_svd(monkeypatch):
    weight = torch.stack([matrix(0, (4, 3)), torch.zeros(4, 3).double(), matrix(1, (4, 3))])
    given, decompose = [], torch.linalg.svd
    monkeypatch.setattr(
        torch.linalg, "svd", lambda w, **options: given.append(len(w)) or decompose(w, **options)
    )
    factor, _ = spectrum.polar_factor(weight)
    assert given == [1]
    identity = torch.eye(3).double().expand(3, 3, 3)
    torch.testing.assert_close(factor.mT @ factor, identity, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("decay", "needed"), [(0, 0), (1, 2), (2, 4), (4, 7)])
def test_lifting_steps_rise_to_what_the_matrix_needs(decay, needed):
    lifts = 0
    for _ in range(12):
        _, lifts = spectrum.polar_factor(matrix(0, (6, 5), decay), lifts=lifts)
    assert abs(lifts - needed) <= 1
    assert spectrum.polar_factor(matrix(0, (6, 5), decay), lifts=lifts)[1] == lifts


def test_lifting_steps_stay_within_half_of_the_iterations():
    lifts = 8
    for _ in range(30):
        factor, lifts = spectrum.polar_factor(torch.zeros(1, 4, 3), lifts=lifts)
        torch.testing.assert_close(factor.mT @ factor, torch.eye(3)[None], atol=1e-5, rtol=0)
    assert lifts == 20


@given(seeds, shapes, st.floats(0.02, 1.2), st.floats(1e-4, 0.1))
def test_log_prox_moves_singular_values_to_where_the_objective_is_flat(seed, shape, decay, tau):
    weight = matrix(seed, shape, decay)
    before = torch.linalg.svdvals(weight)
    after = torch.linalg.svdvals(spectrum.prox_log_condition(weight, tau))
    n, tolerance = len(before), 1e-7
    if after[0] - after[-1] < tolerance:
        torch.testing.assert_close(after, before.mean().expand(n), atol=1e-6, rtol=0)
        return
    top = int((after > after[0] - tolerance).sum())
    bottom = int((after < after[-1] + tolerance).sum())
    middle = slice(top, n - bottom)
    torch.testing.assert_close(after[middle], before[middle], atol=1e-9, rtol=0)
    pull_top, pull_bottom = tau / after[0], tau / after[-1]
    torch.testing.assert_close((before - after)[:top].sum(), pull_top, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        (after - before)[n - bottom :].sum(), pull_bottom, atol=1e-5, rtol=1e-5
    )


def test_singular_values_that_the_log_prox_would_swap_become_their_mean():
    weight = matrix(0, (5, 3), 0.1)
    sigma = torch.linalg.svdvals(spectrum.prox_log_condition(weight, 0.5))
    mean = torch.linalg.svdvals(weight).mean()
    torch.testing.assert_close(sigma, mean.expand(3), atol=1e-9, rtol=0)


@pytest.mark.parametrize("decay", [0, 1])
def test_lifting_steps_fall_to_what_the_matrix_needs(decay):
    lifts, before = 9, 10
    while lifts < before:
        before = lifts
        _, lifts = spectrum.polar_factor(matrix(0, (6, 5), decay), tolerance=2e-2, lifts=before)
        assert before - lifts in (0, 1)
    assert 0 <= lifts < 9
