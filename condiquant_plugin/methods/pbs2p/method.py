"""PBS2P as a method of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from condiquant_plugin.errors import InputError
from condiquant_plugin.layerwise.problem import LayerProblem, Solution
from condiquant_plugin.methods.adasvd.method import with_residual
from condiquant_plugin.methods.arb.method import FittedBlock, assembled
from condiquant_plugin.methods.arb.refinement import Group, Plane, rounded, signs_of
from condiquant_plugin.methods.compression.feedback import Block
from condiquant_plugin.methods.compression.form import CompressedWeight
from condiquant_plugin.methods.compression.settings import BlockSettings
from condiquant_plugin.methods.compression.stacks import Stack, solve_in_stacks
from condiquant_plugin.methods.pbs2p.pruning import pruning_score, spbo


@dataclass(frozen=True)
class PBS2P(BlockSettings):
    """N of every M weights, of one bit: a ternary weight with a fixed count of zeros.

    Raises:
        InputError: a setting outside its range.
    """

    pattern: tuple[int, int] = (4, 8)
    """N kept of every M along a row."""
    patterns: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """By layer, in the place of ``pattern``; see ``patterns_for`` in ``search``."""
    salient_share: float = 0.0
    """Of a block's columns, of two planes; 0 is one scale: -1, 0 and 1, which kernels know."""
    large_quantile: float = 0.0
    """Of magnitudes, above which elements have a scale of their own; 0 is none."""
    rounds: int = 5
    """Of the scales' refinement behind each step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for pattern in (self.pattern, *self.patterns.values()):
            check_pattern(pattern)
        if self.rounds < 0:
            raise InputError(f"rounds={self.rounds}: use 0 or more")
        for name in ("salient_share", "large_quantile"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: use 0 to less than 1")

    def solve(self, problems: Sequence[LayerProblem]) -> list[Solution]:
        """Pruned binary weights; biases stay.

        Raises:
            InputError: NaN or Inf in a weight; a group size, pattern or residual rank that does not fit
                a layer.
        """
        solutions: dict[int, Solution] = {}
        by_pattern: dict[tuple[int, int], list[int]] = {}
        for index, problem in enumerate(problems):
            pattern = self.patterns.get(problem.name, self.pattern)
            by_pattern.setdefault(pattern, []).append(index)
        for pattern, indices in by_pattern.items():
            some = [problems[index] for index in indices]
            solved = solve_in_stacks(some, partial(self._solve, pattern=pattern))
            solutions.update(zip(indices, solved, strict=True))
        return [solutions[index] for index in range(len(problems))]

    def _solve(self, stack: Stack, pattern: tuple[int, int]) -> list[CompressedWeight]:
        columns = self.columns_of(stack)
        if columns % pattern[1]:
            raise InputError(
                f"pattern={pattern[0]}:{pattern[1]} does not divide the {columns} columns of a group "
                f"of {stack.problems[0].name}: use a group_size that is a multiple of {pattern[1]}"
            )
        blocks = self.compressed(stack, columns, lambda block: self.fit(block, pattern))
        forms = assembled(stack, blocks, splits_salient=False, pattern=pattern)
        return with_residual(stack, forms, self.residual_rank)

    def fit(self, block: Block, pattern: tuple[int, int]) -> FittedBlock:
        """Groups of a block, pruned."""
        W = block.weight
        score = pruning_score(W, block.sensitivity)
        salient, large = self._salient(score), self._large(W)
        inside = torch.zeros_like(W[:, :1]) if salient is None else salient
        masks = (
            [1 - inside] if large is None else [(1 - inside) * large, (1 - inside) * (1 - large)]
        )
        groups = [rounded(W, mask.expand_as(W)) for mask in masks]
        if salient is not None:
            groups.append(_two_planes(W, salient.expand_as(W)))
        groups, kept = spbo(W, block.gram, groups, score, pattern, self.rounds)
        return FittedBlock([group.stored() for group in groups], salient, large, kept)

    def _salient(self, score: Tensor) -> Tensor | None:
        count = round(self.salient_share * score.shape[-1])
        if count == 0:
            return None
        best = score.sum(-2, keepdim=True)
        return torch.zeros_like(best).scatter_(-1, best.topk(count, -1).indices, 1)

    def _large(self, W: Tensor) -> Tensor | None:
        if self.large_quantile == 0:
            return None
        sizes = W.abs()
        threshold = sizes[:, :: max(len(sizes[0]) // 64, 1)].flatten(1)
        at = threshold.quantile(self.large_quantile, dim=-1)[:, None, None]
        return (sizes >= at).to(W.dtype)


def _two_planes(W: Tensor, mask: Tensor) -> Group:
    first = rounded(W, mask)
    rest = W - first.dense()
    second = Plane(signs_of(rest), rounded(rest, mask).planes[0].rows)
    return Group(mask, (*first.planes, second), None)


def check_pattern(pattern: tuple[int, int]) -> None:
    """Raise :class:`InputError` unless at least one of M is kept and N does not exceed M."""
    n, m = pattern
    if not 0 < n < m:
        raise InputError(f"pattern={n}:{m} keeps {n} of every {m}: use 1 to {m - 1} of {m}")
