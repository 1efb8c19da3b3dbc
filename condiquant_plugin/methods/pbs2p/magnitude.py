"""N of every M weights by magnitude, their values kept: what pruning alone costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from condiquant_plugin.errors import InputError
from condiquant_plugin.layerwise.problem import LayerProblem, OnGramMatrices, Solution
from condiquant_plugin.methods.compression.form import (
    FRACTION,
    FRACTION_BITS,
    CompressedWeight,
    Layout,
)
from condiquant_plugin.methods.compression.stacks import Stack, solve_in_stacks
from condiquant_plugin.methods.pbs2p.method import check_pattern
from condiquant_plugin.methods.pbs2p.pruning import nm_mask


@dataclass(frozen=True)
class PrunedWeight(CompressedWeight):
    """N of every M values, float16."""

    values: Tensor
    """``(groups, rows, features)``, zero where pruned."""
    pattern: tuple[int, int]
    layout: Layout

    def matrices(self) -> Tensor:
        """See :class:`CompressedWeight`."""
        return self.values.float()

    def stored_bits(self) -> dict[str, float]:
        """The values that are kept, and the mask at its entropy."""
        n, m = self.pattern
        return {
            "values": FRACTION_BITS * self.parameters * n / m,
            "mask": self.parameters * math.log2(math.comb(m, n)) / m,
        }


@dataclass(frozen=True)
class Magnitude(OnGramMatrices):
    """The N largest of every M weights of a row stay as they are.

    Raises:
        InputError: a pattern that keeps none or all.
    """

    pattern: tuple[int, int] = (4, 8)

    def __post_init__(self) -> None:
        check_pattern(self.pattern)

    @property
    def needs_quantized_inputs(self) -> bool:
        """See :class:`condiquant_plugin.layerwise.problem.Method`."""
        return False

    def cost(self, problem: LayerProblem) -> int:
        """A sort."""
        return problem.weight.numel()

    def solve(self, problems: Sequence[LayerProblem]) -> list[Solution]:
        """Pruned weights; biases stay.

        Raises:
            InputError: NaN or Inf in a weight; M that does not divide the features.
        """
        return solve_in_stacks(problems, self._solve)

    def _solve(self, stack: Stack) -> list[CompressedWeight]:
        n, m = self.pattern
        if (features := stack.weight.shape[-1]) % m:
            raise InputError(
                f"pattern={n}:{m} does not divide the {features} inputs of {stack.problems[0].name}: "
                "use another, or leave the layer out"
            )
        pruned = (stack.weight * nm_mask(stack.weight.abs(), n, m)).to(FRACTION)
        return [
            PrunedWeight(values, self.pattern, Layout.of(problem))
            for problem, values in zip(stack.problems, stack.split(pruned), strict=True)
        ]
