import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from condiquant_plugin import InputError
from condiquant_plugin.methods.adasvd.low_rank import (
    ClosedForm,
    alternation,
    balanced,
    left_step,
    plain_start,
    right_step,
)
from condiquant_plugin.methods.adasvd.method import AdaSVD
from condiquant_plugin.methods.compression.stacks import output_loss
from weight_problems import matrices, problem

seeds = st.integers(0, 2**16)
shapes = st.sampled_from([(12, 16), (16, 12), (8, 8)])


def loss(weight, gram, factors):
    return float(output_loss(factors[0] @ factors[1] - weight, gram).sum())


@given(seed=seeds, shape=shapes, rank=st.integers(1, 8))
def test_no_step_of_the_alternation_raises_the_loss(seed, shape, rank):
    weight, gram = matrices(seed, *shape)
    left, right = plain_start(weight, rank)
    before = loss(weight, gram, (left, right))
    for _ in range(4):
        left = left_step(weight, gram, right)
        after_left = loss(weight, gram, (left, right))
        right = right_step(weight, left)
        after = loss(weight, gram, (left, right))
        assert after_left <= before * (1 + 1e-9) + 1e-9
        assert after <= after_left * (1 + 1e-9) + 1e-9
        before = after


@given(seed=seeds, shape=shapes, rank=st.integers(1, 8), moved=st.floats(0.01, 1))
def test_each_step_is_at_its_minimum(seed, shape, rank, moved):
    weight, gram = matrices(seed, *shape)
    right = plain_start(weight, rank)[1]
    left = left_step(weight, gram, right)
    away = left + moved * torch.randn_like(left)
    assert loss(weight, gram, (left, right)) <= loss(weight, gram, (away, right)) + 1e-9
    best = right_step(weight, left)
    away = best + moved * torch.randn_like(best)
    assert loss(weight, gram, (left, best)) <= loss(weight, gram, (left, away)) + 1e-9


@given(seed=seeds, shape=shapes, rank=st.integers(1, 7))
def test_the_closed_form_is_where_the_alternation_goes(seed, shape, rank):
    weight, gram = matrices(seed, *shape)
    closed = ClosedForm.of(weight, gram)
    best = loss(weight, gram, closed.cut(rank))
    losses = [loss(weight, gram, alternation(weight, gram, rank, n)) for n in (0, 1, 4, 300)]
    total = float(output_loss(weight, gram))
    assert all(best <= x + 1e-9 * total for x in losses)
    # As far as its gap between eigenvalues takes it.
    gap = float(closed.energies[0, rank - 1] / closed.energies[0, rank].clamp_min(1e-12))
    if gap > 1.2:
        assert losses[-1] == pytest.approx(best, rel=1e-5, abs=1e-9 * total)


@given(seed=seeds, shape=shapes)
def test_what_a_rank_leaves_is_the_energy_of_the_rest(seed, shape):
    weight, gram = matrices(seed, *shape)
    closed = ClosedForm.of(weight, gram)
    for rank in (1, 3, 7):
        left = loss(weight, gram, closed.cut(rank))
        assert left == pytest.approx(float(closed.energies[0, rank:].sum()), rel=1e-6, abs=1e-9)


def test_a_singular_gram_matrix_has_a_closed_form_too():
    weight, gram = matrices(3, 16, 12, samples=5)
    closed = ClosedForm.of(weight, gram)
    total = float(output_loss(weight, gram))
    assert loss(weight, gram, closed.cut(5)) < 1e-9 * total
    assert loss(weight, gram, closed.cut(4)) > 1e-6 * total


@given(seed=seeds)
def test_balanced_factors_have_the_same_product(seed):
    left, right = plain_start(matrices(seed)[0], 5)
    evened = balanced(left * 1e6, right * 1e-6)
    assert torch.allclose(evened[0] @ evened[1], left @ right)
    assert torch.allclose(evened[0].norm(dim=-2), evened[1].norm(dim=-1))


@pytest.mark.parametrize("kind", ["linear", "tall", "grouped"])
def test_layers_get_the_rank_of_their_ratio(kind):
    asked = problem(kind, bias=kind == "linear")
    (solution,) = AdaSVD(0.5).solve([asked])
    form, report = solution.form, solution.report
    assert form.left.numel() + form.right.numel() <= 0.5 * asked.weight.numel()
    assert report.bits_per_weight == pytest.approx(
        16 * (form.left.numel() + form.right.numel()) / asked.weight.numel()
    )
    assert solution.weight.shape == asked.weight.shape
    assert solution.bias is asked.bias
    x = torch.randn(3, asked.weight.shape[1])
    if kind == "linear":
        product = (x @ form.right[0].float().mT) @ form.left[0].float().mT
        assert torch.allclose(x @ solution.weight.mT, product, atol=1e-4)


def test_named_ranks_go_before_the_ratio_and_none_stays_dense():
    layers = [problem(seed=n, name=f"{n}") for n in range(3)]
    found = AdaSVD(0.5, ranks={"0": 2, "1": None}).solve(layers)
    assert found[0].form.rank == 2
    assert torch.equal(found[1].weight, layers[1].weight)
    assert found[1].report.output_error == 0
    assert found[2].form.rank == 4


def test_rounds_are_the_papers_alternation():
    asked = problem(seed=5)
    errors = [
        AdaSVD(0.5, rounds=n).solve([asked])[0].report.output_error for n in (0, 1, 3, 10, None)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1.05 * errors[-1]


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: AdaSVD(0), "ratio=0: use more than 0 and at most 1"),
        (lambda: AdaSVD(1.2), "ratio=1.2: use more than 0 and at most 1"),
        (lambda: AdaSVD(rounds=-1), "rounds=-1: use 0 or more"),
    ],
)
def test_settings_outside_their_range_are_named(build, words):
    with pytest.raises(InputError, match=words):
        build()
