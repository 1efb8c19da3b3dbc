import math
import re
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from condiquant_plugin import InputError
from condiquant_plugin.layerwise.moments import weight_matrix
from condiquant_plugin.methods.arb.method import ARB
from condiquant_plugin.methods.arb.refinement import rounded
from condiquant_plugin.methods.compression.stacks import output_loss
from condiquant_plugin.methods.pbs2p.method import PBS2P
from condiquant_plugin.methods.pbs2p.pruning import (
    groups_like,
    nm_mask,
    one_fewer,
    pruning_score,
    refitted,
    spbo,
)
from condiquant_plugin.methods.pbs2p.search import patterns_for
from weight_problems import matrices, problem

seeds = st.integers(0, 2**16)
patterns = st.sampled_from([(1, 4), (2, 4), (3, 4), (4, 8), (5, 8), (7, 8)])


@given(seed=seeds, pattern=patterns)
def test_masks_keep_exactly_n_of_m_and_those_of_highest_score(seed, pattern):
    n, m = pattern
    score = matrices(seed)[0].abs()
    parts, kept = score.unflatten(-1, (-1, m)), nm_mask(score, n, m).unflatten(-1, (-1, m))
    assert torch.equal(kept.sum(-1), torch.full_like(kept[..., 0], n))
    lowest = torch.where(kept > 0, parts, torch.inf).amin(-1)
    assert (lowest >= torch.where(kept > 0, 0, parts).amax(-1)).all()


@given(seed=seeds, pattern=patterns, ties=st.booleans())
def test_steps_end_at_the_mask_of_one_shot(seed, pattern, ties):
    n, m = pattern
    score = matrices(seed)[0].abs()
    score = score.round() if ties else score
    mask = torch.ones_like(score)
    for step in range(1, m - n + 1):
        mask = one_fewer(mask, score, m)
        count = mask.unflatten(-1, (-1, m)).sum(-1)
        assert torch.equal(count, torch.full_like(count, m - step))
    assert torch.equal(mask, nm_mask(score, n, m))


@given(seed=seeds, pattern=patterns)
def test_no_refit_raises_the_loss_and_the_last_is_at_its_minimum(seed, pattern):
    W, G = matrices(seed)
    G = G + 0.01 * torch.eye(16, dtype=G.dtype)
    start = [rounded(W, torch.ones_like(W))]
    score = pruning_score(W, 1 / G.diagonal(dim1=-2, dim2=-1)[:, None])

    def loss(groups):
        return float(output_loss(sum(g.dense() for g in groups) - W, G))

    mask, found = torch.ones_like(W), start
    for _ in range(pattern[1] - pattern[0]):
        mask = one_fewer(mask, score, pattern[1])
        pruned = [replace(g, mask=g.mask * mask) for g in groups_like(start, found)]
        found = refitted(groups_like(start, found), mask, W, G, 1)
        assert loss(found) <= loss(pruned) * (1 + 1e-9)
    stepwise, last = spbo(W, G, start, score, pattern, 1)
    assert torch.equal(last, mask)
    assert loss(stepwise) == pytest.approx(loss(found))
    # One term: its least squares, row by row.
    term = mask * start[0].planes[0].signs
    alpha = (term @ G * W).sum(-1) / (term @ G * term).sum(-1)
    assert torch.allclose(stepwise[0].planes[0].rows[..., 0], alpha)


@pytest.mark.parametrize("kind", ["linear", "grouped"])
@pytest.mark.parametrize("pattern", [(2, 4), (4, 8), (5, 8)])
def test_the_deployable_form_is_ternary_with_counted_bits(kind, pattern):
    asked = problem(kind)
    (solution,) = PBS2P(8, pattern=pattern).solve([asked])
    n, m = pattern
    codes = solution.form.codes()
    assert set(codes.unique().tolist()) == {-1, 0, 1}
    count = codes.abs().unflatten(-1, (-1, m)).sum(-1)
    assert torch.equal(count, torch.full_like(count, n))
    dense = codes * solution.form.row_scales[..., 0].float().repeat_interleave(8, -1)
    assert torch.equal(dense, weight_matrix(solution.weight, asked.geometry))
    expected = n / m + math.log2(math.comb(m, n)) / m + 16 / 8
    assert solution.report.bits_per_weight == pytest.approx(expected)


def test_salient_columns_and_two_scales_lower_the_error_and_take_bits():
    asked = [problem("tall", seed=seed) for seed in range(4)]
    one = PBS2P(8).solve(asked)
    rich = PBS2P(8, salient_share=0.125, large_quantile=0.8).solve(asked)
    assert sum(s.report.output_error for s in rich) < sum(s.report.output_error for s in one)
    form = rich[0].form
    columns, rows = int(form.flags(form.salient).sum()), 12
    assert columns == 32 // 8
    bits = 0.5 * 32 * rows + 32 + 0.5 * columns * rows + 0.5 * (32 - columns) * rows
    bits += 32 * rows * math.log2(70) / 8 + 16 * 4 * 4 * rows
    assert rich[0].report.bits_per_weight == pytest.approx(bits / (32 * rows))
    assert torch.equal(rich[0].weight != 0, form.flags(form.kept)[0])


def test_a_zero_is_a_third_level_so_pruned_beats_unpruned():
    asked = [problem("tall", seed=seed) for seed in range(4)]
    pruned = sum(s.report.output_error for s in PBS2P(8).solve(asked))
    binary = sum(s.report.output_error for s in ARB(8, refinement="rounding").solve(asked))
    assert pruned < 0.8 * binary


def test_layers_may_have_patterns_of_their_own_and_keep_their_order():
    asked = [problem(seed=n, name=f"{n}") for n in range(3)]
    found = PBS2P(8, patterns={"1": (6, 8)}).solve(asked)
    assert [s.report.name for s in found] == ["0", "1", "2"]
    kept = [float((s.weight != 0).float().mean()) for s in found]
    assert kept == [0.5, 0.75, 0.5]


@given(
    importances=st.lists(st.floats(0.01, 20), min_size=2, max_size=12),
    target=st.sampled_from([4, 5, 6]),
    spread=st.integers(0, 2),
)
def test_the_coarse_search_keeps_its_average(importances, target, spread):
    names = [f"{i}" for i in range(len(importances))]
    found = patterns_for(
        dict(zip(names, importances, strict=True)), dict.fromkeys(names, 100), (target, 8), spread
    )
    kept = [found[name][0] for name in names]
    assert sum(kept) == target * len(kept)
    assert all(abs(n - target) <= spread for n in kept)
    order = sorted(range(len(kept)), key=importances.__getitem__)
    if max(importances) < 2 * min(importances):
        assert all(kept[a] <= kept[b] + 1 for a, b in pairwise(order))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: PBS2P(pattern=(8, 8)), "pattern=8:8 keeps 8 of every 8: use 1 to 7 of 8"),
        (lambda: PBS2P(pattern=(0, 4)), "pattern=0:4 keeps 0 of every 4: use 1 to 3 of 4"),
        (lambda: PBS2P(patterns={"x": (5, 4)}), "pattern=5:4 keeps 5 of every 4"),
        (lambda: PBS2P(salient_share=1), "salient_share=1: use 0 to less than 1"),
        (lambda: PBS2P(rounds=-1), "rounds=-1: use 0 or more"),
        (
            lambda: PBS2P(4).solve([problem()]),
            "pattern=4:8 does not divide the 4 columns of a group of layer",
        ),
        (
            lambda: patterns_for({"a": 1.0}, {"a": 1}, (4, 8), -1),
            "spread=-1: use 0 or more",
        ),
    ],
)
def test_bad_input_is_named_in_one_line(build, words):
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        build()
    assert "\n" not in str(caught.value)
