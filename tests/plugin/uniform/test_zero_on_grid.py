import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from condiquant_plugin import FakeQuantizer
from condiquant_plugin.uniform import bounds, grid

kinds = st.sampled_from(["weight", "activation", "operand"])
grids = st.builds(
    lambda bits, kind: (grid.fitting_bits(bits, kind), kind), st.integers(2, 8), kinds
)
overflows = st.sampled_from(["safe", "vnni"])
lowers, widths = st.floats(-50, 50), st.floats(1e-3, 100)


@given(grids, lowers, widths)
def test_zero_is_a_level_and_levels_are_multiples_of_the_step(grid_of, lower, width):
    bits, kind = grid_of
    low, up = torch.tensor([lower, lower + width], dtype=torch.float64)
    snapped = grid.snap(low, up, bits, kind, zero_on_grid=True)
    levels = snapped.lower + snapped.step * torch.arange(2**bits)
    multiples = levels / snapped.step
    torch.testing.assert_close(multiples, multiples.round(), atol=1e-9, rtol=0)
    assert 0 in multiples.round()
    assert snapped.step.item() == pytest.approx(width / (2**bits - 1), rel=1e-9)


@given(st.integers(2, 8), overflows, lowers, widths)
def test_weights_are_symmetric(bits, overflow, lower, width):
    bits = grid.fitting_bits(bits, "weight", overflow)
    ends = torch.tensor([lower, lower + width])
    snapped = grid.snap(*ends, bits, "weight", zero_on_grid=True, overflow=overflow)
    half = 2 ** (bits - 1)
    assert snapped.zero == half
    integers = torch.arange(2**bits) - snapped.zero
    assert (integers.min(), integers.max()) == (-half, half - 1)


@given(st.integers(2, 8), kinds, overflows)
def test_with_all_bits_of_a_kernel_the_lattice_is_the_grid_already(bits, kind, overflow):
    most, bits = (grid.fitting_bits(b, kind, overflow) for b in (8, bits))
    cells = grid.lattice(bits, kind, zero_on_grid=True, overflow=overflow)
    assert cells.refinement == 1
    is_the_grid = bits == most or (bits == most - 1 and kind != "weight")
    assert (cells == grid.lattice(bits, kind, overflow=overflow)) == is_the_grid


@given(st.integers(2, 8), kinds, st.floats(-2, 2), st.integers(0, 10**6))
def test_searched_bounds_are_on_the_grid_and_stay_there(bits, kind, shift, seed):
    x = torch.randn(3000, generator=torch.Generator().manual_seed(seed)) + shift
    quantizer = FakeQuantizer(bits, kind, zero_on_grid=True)
    quantizer.search_bounds(x)
    snapped = quantizer.snapped()
    torch.testing.assert_close(snapped.lower, quantizer.lower.detach(), rtol=1e-5, atol=1e-6)
    multiples = quantizer(x).detach() / snapped.step
    torch.testing.assert_close(multiples, multiples.round(), atol=1e-3, rtol=0)
    assert quantizer(torch.zeros(1)).abs() <= 1e-5 * snapped.step


def best_error(x, bits, kind):
    """Over a fine mesh of steps and every position of zero."""
    cells, widest = grid.lattice(bits, kind, zero_on_grid=True), 2 * x.abs().max()

    def grid_of(zero, step):
        return grid.SnappedGrid(-zero * step, step, bits, torch.tensor(zero), 1)

    errors = [
        (grid_of(zero, step).quantize(x) - x).square().sum()
        for step in torch.linspace(0.02, 1.05, 100) * widest / (2**bits - 1)
        for zero in range(cells.lowest_zero, cells.highest_zero + 1)
    ]
    return float(torch.stack(errors).min())


@pytest.mark.parametrize("kind", ["weight", "activation", "operand"])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("data", ["normal", "shifted", "gelu"])
def test_search_is_near_the_best_grid_with_zero_on_it(bits, kind, data):
    x = torch.randn(2000)
    x = {"normal": x, "shifted": x + 0.7, "gelu": torch.nn.functional.gelu(x)}[data]
    side = "symmetric" if kind == "weight" else "auto"
    found = bounds.search(x[None], bits, kind, side=side, zero_on_grid=True)
    assert float(found.squared_error) <= 1.15 * best_error(x, bits, kind)


def test_switching_a_quantizer_moves_its_grid():
    quantizer = FakeQuantizer(4, "activation")
    quantizer.set_bounds(-1.03, 2.0)
    free = quantizer.snapped()
    quantizer.zero_on_grid = True
    moved = quantizer.snapped()
    assert torch.equal(free.step, moved.step)
    assert 0 < (free.lower - moved.lower).abs() <= moved.step / 2
    assert "zero_on_grid=True" in repr(quantizer)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, 4), ({"overflow": "vnni"}, 8), ({"zero_on_grid": True, "overflow": "vnni"}, 1)],
)
def test_the_traced_operator_says_how_fine_its_lattice_is(options, expected):
    quantizer = FakeQuantizer(4, "weight", name="w", **options)
    traced = torch.jit.trace(quantizer, torch.randn(50), check_trace=False)
    (node,) = traced.graph.findAllNodes("condiquant::fake_quantize")
    *_, zero, bits, kind, name, refinement = node.inputs()
    values = [value.toIValue() for value in (bits, kind, name, refinement)]
    assert values == [4, "weight", "w", expected]
    while zero.node().kind() != "prim::Constant":
        zero = next(zero.node().inputs())
    assert zero.toIValue() == quantizer.snapped().zero
