from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from condiquant_plugin import FakeQuantizer, InputError
from condiquant_plugin.uniform import bounds, grid
from condiquant_plugin.uniform.fake_quantizer import fake_quantize_op

bit_widths = st.integers(2, 8)
kinds = st.sampled_from(["weight", "activation", "operand"])
overflows = st.sampled_from(["safe", "vnni"])
lowers = st.floats(-50, 50)
widths = st.floats(1e-3, 100)


@given(bit_widths, kinds, overflows)
def test_every_level_fits_its_8_bit_type(bits, kind, overflow):
    bits = grid.fitting_bits(bits, kind, overflow)
    cells = grid.lattice(bits, kind, overflow=overflow)
    last = cells.refinement * (2**bits - 1)
    for zero in (cells.lowest_zero, cells.highest_zero):
        if kind != "weight" and zero == 0:
            assert last <= 255
        else:
            assert -zero >= -128
            assert last - zero <= 127


def integer_extremes(bits, kind):
    """Every pair of lowest and highest integer that a safe grid may have."""
    cells = grid.lattice(bits, kind)
    last = cells.refinement * (2**bits - 1)
    zeros = range(cells.lowest_zero, cells.highest_zero + 1, cells.zero_spacing)
    return [(-zero, last - zero) for zero in zeros]


@pytest.mark.parametrize(("first", "second"), [("activation", "weight"), ("operand", "operand")])
def test_no_pair_of_products_of_safe_integers_overflows_16_bits(first, second):
    # 8-bit weights have a smallest step instead.
    widest = 7 if second == "weight" else 8
    for bits, other_bits in product(range(2, 9), range(2, widest + 1)):
        for low, high in integer_extremes(grid.fitting_bits(bits, first), first):
            # Without VNNI kernels shift signed bytes by 128 and take them for unsigned.
            byte = high + 128 if low < 0 else high
            for lowest, highest in integer_extremes(grid.fitting_bits(other_bits, second), second):
                # No int8 kernel takes an unsigned second operand of 7 bits.
                if second == "weight" or lowest < 0:
                    assert 2 * byte * lowest >= -(2**15)
                    assert 2 * byte * highest < 2**15


def test_safe_grids_have_the_bits_that_fit():
    assert grid.fitting_bits(8, "operand") == 7
    assert grid.fitting_bits(8, "activation") == grid.fitting_bits(8, "weight") == 8
    for bits, kind in product(range(2, 9), ("weight", "activation", "operand")):
        assert grid.fitting_bits(bits, kind, "vnni") == bits
        assert grid.fitting_bits(bits, kind) == (7 if bits == 8 and kind == "operand" else bits)
        assert FakeQuantizer(bits, kind).bits == grid.fitting_bits(bits, kind)
        assert FakeQuantizer(bits, kind, overflow="vnni").bits == bits
    with pytest.raises(InputError, match='use 7 bits, or overflow="vnni"'):
        grid.lattice(8, "operand")
    with pytest.raises(InputError, match="overflow='none' is not known: use 'safe' or 'vnni'"):
        FakeQuantizer(8, "weight", overflow="none")


@pytest.mark.parametrize("row_blocks", [1, 3, 12])
@pytest.mark.parametrize(("shape", "axis"), [((12, 40), 0), ((12, 5, 3, 3), 0), ((7, 12, 2, 2), 1)])
@given(seed=st.integers(0, 2**31), stretch=st.sampled_from([0.1, 1.0, 3.0]))
@settings(max_examples=20)
def test_8_bit_codes_of_a_safe_weight_have_no_pair_above_128(
    row_blocks, shape, axis, seed, stretch
):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) ** 3
    safe, vnni = (
        FakeQuantizer(8, "weight", row_blocks=row_blocks, axis=axis, overflow=overflow)
        for overflow in ("safe", "vnni")
    )
    for quantizer in (safe, vnni):
        quantizer.search_bounds(weight)
    assert (safe.upper >= vnni.upper).all()
    trained = weight.detach() * stretch  # the bounds are those of the weight before
    snapped = safe.snapped(trained)
    integers = safe(trained).detach() / safe.spread(snapped.step, trained)
    rows = integers.movedim(axis, 0).flatten(1).round()
    torch.testing.assert_close(rows, integers.movedim(axis, 0).flatten(1), atol=1e-3, rtol=0)
    pairs = torch.stack([s.clamp_min(0).topk(2, 1).values.sum(1) for s in (rows, -rows)])
    assert pairs.max() <= 128
    assert pairs.max() >= 126 or stretch < 1 or (safe.upper == vnni.upper).any()


def test_entries_beside_the_only_two_that_are_not_zero_keep_zero():
    weight = torch.tensor([[0.7, -0.7, 0, 0, 0, 0]])
    quantizer = FakeQuantizer(8, "weight")
    quantizer.search_bounds(weight)
    below, above = quantizer.levels_of(weight).limits
    assert (below[:, 2:] == 0).all()
    assert (above[:, 2:] == 0).all()


@given(bit_widths, kinds, overflows, lowers, widths)
def test_snapping_keeps_the_step_and_lays_levels_on_the_lattice(bits, kind, overflow, lower, width):
    bits = grid.fitting_bits(bits, kind, overflow)
    low, up = torch.tensor([lower, lower + width], dtype=torch.float64)
    snapped = grid.snap(low, up, bits, kind, overflow=overflow)
    cells = grid.lattice(bits, kind, overflow=overflow)
    assert snapped.step.item() == pytest.approx(width / (2**bits - 1), rel=1e-6)
    levels = snapped.lower + snapped.step * torch.arange(2**bits)
    positions = levels / (snapped.step / cells.refinement)
    torch.testing.assert_close(positions, positions.round(), atol=1e-6, rtol=0)
    assert snapped.zero == snapped.zero.round()
    inside = cells.lowest_zero < snapped.zero < cells.highest_zero
    if inside and cells.zero_spacing == 1:
        moved = abs(snapped.lower - low) / (snapped.step / cells.refinement)
        assert moved <= 1 + 1e-6
        nearest = (-low / snapped.step * cells.refinement).round()
        assert moved <= 0.5 + 1e-6 or 2 * (nearest % cells.refinement) == cells.refinement


@given(bit_widths, kinds, overflows, lowers, widths)
def test_zero_is_on_no_tie(bits, kind, overflow, lower, width):
    bits = grid.fitting_bits(bits, kind, overflow)
    ends = torch.tensor([lower, lower + width], dtype=torch.float64)
    snapped = grid.snap(*ends, bits, kind, overflow=overflow)
    cells = grid.lattice(bits, kind, overflow=overflow)
    assert cells.lowest_zero <= snapped.zero <= cells.highest_zero
    around = torch.tensor([-1e-6, 0.0, 1e-6], dtype=torch.float64) * snapped.step
    codes = snapped.codes(around)
    assert len(codes.unique()) == 1


@given(bit_widths, kinds, overflows, lowers, widths, st.integers(0, 2**31))
def test_quantized_values_are_levels_and_nearest(bits, kind, overflow, lower, width, seed):
    bits = grid.fitting_bits(bits, kind, overflow)
    ends = torch.tensor(lower), torch.tensor(lower + width)
    snapped = grid.snap(*ends, bits, kind, overflow=overflow)
    x = (
        torch.rand(64, generator=torch.Generator().manual_seed(seed)) * 2 * width
        + lower
        - width / 2
    )
    codes = snapped.codes(x)
    assert codes.min() >= 0
    assert codes.max() <= 2**bits - 1
    levels = snapped.lower + snapped.step * torch.arange(2**bits)
    nearest = (x[:, None] - levels).abs().amin(1)
    error = (snapped.quantize(x) - x).abs()
    torch.testing.assert_close(error, nearest, atol=1e-4 * float(snapped.step) + 1e-5, rtol=1e-4)


def fake_quantizer(bits, lower, step):
    quantizer = FakeQuantizer(bits, "activation")
    quantizer.set_bounds(lower, lower + step * (2**bits - 1))
    return quantizer


def levels(x, bits, lower, step):
    found = grid.Grid(lower, step, bits)
    return found.levels(found.codes(x))


def operator(x, bits, lower, step):
    return fake_quantize_op(x, lower, step, torch.tensor(2 ** (bits - 1)), bits, "", "", 1)


def values(x, bits, lower, step):
    return grid.SnappedGrid(lower, step, bits, torch.tensor(2 ** (bits - 1)), 1).quantize(x)


QUANTIZED = {
    "levels": levels,
    "values": values,
    "operator": operator,
    "training": lambda x, *grid_of: fake_quantizer(*grid_of)(x).detach(),
    "inference": lambda x, *grid_of: fake_quantizer(*grid_of).requires_grad_(False)(x),
}


@pytest.mark.parametrize("form", QUANTIZED)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_form_rounds_to_the_nearest_code_and_ties_to_the_even_one(bits, form):
    step, half = torch.tensor(0.25), 2 ** (bits - 1)
    lower = -half * step
    codes = torch.arange(2**bits)
    for offset in (-0.49, -0.25, 0.0, 0.25, 0.49):
        x = lower + step * (codes + offset)
        assert torch.equal(QUANTIZED[form](x, bits, lower, step), lower + step * codes)
    even = 2 * ((codes + 1) // 2)
    ties = QUANTIZED[form](lower + step * (codes + 0.5), bits, lower, step)
    assert torch.equal(ties, lower + step * even.clamp_max(2**bits - 1))
    outside = QUANTIZED[form](torch.tensor([-1e3, 1e3]), bits, lower, step)
    assert torch.equal(outside, lower + step * torch.tensor([0, 2**bits - 1]))


@given(bit_widths, kinds, overflows, lowers, widths, st.integers(0, 2**31), st.sampled_from([1, 3]))
def test_every_form_computes_what_the_reference_does(
    bits, kind, overflow, lower, width, seed, row_blocks
):
    bits = grid.fitting_bits(bits, kind, overflow)
    quantizer = FakeQuantizer(bits, kind, row_blocks=row_blocks, overflow=overflow)
    scale = torch.logspace(0, 1, row_blocks) if row_blocks > 1 else 1.0
    quantizer.set_bounds(lower * scale, (lower + width) * scale)
    x = torch.empty(6, 16).uniform_(-1, 1, generator=torch.Generator().manual_seed(seed)) * width
    x = torch.cat([x, lower + x, torch.zeros(6, 1)], 1)
    snapped = quantizer.snapped(x).map(lambda bound: quantizer.spread(bound, x))
    ours = (snapped.lower, snapped.step, snapped.zero)
    expected = reference.quantize(x.numpy(), *(t.numpy() for t in ours), bits, snapped.refinement)
    np.testing.assert_array_equal(snapped.quantize(x).numpy(), expected)
    lower, step, zero = ours
    traced = fake_quantize_op(x, lower, step, zero.int(), bits, kind, "", snapped.refinement)
    np.testing.assert_array_equal(traced.numpy(), expected)
    assert not expected[x.numpy() == 0].any()
    # A straight-through lower bound may be off by its last bit, which decides exact ties.
    off = np.abs(expected - (trained := quantizer(x).detach().numpy())) > 0
    positions = snapped.positions(x).numpy()
    assert (np.abs(positions - np.floor(positions) - 0.5)[off] < 1e-3).all()
    with torch.no_grad():
        np.testing.assert_array_equal(quantizer(x).numpy(), trained)


@pytest.mark.parametrize("bits", [1, 9, 0, -4, 4.0, "4", True, None])
def test_bits_outside_2_to_8_are_refused(bits):
    with pytest.raises(InputError, match=r"use an integer from 2 to 8"):
        FakeQuantizer(bits, "weight")


def exhaustive_error(x, bits, kind, side):
    best = float("inf")
    low, high = x.min(), x.max()
    for i in range(100):
        shrink = (high - low) * i / 100
        lower, upper = (
            (low + shrink / 2, high - shrink / 2) if side == "symmetric" else (low, high - shrink)
        )
        snapped = grid.snap(lower, upper, bits, kind)
        error = snapped.quantize(x).sub(x).square().sum()
        best = min(best, float(error))
    return best


@pytest.mark.parametrize("side", ["symmetric", "one_sided"])
@pytest.mark.parametrize("data", ["normal", "softmax", "gelu", "few"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_search_is_as_good_as_trying_every_candidate(bits, data, side):
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(200, 200, generator=generator)
    x = {
        "normal": x,
        "softmax": (3 * x).softmax(1),
        "gelu": torch.nn.functional.gelu(x),
        "few": x[:2, :30],
    }[data].flatten()
    found = bounds.search(x[None], bits, "activation", side=side)
    snapped = grid.snap(found.lower, found.upper, bits, "activation")
    error = snapped.quantize(x).sub(x).square().sum()
    assert float(error) <= 1.01 * exhaustive_error(x, bits, "activation", side)


def test_auto_is_no_worse_than_either_side_and_uses_one_sided_for_softmax():
    x = (
        torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
        .mul(4)
        .softmax(1)
        .reshape(1, -1)
    )
    errors = {
        s: bounds.search(x, 4, "activation", side=s).squared_error
        for s in ("symmetric", "one_sided", "auto")
    }
    assert errors["auto"] <= min(errors["symmetric"], errors["one_sided"])
    assert bounds.search(x, 4, "activation", side="one_sided").lower == 0


@settings(max_examples=30)
@given(bit_widths, kinds, st.floats(-10, 10))
def test_constant_data_gives_finite_bounds(bits, kind, value):
    quantizer = FakeQuantizer(bits, kind)
    x = torch.full((5, 4000), value)
    quantizer.search_bounds(x)
    assert torch.isfinite(quantizer(x)).all()


@pytest.mark.parametrize("overflow", ["safe", "vnni"])
@pytest.mark.parametrize("kind", ["weight", "activation", "operand"])
@pytest.mark.parametrize("bits", [2, 4, 7, 8])
@pytest.mark.parametrize(("low", "high"), [(3.0, 5.0), (-0.3, 0.5), (-5.0, -3.0)])
def test_searched_grids_cover_data_on_either_side_of_zero(bits, kind, overflow, low, high):
    bits = grid.fitting_bits(bits, kind, overflow)
    x = torch.linspace(low, high, 4001)
    found = bounds.search(x[None], bits, kind, overflow=overflow)
    snapped = grid.snap(found.lower, found.upper, bits, kind, overflow=overflow)
    widest = max(high, 0.0) - min(low, 0.0)
    step = 1.3 * widest / (2**bits - 1)
    assert (snapped.quantize(x) - x).abs().max() <= step


def assert_same_bounds(found, expected):
    for mine, theirs in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.04, atol=0)


def test_bounds_of_more_than_a_million_entries_do_not_depend_on_their_order():
    x = torch.randn(3 * 2**20 + 5) + 0.3
    by_size = x[x.abs().argsort()]
    forward, backward, scattered = (
        bounds.search(rows[None], 4, "activation") for rows in (by_size, by_size.flip(0), x)
    )
    assert_same_bounds(forward, scattered)
    assert_same_bounds(backward, scattered)


@pytest.mark.parametrize("channels", [2, 4])
def test_bounds_of_more_than_a_million_entries_see_all_channels_alike(channels):
    x = torch.randn(2**20, channels) * torch.linspace(0.01, 1, channels)
    sample = x[:: 8 * channels].reshape(1, -1)
    sample = torch.cat([sample, x.aminmax().min[None, None], x.aminmax().max[None, None]], 1)
    found = bounds.search(x.reshape(1, -1), 3, "activation")
    assert_same_bounds(found, bounds.search(sample, 3, "activation"))


@pytest.mark.parametrize("kind", ["weight", "activation"])
@pytest.mark.parametrize("entries", [100, 2**16, 2**21])
@pytest.mark.parametrize("bits", [2, 8])
def test_the_squared_error_of_a_search_is_that_of_its_bounds(bits, entries, kind):
    x = torch.randn(2, entries) + torch.tensor([[0.5], [-1.0]])
    found = bounds.search(x, bits, kind)
    snapped = grid.snap(found.lower, found.upper, bits, kind)
    by_row = snapped.map(lambda bound: bound[:, None])
    error = (by_row.quantize(x) - x).double().square().sum(1)
    tolerance = 5e-3 if entries < 2**20 else 5e-2  # a sample has few of the clipped entries
    torch.testing.assert_close(found.squared_error.double(), error, rtol=tolerance, atol=0)


@pytest.mark.parametrize("side", ["symmetric", "one_sided"])
def test_no_finer_choice_of_bounds_is_much_better(side):
    x = (
        torch.nn.functional.gelu(torch.randn(1, 20_000))
        if side == "one_sided"
        else torch.randn(1, 20_000)
    )
    found = bounds.search(x, 4, "activation", side=side)
    finer = bounds.search(x, 4, "activation", side=side, candidates=1000)
    assert (
        float(finer.squared_error)
        <= float(found.squared_error)
        <= 1.01 * float(finer.squared_error)
    )


@pytest.mark.parametrize("candidates", [1, 10])
def test_the_first_candidate_is_the_whole_range(candidates):
    x = torch.cat([torch.linspace(-3, 5, 17), torch.zeros(3)])[None]
    search = partial(bounds.search, overflow="vnni", candidates=candidates)
    found = search(x, 4, "operand")
    assert (found.lower.item(), found.upper.item()) == pytest.approx((-3, 5), abs=0.04)
    rows = torch.cat([x, 10 * x])
    both = search(rows, 4, "operand")
    assert_same_bounds(both, [torch.cat([bound, 10 * bound]) for bound in found[:2]])
