"""AdaSVD as a method of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from condiquant_plugin.errors import InputError
from condiquant_plugin.layerwise.problem import LayerProblem, OnGramMatrices, Solution, block_shape
from condiquant_plugin.methods.adasvd.low_rank import ClosedForm, alternation, balanced
from condiquant_plugin.methods.adasvd.ranks import check_ratio, rank_of
from condiquant_plugin.methods.compression.form import (
    FRACTION,
    CompressedWeight,
    Layout,
    LowRank,
    Plain,
    Sum,
)
from condiquant_plugin.methods.compression.stacks import Stack, solve_in_stacks


@dataclass(frozen=True)
class AdaSVD(OnGramMatrices):
    """Low rank (arXiv 2502.01403).

    Raises:
        InputError: ``ratio`` outside (0, 1]; ``rounds`` below 0.
    """

    ratio: float = 0.8
    """Of the parameters of a layer, retained; where ``ranks`` does not name it."""
    rounds: int | None = None
    """Of the paper's alternation; None is the closed form that it goes to."""
    ranks: Mapping[str, int | None] = field(default_factory=dict)
    """By layer; None keeps it dense. See :func:`condiquant_plugin.methods.adasvd.ranks.ranks_for`."""

    def __post_init__(self) -> None:
        check_ratio("ratio", self.ratio)
        if self.rounds is not None and self.rounds < 0:
            raise InputError(f"rounds={self.rounds}: use 0 or more")

    @property
    def needs_quantized_inputs(self) -> bool:
        """See :class:`condiquant_plugin.layerwise.problem.Method`."""
        return False

    def cost(self, problem: LayerProblem) -> int:
        """An eigendecomposition of the smaller side."""
        rows, features = block_shape(problem)
        return min(rows, features) ** 3 + problem.weight.numel() * features

    def solve(self, problems: Sequence[LayerProblem]) -> list[Solution]:
        """Low-rank weights; biases stay.

        Raises:
            InputError: NaN or Inf in a weight.
        """
        return solve_in_stacks(problems, self._solve)

    def _solve(self, stack: Stack) -> list[CompressedWeight]:
        rows, features = stack.weight.shape[1:]
        weights, grams = stack.split(stack.weight), stack.split(stack.gram)
        forms: list[CompressedWeight] = []
        for problem, weight, gram in zip(stack.problems, weights, grams, strict=True):
            rank = self.ranks.get(problem.name, rank_of(self.ratio, rows, features))
            layout = Layout.of(problem)
            if rank is None:
                forms.append(Plain(weight.to(layout.dtype), layout))
            else:
                forms.append(low_rank(weight, gram, rank, layout, self.rounds))
        return forms


def low_rank(
    weight: Tensor, gram: Tensor, rank: int, layout: Layout, rounds: int | None = None
) -> LowRank:
    """The factors of a layer, in float16.

    Args:
        weight: ``(groups, rows, features)``, float64.
        gram: ``(groups, features, features)``, float64.
        rounds: see :class:`AdaSVD`.
    """
    if rounds is None:
        factors = ClosedForm.of(weight, gram).cut(rank)
    else:
        factors = alternation(weight, gram, rank, rounds)
    left, right = (factor.to(FRACTION) for factor in balanced(*factors))
    return LowRank(left, right, layout)


def with_residual(
    stack: Stack, forms: Sequence[CompressedWeight], rank: int
) -> list[CompressedWeight]:
    """Each form with the low rank, in closed form, of what it leaves; as they are for ``rank`` 0.

    Raises:
        InputError: a rank that the layers do not have.
    """
    if rank == 0:
        return list(forms)
    smaller = min(stack.weight.shape[1:])
    if rank > smaller:
        raise InputError(
            f"residual_rank={rank} is more than the smaller side of {stack.problems[0].name}: "
            f"use at most {smaller}"
        )
    parts = zip(forms, stack.split(stack.weight), stack.split(stack.gram), strict=True)
    return [
        Sum(form, low_rank(weight - form.matrices().double(), gram, rank, form.layout))
        for form, weight, gram in parts
    ]
