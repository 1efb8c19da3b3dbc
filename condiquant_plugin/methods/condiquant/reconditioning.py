"""Layer-wise weight reconditioning from the weight and the moments of its inputs alone.

Two objectives:

* ``condition`` is CondiQuant (arXiv 2502.15478, section 3.2): proximal gradient descent on
  ``1/2 |X W^T - X W0^T|^2 + lambda G(W)``, where ``G`` stands for the condition number.
* ``least_squares`` keeps the layer's float output although its input is quantized:
  ``min |Q W^T + b - (X W0^T + b0)|^2``, damped towards ``W0``; ``Q`` is ``X`` behind its fake quantizer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from condiquant_plugin.errors import InputError, check_choice, check_count
from condiquant_plugin.layerwise.moments import (
    LayerGeometry,
    weight_from_matrix,
    weight_matrix,
)
from condiquant_plugin.layerwise.problem import (
    Dense,
    LayerProblem,
    LayerReport,
    Solution,
    block_shape,
    check_weight,
)
from condiquant_plugin.methods.condiquant import spectrum

Objective = Literal["condition", "least_squares"]
Proxy = Literal["spread", "log_condition"]
Inputs = Literal["original", "compressed"]
"""Whose values a layer is solved on: the float network's, or the compressed network's up to that layer."""


@dataclass(frozen=True)
class ReconditioningConfig:
    """Settings of :func:`recondition`.

    Raises:
        InputError: a value out of range, or a choice that is not known.
    """

    objective: Objective = "least_squares"
    strength: float = 3e-3
    """``tau = lambda * mu`` of one proximal step (``condition``)."""
    output_tolerance: float | None = None
    """Choose ``tau`` per layer as the largest whose relative output error stays within this."""
    steps: int = 100
    proxy: Proxy = "spread"
    damping: float = 1e-1
    """Pull towards ``W0`` in units of the mean input energy (``least_squares``)."""
    inputs: Inputs = "original"
    """``"compressed"``: one layer after the other, each made to give what it gives in the float network
    (``least_squares``). For chains of convolutions; :func:`condiquant_nncf.quantize_network`, ``quantize``
    of a torch model and :func:`condiquant_brevitas.quantize_sr` do it."""

    def __post_init__(self) -> None:
        check_choice("objective", self.objective, get_args(Objective))
        check_choice("proxy", self.proxy, get_args(Proxy))
        check_choice("inputs", self.inputs, get_args(Inputs))
        if self.inputs == "compressed" and self.objective != "least_squares":
            raise InputError(
                f'inputs="compressed" has no effect with objective={self.objective}: leave it out'
            )
        check_count("steps", self.steps)
        for name in ("strength", "output_tolerance", "damping"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"{name}={value}: use more than 0")

    @property
    def needs_quantized_inputs(self) -> bool:
        """See :class:`condiquant_plugin.layerwise.problem.Method`."""
        return self.objective == "least_squares"

    @property
    def moments_dtype(self) -> torch.dtype:
        """Normal equations of nearly dependent features need double precision."""
        return torch.float64

    @property
    def is_batch_dependent(self) -> bool:
        """The polar factors of a batch are iterated until the last has converged."""
        return self.objective == "condition"

    def cost(self, problem: LayerProblem) -> int:
        """Proximal steps go by the shorter side of a matrix, normal equations by its features."""
        shape = block_shape(problem)
        side = min(shape) if self.objective == "condition" else shape[1]
        return problem.weight.numel() * side

    def solve(self, problems: Sequence[LayerProblem]) -> list[Solution]:
        """:func:`recondition`."""
        return recondition(problems, self)


KEYS_OF_OBJECTIVE: dict[Objective, tuple[str, ...]] = {
    "condition": ("strength", "output_tolerance", "steps", "proxy"),
    "least_squares": ("damping", "inputs"),
}
"""The settings that have an effect with one objective alone."""


def default_config(bits: int) -> ReconditioningConfig:
    """What measured best on held-out calibration crops at this activation bit-width (docs/results.md)."""
    if bits <= 3:
        return ReconditioningConfig(strength=1e-2, damping=1e-2)
    return ReconditioningConfig(strength=3e-3, damping=1e-1)


@dataclass(frozen=True)
class ReconditioningReport(LayerReport):
    """What reconditioning did to a layer."""

    condition_before: float
    """Median over the layer's groups and row blocks."""
    condition_after: float
    output_error: float
    """Change of the layer's output on its float inputs, bias included, relative to ``|X W0^T|``."""
    quantized_output_error_before: float | None = None
    """Relative error of the output on quantized inputs, with the old weight."""
    quantized_output_error_after: float | None = None


def recondition(problems: Sequence[LayerProblem], config: ReconditioningConfig) -> list[Solution]:
    """Recondition layers independently of one another, equal shapes in one batch.

    Raises:
        InputError: if a weight has NaN or Inf, or ``least_squares`` lacks quantized moments.
    """
    for problem in problems:
        check_weight(problem.name, problem.weight)
    solve = _least_squares if config.objective == "least_squares" else _condition
    return solve(problems, config)


def _blocks(weight: Tensor, geometry: LayerGeometry, row_blocks: int) -> Tensor:
    """The weight as a batch of matrices ``(groups * row_blocks, rows, features)``, float64."""
    matrix = weight_matrix(weight.detach(), geometry).double()
    return matrix.reshape(-1, matrix.shape[1] // row_blocks, matrix.shape[2])


def unchanged(
    name: str, weight: Tensor, geometry: LayerGeometry, row_blocks: int = 1
) -> ReconditioningReport:
    """Report of a layer that keeps its weight.

    Raises:
        InputError: if the weight has NaN or Inf.
    """
    check_weight(name, weight)
    kappa = layer_condition(weight, geometry, row_blocks)
    return ReconditioningReport(name, kappa, kappa, 0.0)


def layer_condition(weight: Tensor, geometry: LayerGeometry, row_blocks: int = 1) -> float:
    """Condition number of a layer: the median over its groups and row blocks."""
    return float(spectrum.condition_number(_blocks(weight, geometry, row_blocks).float()).median())


def _condition(problems: Sequence[LayerProblem], config: ReconditioningConfig) -> list[Solution]:
    by_shape: dict[torch.Size, list[int]] = defaultdict(list)
    blocks = [_blocks(p.weight, p.geometry, p.row_blocks) for p in problems]
    for index, block in enumerate(blocks):
        by_shape[block.shape[1:]].append(index)
    results: dict[int, Tensor] = {}
    for indices in by_shape.values():
        weight = torch.cat([blocks[i] for i in indices])
        grams = torch.cat(
            [problems[i].moments.gram.repeat_interleave(problems[i].row_blocks, 0) for i in indices]
        )
        solved = _search_strength(weight, grams, config)
        results.update(zip(indices, solved.split([len(blocks[i]) for i in indices]), strict=True))
    return [_solution(p, results[i], p.bias) for i, p in enumerate(problems)]


def _search_strength(weight: Tensor, grams: Tensor, config: ReconditioningConfig) -> Tensor:
    """Proximal gradient descent with the strength given, or bisected per matrix on a log scale."""
    if config.output_tolerance is None:
        return proximal_gradient(weight, grams, config.strength, config.steps, config.proxy)
    low = weight.new_full((len(weight), 1, 1), -12.0)
    high = weight.new_full((len(weight), 1, 1), 0.0)
    best = weight
    for _ in range(10):
        middle = (low + high) / 2
        candidate = proximal_gradient(weight, grams, middle.exp(), config.steps, config.proxy)
        fits = _relative_error(candidate - weight, weight, grams) <= config.output_tolerance
        fits = fits[:, None, None]
        best = torch.where(fits, candidate, best)
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    return best


def proximal_gradient(
    weight: Tensor, grams: Tensor, tau: Tensor | float, steps: int, proxy: Proxy = "spread"
) -> Tensor:
    """CondiQuant's iteration ``W <- prox(W - (W - W0) X^T X / lambda_max)``.

    Args:
        weight: ``W0``, shape ``(batch, rows, features)``.
        grams: ``X^T X``, shape ``(batch, features, features)``.
        tau: ``lambda * mu``; a number, or one per matrix, shape ``(batch, 1, 1)``.

    Returns:
        The last iterate, in the dtype of ``weight``; the iteration runs in float32.
    """
    start = weight.float()
    largest = torch.linalg.eigvalsh(grams)[:, -1:, None].clamp_min(torch.finfo(torch.float64).tiny)
    pull = (grams / largest).float()
    tau = tau.float() if isinstance(tau, Tensor) else tau
    current, lifts = start, 8
    for _ in range(steps):
        current = torch.baddbmm(current, current - start, pull, alpha=-1)
        if proxy == "log_condition":
            scale = current.square().sum((-2, -1), keepdim=True) / min(current.shape[-2:])
            current = spectrum.prox_log_condition(current, tau * scale)
        else:
            current, lifts = spectrum.prox_spread(current, tau, tolerance=5e-3, lifts=lifts)
    return current.to(weight.dtype)


def _least_squares(
    problems: Sequence[LayerProblem], config: ReconditioningConfig
) -> list[Solution]:
    solutions = []
    for problem in problems:
        data = problem.moments
        if data.quantized_gram is None:
            raise InputError(
                f"no quantized inputs were collected for {problem.name}: "
                "objective=least_squares needs bounds before the moments"
            )
        assert data.quantized_cross is not None
        assert data.quantized_total is not None
        start = _Affine.of(problem, problem.weight, problem.bias)
        energy = data.quantized_gram.diagonal(dim1=-2, dim2=-1).mean(-1)
        pull = config.damping * energy.clamp_min(1e-30)[:, None]
        system = data.quantized_gram.clone()
        wanted = data.quantized_cross @ start.weight.mT + pull[..., None] * start.weight.mT
        x, q = data.total[..., None], data.quantized_total[..., None]
        count = max(data.samples, 1)
        if problem.bias is not None:  # which makes up for the means
            system.baddbmm_(q, q.mT, alpha=-1 / count)
            wanted.baddbmm_(q, (start.weight @ x).mT, alpha=-1 / count)
        system.diagonal(dim1=-2, dim2=-1).add_(pull)
        solved = _solved(system, wanted).mT
        bias = problem.bias
        if bias is not None:
            shift = (start.weight @ x - solved @ q).reshape(-1) / count
            bias = (bias.detach().double() + shift).to(problem.weight)
        solutions.append(_solution(problem, solved, bias))
    return solutions


def _solved(system: Tensor, wanted: Tensor) -> Tensor:
    """Of a system that is positive definite but for rounding."""
    factor, failed = torch.linalg.cholesky_ex(system)
    if failed.any():
        return torch.linalg.solve(system, wanted)
    return torch.cholesky_solve(wanted, factor)


@dataclass(frozen=True)
class _Affine:
    """A layer as matrices ``(groups, rows, features)`` and biases ``(groups, rows, 1)``, float64."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, problem: LayerProblem, weight: Tensor, bias: Tensor | None) -> _Affine:
        matrix = weight_matrix(weight.detach(), problem.geometry).double()
        if bias is None:
            return cls(matrix, matrix.new_zeros(*matrix.shape[:2], 1))
        return cls(matrix, bias.detach().double().view(len(matrix), -1, 1))

    def minus(self, other: _Affine) -> _Affine:
        return _Affine(self.weight - other.weight, self.bias - other.bias)

    def times(
        self, other: _Affine, products: Tensor, totals: tuple[Tensor, Tensor], samples: int
    ) -> Tensor:
        """Sum over samples of this one's outputs on ``u`` times the other's on ``v``.

        Args:
            products: ``sum u v^T``.
            totals: ``sum u``, ``sum v``.
        """
        u, v = (total[..., None] for total in totals)
        return (
            ((self.weight @ products) * other.weight).sum()
            + (self.bias * (other.weight @ v)).sum()
            + (other.bias * (self.weight @ u)).sum()
            + samples * (self.bias * other.bias).sum()
        )


def _relative_error(change: Tensor, weight: Tensor, grams: Tensor) -> Tensor:
    """``|X change^T| / |X W^T|`` per matrix of the batch."""
    moved = ((change @ grams) * change).sum((-2, -1)).clamp_min(0)
    total = ((weight @ grams) * weight).sum((-2, -1)).clamp_min(torch.finfo(torch.float64).tiny)
    return (moved / total).sqrt()


def _solution(problem: LayerProblem, matrix: Tensor, bias: Tensor | None) -> Solution:
    weight = weight_from_matrix(matrix, problem.weight, problem.geometry)
    layout = problem.geometry, problem.row_blocks
    data, samples = problem.moments, problem.moments.samples
    start = _Affine.of(problem, problem.weight, problem.bias)
    end = _Affine.of(problem, weight, bias)
    floats = data.total, data.total
    change = end.minus(start)
    moved = change.times(change, data.gram, floats, samples)
    # Without the bias, and with it.
    products = ((start.weight @ data.gram) * start.weight).sum()
    energy = (
        products
        + 2 * (start.bias * (start.weight @ data.total[..., None])).sum()
        + samples * start.bias.square().sum()
    )

    def quantized_error(given: _Affine) -> float | None:
        """``|Q W^T + b - (X W0^T + b0)| / |X W0^T + b0|`` over the calibration inputs."""
        gram, cross, total = data.quantized_gram, data.quantized_cross, data.quantized_total
        if gram is None or cross is None or total is None:
            return None
        own = given.times(given, gram, (total, total), samples)
        shared = given.times(start, cross, (total, data.total), samples)
        return _ratio(own - 2 * shared + energy, energy)

    report = ReconditioningReport(
        problem.name,
        layer_condition(problem.weight, *layout),
        layer_condition(weight, *layout),
        _ratio(moved, products),
        quantized_error(start),
        quantized_error(end),
    )
    return Solution(Dense(weight), bias, report)


def _ratio(error: Tensor, energy: Tensor) -> float:
    """Of the roots of sums of squares."""
    return float((error.clamp_min(0) / energy.clamp_min(torch.finfo(torch.float64).tiny)).sqrt())
