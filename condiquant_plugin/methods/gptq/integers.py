"""Weights of a few bits by GPTQ, the scales of their groups stored with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from condiquant_plugin.errors import InputError
from condiquant_plugin.layerwise.problem import LayerProblem, Solution
from condiquant_plugin.methods.adasvd.method import with_residual
from condiquant_plugin.methods.compression.feedback import damped
from condiquant_plugin.methods.compression.form import (
    FRACTION,
    FRACTION_BITS,
    CompressedWeight,
    Layout,
)
from condiquant_plugin.methods.compression.settings import BlockSettings
from condiquant_plugin.methods.compression.stacks import Stack, solve_in_stacks
from condiquant_plugin.methods.gptq.rounding import compensated
from condiquant_plugin.uniform.grid import check_bits

_SHRINKS = tuple(1 - 0.05 * step for step in range(15))
"""Of a group's range, to choose from."""
_SMALLEST = 2.0**-24
"""Above zero in float16."""


@dataclass(frozen=True)
class IntegerWeight(CompressedWeight):
    """``(code - zero point) * scale``; every group of consecutive features of a row has its own."""

    codes: Tensor
    """uint8, ``(groups, rows, features)``."""
    scales: Tensor
    """float16, ``(groups, rows, blocks)``."""
    zero_points: Tensor
    """uint8 like the codes, ``(groups, rows, blocks)``."""
    bits: int
    layout: Layout

    def matrices(self) -> Tensor:
        """See :class:`CompressedWeight`."""
        per_block = self.codes.shape[-1] // self.scales.shape[-1]
        zero, scale = (
            t.float().repeat_interleave(per_block, -1) for t in (self.zero_points, self.scales)
        )
        return (self.codes.float() - zero) * scale

    def stored_bits(self) -> dict[str, float]:
        """See :class:`CompressedWeight`."""
        return {
            "codes": self.bits * self.parameters,
            "scales": FRACTION_BITS * self.scales.numel(),
            "zero points": self.bits * self.zero_points.numel(),
        }


@dataclass(frozen=True)
class IntegerGPTQ(BlockSettings):
    """Codes of ``bits`` bits, one scale and zero point for a group (GPTQ, arXiv 2210.17323).

    The grids are those of the float weight, fixed before any column is rounded; columns of most energy are
    rounded first. ``compensation="none"`` is rounding to the nearest.

    Raises:
        InputError: a setting outside its range; ``compensation="billm"``.
    """

    bits: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bits(self.bits)
        if self.compensation == "billm":
            raise InputError("compensation='billm' is for binary weights: use 'exact' or 'none'")

    def solve(self, problems: Sequence[LayerProblem]) -> list[Solution]:
        """Integer weights; biases stay.

        Raises:
            InputError: NaN or Inf in a weight; a group size or residual rank that does not fit a layer.
        """
        return solve_in_stacks(problems, self._solve)

    def _solve(self, stack: Stack) -> list[CompressedWeight]:
        columns, weight = self.columns_of(stack), stack.weight
        scales, zero_points = group_grids(weight, columns, self.bits)
        step = scales.double().repeat_interleave(columns, -1)
        lower = -zero_points.double().repeat_interleave(columns, -1) * step
        if self.compensation == "exact":
            gram = damped(stack.gram, self.damping)
            weight = compensated(weight, gram, lower, step, weight.new_tensor(2**self.bits - 1))
        codes = ((weight - lower) / step).round_().clamp_(0, 2**self.bits - 1).to(torch.uint8)
        parts = zip(
            stack.problems, *(stack.split(t) for t in (codes, scales, zero_points)), strict=True
        )
        forms = [
            IntegerWeight(code, scale, zero, self.bits, Layout.of(problem))
            for problem, code, scale, zero in parts
        ]
        return with_residual(stack, forms, self.residual_rank)


def group_grids(weight: Tensor, columns: int, bits: int) -> tuple[Tensor, Tensor]:
    """Scales, float16, and zero points, uint8, both ``(batch, rows, blocks)``.

    Of ranges between all of a group's and less of it the one that rounds with the least squared error; zero
    is on the grid.

    Args:
        weight: ``(batch, rows, features)``.
        columns: in a group; divides the features.
    """
    groups = weight.float().unflatten(-1, (-1, columns))
    low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    last = 2**bits - 1
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for shrink in _SHRINKS:
        scale = ((high - low) * shrink / last).clamp_min(_SMALLEST).to(FRACTION)
        zero = (-low * shrink / scale.float()).round_().clamp_(0, last)
        codes = (groups / scale.float()[..., None] + zero[..., None]).round_().clamp_(0, last)
        rounded = (codes - zero[..., None]) * scale.float()[..., None]
        error = (groups - rounded).square_().sum(-1)
        if best is None:
            best = error, scale, zero
        else:
            better = error < best[0]
            found = (error, scale, zero)
            best = tuple(
                torch.where(better, new, old) for new, old in zip(found, best, strict=True)
            )  # type: ignore[assignment]
    assert best is not None
    return best[1], best[2].to(torch.uint8)
