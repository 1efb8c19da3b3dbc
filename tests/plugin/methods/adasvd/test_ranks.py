from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from condiquant_plugin import InputError
from condiquant_plugin.methods.adasvd.ranks import (
    adaptive_ratio,
    kept_parameters,
    layer_ratios,
    rank_of,
    ranks_for,
)

SHAPES = [(576, 576), (192, 576), (1536, 576), (576, 1536)]


def test_adacr_is_the_papers_line_cut_at_one():
    assert adaptive_ratio(1.0, 0.8, 0.6) == 0.8
    assert adaptive_ratio(0.5, 0.8, 0.6) == pytest.approx(0.7)
    assert adaptive_ratio(12.0, 0.8, 0.6) == 1.0


@given(
    importances=st.lists(st.floats(0, 20), min_size=2, max_size=12),
    ratio=st.sampled_from([0.4, 0.6, 0.8]),
    spread=st.sampled_from([0.0, 0.1, 0.2]),
)
def test_the_budget_is_met_exactly_whatever_is_clipped(importances, ratio, spread):
    sizes = [SHAPES[i % 4][0] * SHAPES[i % 4][1] for i in range(len(importances))]
    found = layer_ratios(importances, sizes, ratio, ratio - spread)
    kept = sum(r * s for r, s in zip(found, sizes, strict=True))
    assert kept == pytest.approx(ratio * sum(sizes), rel=1e-9)
    assert all(0 < r <= 1 + 1e-12 for r in found)
    order = sorted(range(len(found)), key=importances.__getitem__)
    assert all(found[a] <= found[b] + 1e-9 for a, b in pairwise(order))


@given(
    importances=st.lists(st.floats(0.01, 20), min_size=3, max_size=12),
    ratio=st.sampled_from([0.4, 0.6, 0.8]),
)
def test_ranks_keep_no_more_than_the_budget_and_miss_it_by_less_than_a_rank(importances, ratio):
    shapes = {f"{i}": SHAPES[i % 4] for i in range(len(importances))}
    sizes = [m * n for m, n in shapes.values()]
    ratios = dict(zip(shapes, layer_ratios(importances, sizes, ratio, ratio - 0.2), strict=True))
    ranks = ranks_for(ratios, shapes, ratio)
    kept = sum(kept_parameters(ranks[name], *shapes[name]) for name in shapes)
    assert kept <= ratio * sum(sizes)
    room = [
        sum(s) for n, s in shapes.items() if ranks[n] is not None and ranks[n] < 0.9 * rank_limit(s)
    ]
    if room:
        assert kept + min(room) > ratio * sum(sizes)
    for name, rank in ranks.items():
        assert rank is None or 1 <= rank <= rank_limit(shapes[name])


def rank_limit(shape):
    return (shape[0] * shape[1] - 1) // sum(shape)


def test_factors_that_are_not_smaller_are_not_taken():
    assert rank_of(1.0, 576, 576) is None
    assert rank_of(0.999, 576, 576) == 287
    assert rank_of(0.8, 576, 1536) == 335
    assert rank_of(0.001, 576, 576) == 1


@pytest.mark.parametrize("ratio", [0, 1.5, -0.1])
def test_a_ratio_outside_its_range_is_named(ratio):
    with pytest.raises(InputError, match=f"ratio={ratio}: use more than 0 and at most 1"):
        layer_ratios([1.0], [4], ratio, 0.0)


def test_a_least_ratio_above_the_ratio_is_named():
    with pytest.raises(InputError, match=r"least_ratio=0.9: use 0 to ratio=0.8"):
        layer_ratios([1.0], [4], 0.8, 0.9)
