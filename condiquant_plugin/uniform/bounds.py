"""DOBI: distribution-oriented bound initialisation (2DQuant, arXiv 2406.06649, section 3.2).

The candidates shrink the range of the data; the one with the smallest squared error wins. All candidates
of all rows are scored at once on a histogram, so the data is passed over twice whatever their number.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from condiquant_plugin.uniform import grid

Side = Literal["symmetric", "one_sided", "auto"]
CANDIDATES = 100
_BINS_PER_LEVEL, _FEWEST_BINS = 32, 2048
_MOST_SAMPLES = 2**20


class Bounds(NamedTuple):
    """Result of a search; every tensor has shape ``(rows,)``."""

    lower: Tensor
    upper: Tensor
    squared_error: Tensor
    """Estimated sum of squared quantization errors."""


def search(
    rows: Tensor,
    bits: int,
    kind: grid.Kind,
    *,
    side: Side = "symmetric",
    candidates: int = CANDIDATES,
    zero_on_grid: bool = False,
    overflow: grid.Overflow = grid.DEFAULT_OVERFLOW,
) -> Bounds:
    """Bounds of least squared error for each row, among shrunken ranges snapped to the lattice.

    Ranges without zero are widened to it: 8-bit kernels need an exact zero.

    Args:
        rows: finite values, shape ``(rows, entries)``.
        side: ``"symmetric"`` shrinks both ends alike; ``"one_sided"`` the upper end only (softmax maps,
            inputs behind GELU or ReLU); ``"auto"`` tries both. Where zero is in one of few places
            (8 bits, ``zero_on_grid`` weights) ranges shrink towards it, whatever the side.
        zero_on_grid, overflow: see :func:`condiquant_plugin.uniform.grid.lattice`.
    """
    lowest, highest = rows.amin(1), rows.amax(1)
    centers, counts = _histogram(rows, lowest, highest, bits)
    cells, last_code = grid.lattice(bits, kind, zero_on_grid, overflow), 2**bits - 1
    if cells.zero_is_free:
        candidate = _candidate_bounds(lowest, highest, side, candidates)
        lower, upper = _covering_zero(*candidate, last_code, cells)
    else:  # about its own middle a skewed range would not shrink
        ends = _covering_zero(lowest, highest, last_code, cells)
        lower, upper = (end[:, None] * (1 - _shrink(end, candidates)) for end in ends)
    snapped = grid.snap(lower, upper, bits, kind, zero_on_grid, overflow)
    error = torch.empty_like(lower)
    for row in range(rows.shape[0]):
        tried = grid.Grid(snapped.lower[row, :, None], snapped.step[row, :, None], bits)
        # Values on the lattice would take one pass more.
        residue = tried.levels(tried.codes(centers[row])).sub_(centers[row])
        error[row] = residue.square_() @ counts[row]
    best = error.argmin(1, keepdim=True)
    error *= rows.shape[1] / counts.sum(1, keepdim=True)  # of long rows a part is counted
    return Bounds(*(t.gather(1, best).squeeze(1) for t in (snapped.lower, snapped.upper, error)))


def _candidate_bounds(
    lowest: Tensor, highest: Tensor, side: Side, candidates: int
) -> tuple[Tensor, Tensor]:
    """Lower and upper bounds, shape ``(rows, candidates)`` (twice as many for ``"auto"``)."""
    shrink = _shrink(lowest, candidates)
    width = (highest - lowest)[:, None]
    symmetric = lowest[:, None] + 0.5 * width * shrink, highest[:, None] - 0.5 * width * shrink
    one_sided = lowest[:, None].expand_as(symmetric[0]), highest[:, None] - width * shrink
    if side == "auto":
        return torch.cat([symmetric[0], one_sided[0]], 1), torch.cat(
            [symmetric[1], one_sided[1]], 1
        )
    return symmetric if side == "symmetric" else one_sided


def _shrink(like: Tensor, candidates: int) -> Tensor:
    return torch.arange(candidates, dtype=like.dtype, device=like.device) / candidates


def _covering_zero(
    lower: Tensor, upper: Tensor, last_code: int, cells: grid.Lattice
) -> tuple[Tensor, Tensor]:
    """Ranges widened to what the lattice can hold: zero inside, or at one of few places."""
    lower, upper = lower.clamp_max(0), upper.clamp_min(0)
    lowest_zero = torch.full_like(lower, cells.lowest_zero)
    if cells.zero_spacing > 1:
        lowest_zero[lower < 0] = cells.highest_zero
    above_zero = cells.refinement * last_code - lowest_zero
    steps = (
        (upper - lower) / last_code,
        -lower * cells.refinement / cells.highest_zero,
        upper * cells.refinement / above_zero,
    )
    step = torch.stack(steps).amax(0)
    if not cells.zero_is_free:
        lower = -step * lowest_zero / cells.refinement
    return lower, lower + step * last_code


def _histogram(rows: Tensor, lowest: Tensor, highest: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Bin centres and counts, shape ``(rows, bins)``; bins are far narrower than any grid step.

    Of more than ``_MOST_SAMPLES`` entries every k-th is counted; k is odd, so that it does not fall in
    step with the power-of-two extents of feature maps.
    """
    rows = rows[:, :: rows.shape[1] // _MOST_SAMPLES | 1]
    bins = max(_FEWEST_BINS, _BINS_PER_LEVEL * 2**bits)
    if rows.shape[1] <= bins:
        return rows, torch.ones_like(rows)
    width = (highest - lowest).clamp_min(grid.SMALLEST_STEP) / bins
    counts = torch.stack(
        [
            torch.histc(row, bins, float(low), float(high))
            if high > low
            else _single_bin(row, bins)
            for row, low, high in zip(rows, lowest, highest, strict=True)
        ]
    )
    offsets = torch.arange(bins, dtype=rows.dtype, device=rows.device) + 0.5
    return lowest[:, None] + width[:, None] * offsets, counts


def _single_bin(row: Tensor, bins: int) -> Tensor:
    counts = torch.zeros(bins, dtype=row.dtype, device=row.device)
    counts[0] = row.numel()
    return counts
