import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from condiquant_plugin.methods.alignment.transform import alignment, rotation

SHAPES = st.tuples(st.integers(1, 40), st.integers(2, 24))


def drawn(shape, seed, exponent=-2):
    """A weight, and a covariance whose directions vary ``10 ** -exponent`` times as much as others."""
    outputs, features = shape
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(outputs, features, generator=generator, dtype=torch.float64)
    spread = torch.logspace(0, exponent, features, dtype=torch.float64)
    basis = torch.randn(features, features, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(basis)[0]
    mean = torch.randn(features, generator=generator, dtype=torch.float64)
    return rows, basis * spread.square() @ basis.mT, mean


def cost(transform, rows, covariance):
    """What rounding to one grid costs the output: the squared norm of the weight behind, times the mean
    variance of what is rounded."""
    matrix = transform.matrix.double()
    variance = (matrix @ covariance @ matrix.mT).trace() / len(matrix)
    return float(transform.rows_behind(rows).square().sum() * variance)


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(0, 99), st.sampled_from([rotation, "alignment"]))
def test_weight_and_shift_behind_give_what_the_layer_gave(shape, seed, kind):
    rows, covariance, mean = drawn(shape, seed)
    found = kind(mean) if kind is rotation else alignment(rows, covariance, mean)
    x = mean + torch.randn(50, shape[1], dtype=torch.float64) @ torch.linalg.cholesky(covariance).mT
    given_now = x @ found.matrix.double().mT + found.shift.double()
    behind = found.rows_behind(rows)
    expected = x @ rows.mT
    shifted = (given_now - found.shift.double()) @ behind.mT
    assert (shifted - expected).abs().max() < 1e-9 * expected.abs().max().clamp_min(1)
    integers = found.matrix * 128
    assert torch.equal(integers, integers.round())
    assert integers.abs().max() == 127


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 24), st.integers(0, 99))
def test_nothing_costs_less_than_an_alignment(features, seed):
    rows, covariance, mean = drawn((2 * features, features), seed)
    found = alignment(rows, covariance, mean)
    reached = cost(found, rows, covariance)
    axes = torch.linalg.eigh(covariance)
    root = axes[1] * axes[0].clamp_min(0).sqrt() @ axes[1].mT
    # By Cauchy-Schwarz no matrix goes below the squared nuclear norm over the features.
    bound = float(torch.linalg.svdvals(rows @ root).sum() ** 2 / features)
    assert bound * 0.999 < reached < bound * 1.05
    assert reached < cost(rotation(mean), rows, covariance) * 1.001


def test_all_entries_of_what_is_rounded_are_equally_wide():
    rows, covariance, mean = drawn((90, 60), 0)
    matrix = alignment(rows, covariance, mean).matrix.double()
    variances = (matrix @ covariance @ matrix.mT).diagonal()
    assert variances.max() < 2 * variances.min()


@pytest.mark.parametrize("what", ["input", "weight"])
def test_where_there_is_nothing_to_align_it_is_a_rotation(what):
    rows, covariance, mean = drawn((6, 12), 1)
    rows, covariance = rows * (what != "weight"), covariance * (what != "input")
    found, plain = alignment(rows, covariance, mean), rotation(mean)
    assert torch.equal(found.matrix, plain.matrix)
    assert torch.equal(found.shift, plain.shift)


def test_what_never_varies_or_is_never_read_keeps_a_matrix_that_can_be_undone():
    rows, covariance, mean = drawn((3, 12), 2)
    covariance[:, 4] = covariance[4] = 0
    found = alignment(rows, covariance, mean)
    assert torch.linalg.cond(found.matrix.double()) <= 100
    assert found.shift.isfinite().all()


@settings(max_examples=20, deadline=None)
@given(SHAPES, st.integers(0, 99))
def test_however_narrow_some_directions_are_the_rounded_matrix_can_be_undone(shape, seed):
    rows, covariance, mean = drawn(shape, seed, exponent=-7)
    found = alignment(rows, covariance, mean)
    back = found.rows_behind(rows) @ found.matrix.double()
    assert (back - rows).abs().max() < 1e-9 * rows.abs().max()
    assert torch.linalg.cond(found.matrix.double()) <= 100
