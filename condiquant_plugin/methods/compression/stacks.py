"""Layers of one shape as one batch of matrices, and what is said of their solutions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from condiquant_plugin.errors import InputError
from condiquant_plugin.layerwise.moments import weight_matrix
from condiquant_plugin.layerwise.problem import LayerProblem, LayerReport, Solution, check_weight
from condiquant_plugin.methods.compression.form import CompressedWeight

_GRAMS = 2**24
"""Entries of Gram matrices in one batch."""
_WEIGHTS = 2**20
"""Entries of weights in one batch: more, and a block of columns leaves the cache."""
_TINY = 1e-30


@dataclass(frozen=True)
class CompressionReport(LayerReport):
    """What a layer lost and what it takes."""

    output_error: float
    """``tr(D G D^T) / tr(W G W^T)``, ``D`` the change of ``W``."""
    bits_per_weight: float
    """Of all that is stored."""
    parameters: int
    """Entries of the dense weight."""


@dataclass(frozen=True)
class Stack:
    """Layers whose matrices have one shape."""

    indices: list[int]
    """Of the layers among all problems."""
    problems: list[LayerProblem]
    weight: Tensor
    """``(batch, rows, features)``, float64."""
    gram: Tensor
    """``(batch, features, features)``: the mean of ``x x^T``, float64; expanded where it is one of all."""

    def split(self, tensor: Tensor) -> list[Tensor]:
        """What belongs to each layer."""
        return list(tensor.split([len(p.moments.gram) for p in self.problems]))


def stacks(problems: Sequence[LayerProblem]) -> Iterator[Stack]:
    """Batches of layers of equal shape; a fused projection is one matrix.

    Raises:
        InputError: NaN or Inf in a weight.
    """
    alike: dict[torch.Size, list[int]] = defaultdict(list)
    for index, problem in enumerate(problems):
        check_weight(problem.name, problem.weight)
        alike[weight_matrix(problem.weight, problem.geometry).shape].append(index)
    for (groups, rows, features), indices in alike.items():
        grams, weights = groups * features**2, groups * rows * features
        at_once = max(min(_GRAMS // grams, _WEIGHTS // weights), 1)
        for start in range(0, len(indices), at_once):
            chosen = indices[start : start + at_once]
            some = [problems[i] for i in chosen]
            weight = torch.cat([weight_matrix(p.weight.detach(), p.geometry) for p in some])
            distinct = {id(p.moments): p.moments for p in some}.values()
            means = [m.gram.double() / max(m.samples, 1) for m in distinct]
            if len(distinct) == groups == 1:
                gram = means[0].expand(len(some), -1, -1)
            else:
                by_id = {id(m): mean for m, mean in zip(distinct, means, strict=True)}
                gram = torch.cat([by_id[id(p.moments)] for p in some])
            yield Stack(chosen, some, weight.double(), gram)


def output_loss(change: Tensor, gram: Tensor) -> Tensor:
    """``tr(D G D^T)`` of each matrix of a batch."""
    return ((change @ gram) * change).sum((-2, -1))


def solution(problem: LayerProblem, form: CompressedWeight) -> Solution:
    """With its report; the bias stays.

    Raises:
        InputError: a scale that float16 does not hold.
    """
    weight = weight_matrix(problem.weight.detach(), problem.geometry).float()
    gram = problem.moments.gram.float() / max(problem.moments.samples, 1)
    lost = output_loss(form.matrices() - weight, gram).sum()
    total = output_loss(weight, gram).sum()
    if not torch.isfinite(lost):
        raise InputError(
            f"the scales of {problem.name} do not fit in float16 (largest weight "
            f"{float(weight.abs().max()):.3g}): leave it out"
        )
    error = float(lost.clamp_min(0) / total.clamp_min(_TINY))
    report = CompressionReport(problem.name, error, form.bits_per_weight, form.parameters)
    return Solution(form, problem.bias, report)


def solve_in_stacks(
    problems: Sequence[LayerProblem], solve: Callable[[Stack], list[CompressedWeight]]
) -> list[Solution]:
    """One solution per problem, in order, ``solve`` called with layers of one shape."""
    forms: dict[int, CompressedWeight] = {}
    for stack in stacks(problems):
        forms.update(zip(stack.indices, solve(stack), strict=True))
    return [solution(problem, forms[index]) for index, problem in enumerate(problems)]
