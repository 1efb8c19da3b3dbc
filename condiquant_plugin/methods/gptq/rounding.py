"""Rounding column by column, each error made up for by the columns yet to come.

The layer's output on its quantized inputs ``Q`` is kept: ``min |Q (W - W')^T|^2`` over ``W'`` on the grid
(GPTQ, arXiv 2210.17323, algorithm 1), columns of most energy first. What is given back is each entry as it
was at the moment of its rounding: to the nearest level it rounds as GPTQ did, and a training that goes on
from it moves it across the tie that is nearest.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from condiquant_plugin.errors import InputError
from condiquant_plugin.layerwise.moments import weight_from_matrix, weight_matrix
from condiquant_plugin.layerwise.problem import (
    Dense,
    LayerProblem,
    LayerReport,
    OnGramMatrices,
    Solution,
    block_shape,
    check_weight,
)

_COLUMNS = 128
_ENTRIES = 2**24
"""Entries of Gram matrices, or of weights, in one batch."""
_NOISE = 1e-9
"""Of sums in float64, which the mean is taken out of, with room to spare."""
_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class RoundingReport(LayerReport):
    """What rounding does to a layer's output on quantized inputs, relative to that output."""

    nearest_error: float
    """With every entry at its nearest level, and the bias as it was."""
    rounding_error: float


@dataclass(frozen=True)
class GPTQ(OnGramMatrices):
    """The method; its problems have a grid and moments of quantized inputs.

    Raises:
        InputError: ``damping`` not above 0.
    """

    damping: float = 1e-2
    """Added to the diagonal of the Gram matrix, in units of its mean."""

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise InputError(f"damping={self.damping}: use more than 0")

    @property
    def needs_quantized_inputs(self) -> bool:
        """See :class:`condiquant_plugin.layerwise.problem.Method`."""
        return True

    def cost(self, problem: LayerProblem) -> int:
        """Every column is taken out of all that follow."""
        return problem.weight.numel() * block_shape(problem)[1]

    def solve(self, problems: Sequence[LayerProblem]) -> list[Solution]:
        """Weights that round to GPTQ's levels, and biases that keep the mean output.

        A layer on several grids, problems with the very same moments, is solved on all of them at once.

        Raises:
            InputError: NaN or Inf in a weight; no grid, or no moments of quantized inputs.
        """
        layers: dict[Any, list[int]] = defaultdict(list)
        for place, problem in enumerate(problems):
            shape = weight_matrix(problem.weight, problem.geometry).shape
            layers[id(problem.moments), problem.bias is None, shape].append(place)
        alike: dict[Any, list[list[int]]] = defaultdict(list)
        for (_, _, (_, height, features)), places in layers.items():
            alike[len(places) * height, features].append(places)
        solutions: dict[int, Solution] = {}
        for (height, features), stacked in alike.items():
            at_once = max(_ENTRIES // (features * max(features, height)), 1)
            for start in range(0, len(stacked), at_once):
                together = [
                    _Layer([problems[place] for place in places], self.damping)
                    for places in stacked[start : start + at_once]
                ]
                _solve_together(together)
                found = (rows.solution() for layer in together for rows in layer.grids)
                solutions.update(zip(chain(*stacked[start : start + at_once]), found, strict=True))
        return [solutions[place] for place in range(len(problems))]


class _Rows:
    """A layer on one grid as a batch of matrices ``(groups, rows, features)``, float64."""

    def __init__(self, problem: LayerProblem) -> None:
        check_weight(problem.name, problem.weight)
        moments, grid = problem.moments, problem.grid
        if grid is None or moments.quantized_gram is None or moments.quantized_total is None:
            what = "grid" if grid is None else "moments of quantized inputs"
            raise InputError(f"{problem.name} has no {what}: search bounds before rounding")
        self.problem = problem
        self.weight = weight_matrix(problem.weight.detach(), problem.geometry).double()
        self.lower, self.step = self._spread(grid.lower), self._spread(grid.step)
        self.last_code = torch.full(self.weight.shape[:2], float(grid.last_code)).to(self.weight)
        self.lowest, self.highest = self.lower, self.lower + grid.last_code * self.step
        if grid.limits is not None:
            below, above = map(self._spread, grid.limits)
            self.lowest = torch.maximum(self.lowest, below)
            self.highest = torch.minimum(self.highest, above)
        self.mean = moments.quantized_total.double() / max(moments.samples, 1)
        self.second = moments.quantized_gram.double()
        self.solved = self.weight

    def _spread(self, bound: Tensor) -> Tensor:
        like = self.problem.weight
        return weight_matrix(bound.expand_as(like).contiguous(), self.problem.geometry).double()

    def _levels(self, weight: Tensor) -> Tensor:
        return _nearest(weight, self.lower, self.step, self.last_code[..., None])

    def solution(self) -> Solution:
        problem = self.problem
        change = self._levels(self.solved) - self.weight
        bias, shift = problem.bias, None
        if bias is not None:
            shift = (change @ self.mean[..., None]).squeeze(-1)
            bias = (bias.double() - shift.reshape(-1)).to(bias)
        report = RoundingReport(
            problem.name,
            self._error(self._levels(self.weight) - self.weight),
            self._error(change, shift),
        )
        weight = weight_from_matrix(self.solved, problem.weight, problem.geometry)
        return Solution(Dense(weight), bias, report)

    def _error(self, change: Tensor, shift: Tensor | None = None) -> float:
        """``|Q change^T - shift| / |Q W^T|``; ``shift`` is the mean of ``Q change^T``."""
        moved = ((change @ self.second) * change).sum()
        if shift is not None:
            moved = moved - self.problem.moments.samples * shift.square().sum()
        total = ((self.weight @ self.second) * self.weight).sum()
        return float((moved.clamp_min(0) / total.clamp_min(_TINY)).sqrt())


class _Layer:
    """What a layer is rounded with, a matrix ``(groups, features, features)``, and all its grids."""

    def __init__(self, problems: Sequence[LayerProblem], damping: float) -> None:
        self.grids = [_Rows(problem) for problem in problems]
        first, moments = self.grids[0], problems[0].moments
        gram = first.second
        if problems[0].bias is not None:  # which takes the mean error
            gram = gram - moments.samples * first.mean[:, :, None] * first.mean[:, None]
        added = torch.maximum(damping * _mean_diagonal(gram), _NOISE * _mean_diagonal(first.second))
        identity = torch.eye(gram.shape[-1], dtype=added.dtype, device=added.device)
        self.gram = gram + added.clamp_min(_TINY)[:, None, None] * identity

    def stacked(self, name: str) -> Tensor:
        """What is given for the rows of every grid, one after the other."""
        return torch.cat([getattr(rows, name) for rows in self.grids], 1)


def _mean_diagonal(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).mean(-1)


def _solve_together(layers: Sequence[_Layer]) -> None:
    weight, lower, step, last_code, lowest, highest = (
        torch.cat([layer.stacked(name) for layer in layers])
        for name in ("weight", "lower", "step", "last_code", "lowest", "highest")
    )
    gram = torch.cat([layer.gram for layer in layers])
    solved = compensated(weight, gram, lower, step, last_code, (lowest, highest))
    for layer, part in zip(layers, solved.split([len(x.gram) for x in layers]), strict=True):
        by_grid = part.split([rows.weight.shape[1] for rows in layer.grids], 1)
        for rows, own in zip(layer.grids, by_grid, strict=True):
            rows.solved = own


def compensated(
    weight: Tensor,
    gram: Tensor,
    lower: Tensor,
    step: Tensor,
    last_code: Tensor,
    limits: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Each entry at the moment of its rounding, inside its limits.

    Args:
        weight: shape ``(batch, rows, features)``, float64.
        gram: positive definite, shape ``(batch, features, features)``.
        lower, step: of every entry's levels ``lower + code * step``, in the shape of ``weight``.
        last_code: codes go from 0 to this, shape ``(batch, rows)`` or ``()``.
        limits: lowest and highest value of every entry, in the shape of ``weight``; by default the ends of
            the grid.
    """
    if limits is None:
        limits = lower, lower + last_code[..., None] * step
    order = gram.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
    by_column = order[:, None].expand_as(weight)
    given = (weight, lower, step, *limits)
    rest, lower, step, lowest, highest = (t.gather(-1, by_column) for t in given)
    square = order[:, :, None].expand_as(gram)
    gram = gram.gather(1, square).gather(2, square.mT)
    # Row j of the inverse's Cholesky factor: how column j's error is made up for by those after it.
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(gram))).mT
    result, features = torch.empty_like(rest), rest.shape[-1]
    for start in range(0, features, _COLUMNS):
        end = min(start + _COLUMNS, features)
        errors = torch.empty_like(rest[..., start:end])
        for column in range(start, end):
            entry, low, size = (t[..., column] for t in (rest, lower, step))
            entry = torch.minimum(torch.maximum(entry, lowest[..., column]), highest[..., column])
            result[..., column] = entry
            rounded = _nearest(entry, low, size, last_code)
            error = (rest[..., column] - rounded) / factor[:, None, column, column]
            errors[..., column - start] = error
            rest[..., column + 1 : end] -= (
                error[..., None] * factor[:, None, column, column + 1 : end]
            )
        rest[..., end:] -= errors @ factor[:, start:end, end:]
    return result.scatter(-1, by_column, result)


def _nearest(x: Tensor, lower: Tensor, step: Tensor, last_code: Tensor) -> Tensor:
    codes = ((x - lower) / step).round_().clamp_min_(0).minimum(last_code)
    return lower + codes * step
