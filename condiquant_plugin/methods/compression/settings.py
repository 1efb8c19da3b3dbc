"""Settings that methods share which store weights in groups of columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

from condiquant_plugin.errors import InputError, check_choice, check_count
from condiquant_plugin.layerwise.problem import LayerProblem, OnGramMatrices, block_shape
from condiquant_plugin.methods.compression.feedback import (
    Block,
    Compensation,
    FittedT,
    compress_by_blocks,
)
from condiquant_plugin.methods.compression.stacks import Stack


@dataclass(frozen=True)
class BlockSettings(OnGramMatrices):
    """What methods that go block of columns by block of columns have in common.

    Raises:
        InputError: a setting outside its range.
    """

    group_size: int = 64
    """Columns that share scales, and that errors are carried on behind; -1 is a whole row."""
    compensation: Compensation = "exact"
    """Of the error of a block of columns by later ones."""
    damping: float = 0.01
    """Added to the diagonal of the Gram matrix, in units of its mean."""
    residual_rank: int = 0
    """Of a low-rank matrix, float16, for what is left; 0 is none."""

    def __post_init__(self) -> None:
        check_choice("compensation", self.compensation, get_args(Compensation))
        if self.group_size != -1:
            check_count("group_size", self.group_size)
        if not self.damping > 0:
            raise InputError(f"damping={self.damping}: use more than 0")
        if self.residual_rank < 0:
            raise InputError(f"residual_rank={self.residual_rank}: use 0 or more")

    @property
    def needs_quantized_inputs(self) -> bool:
        """See :class:`condiquant_plugin.layerwise.problem.Method`."""
        return False

    def cost(self, problem: LayerProblem) -> int:
        """Every block is taken out of all that follow."""
        return problem.weight.numel() * block_shape(problem)[1]

    def columns_of(self, stack: Stack) -> int:
        """In a block.

        Raises:
            InputError: a group size that does not divide the features.
        """
        return group_columns(self.group_size, stack.problems[0].name, stack.weight.shape[-1])

    def compressed(
        self, stack: Stack, columns: int, fit: Callable[[Block], FittedT]
    ) -> list[FittedT]:
        """Every block of columns, from left to right."""
        return compress_by_blocks(
            stack.weight,
            stack.gram,
            columns,
            fit,
            compensation=self.compensation,
            damping=self.damping,
        )


def group_columns(group_size: int, name: str, features: int) -> int:
    """Columns of a group; all for -1.

    Raises:
        InputError: they do not divide the features.
    """
    if group_size == -1:
        return features
    if features % group_size:
        fitting = [n for n in range(1, features + 1) if features % n == 0]
        near = min(fitting, key=lambda n: (abs(n - group_size), -n))
        raise InputError(
            f"group_size={group_size} does not divide the {features} inputs of {name}: use {near}, "
            "or leave the layer out"
        )
    return group_size
