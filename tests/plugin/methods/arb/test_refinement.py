from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from condiquant_plugin.methods.arb import refinement as arb
from condiquant_plugin.methods.arb.bitmaps import search_bitmaps
from condiquant_plugin.methods.compression.stacks import output_loss
from weight_problems import mask_of, matrices

seeds = st.integers(0, 2**16)
ORDERS = {
    "first": (arb.binarized, arb.arb_round),
    "second": (arb.residual_binarized, arb.arb_second_order_round),
}


def error(W, group):
    return float((group.mask * W - group.dense()).square().sum())


@pytest.mark.parametrize("order", ORDERS)
@given(seed=seeds)
def test_no_round_of_arb_raises_the_error(order, seed):
    start, turn = ORDERS[order]
    (W, _), M = matrices(seed), mask_of(seed)
    group = start(W, M)
    for _ in range(6):
        after = turn(W, group)
        assert error(W, after) <= error(W, group) * (1 + 1e-9)
        group = after


@given(seed=seeds)
def test_arb_ends_at_its_own_conditions(seed):
    (W, _), M = matrices(seed), mask_of(seed)
    group = arb.arb(W, M, 200)
    (plane,) = group.planes
    assert torch.equal(plane.signs * M, arb.signs_of(W - group.offset) * M)
    count = M.sum(-1, keepdim=True).clamp_min(1)
    mean = (M * (W - plane.rows * plane.signs)).sum(-1, keepdim=True) / count
    assert torch.allclose(group.offset, mean, atol=1e-9)


@given(seed=seeds)
def test_two_planes_take_the_nearest_of_four_values(seed):
    (W, _), M = matrices(seed), mask_of(seed)
    group = arb.arb_second_order(W, M, 3)
    first, second = group.planes
    values = torch.stack(
        [group.offset + a * first.rows + b * second.rows for a in (-1, 1) for b in (-1, 1)]
    )
    nearest = (values - W).abs().amin(0)
    assert torch.allclose((M * (W - group.dense())).abs(), M * nearest)


@given(seed=seeds)
def test_row_and_column_scales_are_the_rank_one_approximation_of_sizes(seed):
    (W, _), M = matrices(seed), torch.ones(1, 1, 1, dtype=torch.float64)
    group = arb.arb_rc(W, M, 60)
    left, values, right = torch.linalg.svd(W.abs())
    best = values[:, :1, None] * left[..., :1] * right[:, :1]
    assert torch.allclose(group.dense().abs(), best.abs(), rtol=1e-6)
    assert torch.equal(group.dense().sign(), W.sign())
    six = arb.arb_rc(W, M, 6)
    assert error(W, six) == pytest.approx(error(W, group), rel=1e-3)


@given(seed=seeds)
def test_no_round_of_row_and_column_scales_raises_the_error(seed):
    (W, _), M = matrices(seed), mask_of(seed)
    errors = [error(W, arb.arb_rc(W, M, n)) for n in range(5)]
    assert all(b <= a * (1 + 1e-9) for a, b in pairwise(errors[1:]))
    assert errors[1] <= errors[0] * (1 + 1e-9)
    assert error(W, arb.arb_rc_second_order(W, M, 3)) <= errors[3] * (1 + 1e-9)


@pytest.mark.parametrize("planes", [1, 2])
@given(seed=seeds)
def test_the_quick_error_of_row_and_column_scales_is_that_of_the_weight(planes, seed):
    (W, gram), M = matrices(seed), mask_of(seed)
    weights = gram.diagonal(dim1=-2, dim2=-1)[:, None]
    group = (arb.arb_rc, arb.arb_rc_second_order)[planes - 1](W, M, 2)
    exact = float(((M * W - group.dense()).square() * weights).sum())
    assert float(arb.arb_rc_error(W, M, weights, 2, planes)) == pytest.approx(exact, rel=1e-6)


@given(seed=seeds)
def test_the_quick_error_of_whole_columns_is_that_of_a_mask_of_elements(seed):
    (W, gram), chosen = matrices(seed), mask_of(seed, rows=3)[0]
    weights, masks = gram.diagonal(dim1=-2, dim2=-1)[:, None], chosen[:, None, None]
    found = arb.arb_rc_error(W, masks, weights, 2, 1)
    for error_of, mask in zip(found, masks, strict=True):
        expected = arb.arb_rc_error(W, mask.expand_as(W), weights, 2, 1)
        assert torch.allclose(error_of, expected)


def groups(W, M):
    return [arb.binarized(W, M), arb.residual_binarized(W, 1 - M)]


@given(seed=seeds)
@settings(max_examples=10)
def test_no_round_of_arb_x_raises_the_output_loss_and_it_ends_at_least_squares(seed):
    (W, G), M = matrices(seed), mask_of(seed)
    G = G + 0.01 * torch.eye(16, dtype=G.dtype)
    start = groups(W, M)

    def loss(found):
        return float(output_loss(sum(g.dense() for g in found) - W, G))

    losses = [loss(arb.arb_x(W, G, start, n)) for n in range(4)]
    assert loss(start) == pytest.approx(losses[0])
    assert all(b <= a * (1 + 1e-9) for a, b in pairwise(losses))
    terms, _ = arb.terms_of(start, W)
    root = torch.linalg.cholesky(G)
    best = 0.0
    for row in range(W.shape[1]):
        columns = (terms[:, 0, row] @ root[0]).mT
        target = W[0, row] @ root[0]
        found = torch.linalg.lstsq(columns, target[:, None], driver="gelsd").solution
        best += float((columns @ found - target[:, None]).square().sum())
    far = loss(arb.arb_x(W, G, start, 400))
    assert best - 1e-6 <= far <= best * 1.02 + 1e-6


@given(seed=seeds)
def test_each_step_of_arb_x_is_the_published_one(seed):
    (W, G), M = matrices(seed), mask_of(seed)
    start = [arb.binarized(W, M)]
    terms, coefficients = arb.terms_of(start, W)
    found = arb.coordinate_descent(terms, coefficients, W, G, 1)
    Q = (terms * coefficients).sum(0)
    for term, before, after in zip(terms, coefficients, found, strict=True):
        seen = term @ G
        step = (seen * (W - Q)).sum(-1, keepdim=True) / (seen * term).sum(-1, keepdim=True)
        step = torch.where(term.abs().sum(-1, keepdim=True) > 0, step, 0)
        assert torch.allclose(after, before + step)
        Q = Q + step * term


def test_the_sign_of_zero_is_one():
    assert torch.equal(arb.signs_of(torch.tensor([-2.0, 0.0, 3.0])), torch.tensor([-1.0, 1.0, 1.0]))


@pytest.mark.parametrize("splits", [False, True], ids=["billm", "cgb"])
@given(seed=seeds)
def test_bitmaps_are_the_best_of_those_tried(splits, seed):
    W, G = matrices(seed, rows=8, features=16)
    weights = 1 / G.diagonal(dim1=-2, dim2=-1)[:, None]

    def first(W, M, w):
        return ((M * W - arb.binarized(W, M).dense()).square() * w).sum((-2, -1))

    def second(W, M, w):
        return ((M * W - arb.residual_binarized(W, M).dense()).square() * w).sum((-2, -1))

    quantiles = (0.3, 0.6, 0.9)

    def searched(shares, quantiles):
        return search_bitmaps(
            W, weights, first, second, shares=shares, quantiles=quantiles, splits_salient=splits
        )

    def total(found):
        S, g = found.salient_columns(16), found.large
        outer = [(1 - S) * g, (1 - S) * (1 - g)]
        inner = [S * g, S * (1 - g)] if splits else [S.expand_as(W)]
        return float(
            sum(first(W, m, weights) for m in outer) + sum(second(W, m, weights) for m in inner)
        )

    found = searched((0.1, 0.25, 0.5), quantiles)
    share = float(found.salient_columns(16).mean())
    tried = [total(searched((share,), (q,))) for q in quantiles]
    assert total(found) == pytest.approx(min(tried))
    scores = (W.square() * weights).sum(-2)
    inside = found.salient_columns(16)[:, 0] > 0
    assert scores[inside].min() >= scores[~inside].max()
