"""From a network with fake quantizers to the bounds, weights and biases that it is trained or run with.

Bounds are searched first, on the float network (DOBI). Then each of the candidates gives the layers new
weights, whose bounds are searched anew and whose rounding keeps the layers' outputs. Of several candidates
the one that is closest to the float network on images held out from all that stays.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from condiquant_plugin.configuration import QuantizationConfig
from condiquant_plugin.forward_pass import run
from condiquant_plugin.layerwise import distributed
from condiquant_plugin.layerwise.moments import Moments
from condiquant_plugin.layerwise.problem import LayerReport
from condiquant_plugin.layerwise.quantized import (
    QuantizedLayer,
    collect_moments,
    computing_floats,
)
from condiquant_plugin.layerwise.sequential import solve_in_sequence
from condiquant_plugin.methods.condiquant.reconditioning import ReconditioningConfig, unchanged
from condiquant_plugin.methods.gptq.rounding import GPTQ
from condiquant_plugin.uniform.fake_quantizer import search_bounds, snapped_together

_SEQUENCE_PIXELS = 2**16
"""Of the images that stand still inside a network at once; 64 crops of 32x32."""
_AT_ONCE = 16
"""Crops of one size in one pass of a sequence."""
_HELD_OUT = 8
"""Every eighth image is held out if there are candidates to choose from."""


@dataclass(frozen=True)
class Candidate:
    """A way to give the layers new weights; ``settings=None`` keeps them as trained."""

    settings: ReconditioningConfig | None

    @property
    def name(self) -> str:
        """For reports."""
        if self.settings is None:
            return "as trained"
        words = self.settings.objective.replace("_", " ")
        return f"{words}, in sequence" if self.settings.inputs == "compressed" else words


def candidates(config: QuantizationConfig, *, sequences: bool = True) -> list[Candidate]:
    """What is tried: with ``recondition="auto"`` the weights as trained and both least squares.

    Args:
        sequences: whether layers can be solved on the compressed network's inputs.
    """
    settings = config.reconditioning()
    if config.recondition != "auto" or settings is None:
        return [Candidate(settings)]
    tried = [None, settings, replace(settings, inputs="compressed")]
    return [Candidate(each) for each in tried[: 3 if sequences else 2]]


@dataclass
class Calibration:
    """What became of a network's layers, and why."""

    reports: list[LayerReport]
    chosen: str
    """Name of the candidate."""
    fidelity: dict[str, float] = field(default_factory=dict)
    """Of every candidate, if there were several: ratio of the float output's variance to the squared
    error on held-out images, mean in dB."""
    rounding: list[LayerReport] = field(default_factory=list)
    """What rounding does to each layer's output, where it follows the moments."""
    seconds: dict[str, float] = field(
        default_factory=lambda: {"gram": 0.0, "recondition": 0.0, "bounds": 0.0}
    )


def held_out(count: int) -> tuple[list[int], list[int]]:
    """Places of the images that are calibrated with, and of those held out; the only one is both.

    >>> held_out(9)
    ([0, 1, 2, 3, 4, 5, 6, 8], [7])
    >>> held_out(3)
    ([0, 1], [2])
    """
    chosen = list(range(_HELD_OUT - 1, count, _HELD_OUT)) or [count - 1]
    return [i for i in range(count) if i not in chosen] or chosen, chosen


def fidelity_in_db(output: Tensor, target: Tensor) -> float:
    """Variance of ``target`` to squared error, at most 120 dB."""
    target = target.double()
    error = float((output.double() - target).square().mean())
    variance = float(target.var(correction=0))
    return min(10 * math.log10(max(variance, 1e-30) / max(error, 1e-30)), 120.0)


@torch.no_grad()
def calibrate(
    model: nn.Module,
    layers: Sequence[QuantizedLayer],
    images: Sequence[Any],
    config: QuantizationConfig,
    *,
    bounds_images: int,
    batch_size: int = 1,
    unseen: Sequence[Any] = (),
) -> Calibration:
    """Search bounds, give layers new weights and round them; changes ``model`` in place.

    Under ``torch.distributed`` all processes call this with the same network and images, share the work
    and end with the same network.

    Args:
        model: with fake quantizers whose bounds are yet to come, all else as trained; returns a tensor.
        layers: those in scope that have a weight.
        images: batches that ``model`` takes, tensors of one image each for results that do not depend on
            how they are batched.
        bounds_images: how many of them bounds are searched on.
        batch_size: tensors of one size that pass the network at once.
        unseen: held-out images; without them every eighth of ``images`` is held out where needed.

    Raises:
        InputError: NaN or Inf anywhere; ``bounds_inputs="quantized"`` with images of several sizes.
        DistributedError: another process ended or failed.
    """
    tried = candidates(config) if layers else [Candidate(None)]
    if len(tried) > 1 and not unseen:
        kept, chosen = held_out(len(images))
        unseen, images = [images[i] for i in chosen], [images[i] for i in kept]
    job = _Job(model, layers, list(images), config, bounds_images, batch_size)
    job.search()
    targets = job.float_outputs(unseen) if len(tried) > 1 else []
    job.collect([each.settings for each in tried])
    found: dict[str, tuple[Calibration, list[Tensor]]] = {}
    for each in tried:
        result = job.solve(each)
        if targets:
            with snapped_together(model):
                outputs = [run(model, image) for image in unseen]
            pairs = zip(outputs, targets, strict=True)
            result.fidelity[each.name] = mean(fidelity_in_db(o, target) for o, target in pairs)
        found[each.name] = result, job.state()
        job.restore()
    scores = {name: result.fidelity.get(name, 0.0) for name, (result, _) in found.items()}
    scores = distributed.agreed(scores)
    best, state = found[max(scores, key=scores.__getitem__)]
    job.restore(state)
    best.fidelity, best.seconds = scores if targets else {}, job.seconds
    return best


class _Job:
    """One calibration: the network as it came, and what all candidates share."""

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[QuantizedLayer],
        images: list[Any],
        config: QuantizationConfig,
        bounds_images: int,
        batch_size: int,
    ) -> None:
        self.model, self.layers, self.config = model, list(layers), config
        self.images, self.batches = images, together(images, batch_size)
        self.bounds_batches = together(images[:bounds_images], batch_size)
        self.seconds = {"gram": 0.0, "recondition": 0.0, "bounds": 0.0}
        self.moments: dict[str, Moments] = {}
        self.called_once: set[str] = set()
        self.rounds = GPTQ() if config.rounding == "gptq" else None

    def search(self) -> None:
        started = time.perf_counter()
        with distributed.failing_together("searching bounds"):
            quantized = self.config.bounds_inputs == "quantized"
            search_bounds(self.model, self.bounds_batches, quantized_inputs=quantized)
        distributed.broadcast_bounds(self.model)
        self.seconds["bounds"] += time.perf_counter() - started
        self.before = self.state()

    def float_outputs(self, images: Sequence[Any]) -> list[Tensor]:
        with computing_floats(self.model):
            return [run(self.model, image) for image in images]

    def collect(self, settings: Sequence[ReconditioningConfig | None]) -> None:
        given = [each for each in settings if each is not None]
        if not self.layers or not (given or self.rounds):
            return
        started = time.perf_counter()
        quantized = bool(self.rounds) or any(each.needs_quantized_inputs for each in given)
        collected = collect_moments(self.model, self.layers, self.batches, quantized=quantized)
        self.moments = collected.moments
        self.called_once = {name for name, uses in collected.uses.items() if uses == 1}
        self.seconds["gram"] += time.perf_counter() - started

    def solve(self, candidate: Candidate) -> Calibration:
        """New weights, their bounds and their rounding, in the network."""
        started = time.perf_counter()
        reports: dict[str, LayerReport] = {}
        rounding: dict[str, LayerReport] = {}
        settings, alone = candidate.settings, self.layers
        in_sequence: list[QuantizedLayer] = []
        if settings is not None and settings.inputs == "compressed":
            in_sequence = [layer for layer in alone if layer.name in self.called_once]
            alone = [layer for layer in alone if layer.name not in self.called_once]
        moments = [self.moments.get(layer.name) for layer in alone]
        reports |= self._recondition(alone, moments, settings)
        rounding |= self._round(alone, moments)

        def solve_one(layer: QuantizedLayer, seen: Moments) -> LayerReport:
            found = self._recondition([layer], [seen], settings)
            rounding.update(self._round([layer], [seen]))
            return found[layer.name]

        if in_sequence:
            batches = sequence_of(self.images)
            found = solve_in_sequence(self.model, in_sequence, batches, solve_one)
            reports |= {layer.name: r for layer, r in zip(in_sequence, found, strict=True)}
        self.seconds["recondition"] += time.perf_counter() - started
        names = [layer.name for layer in self.layers]
        rounded = [rounding[name] for name in names if name in rounding]
        return Calibration([reports[name] for name in names], candidate.name, rounding=rounded)

    def _recondition(
        self,
        layers: Sequence[QuantizedLayer],
        moments: Sequence[Moments | None],
        settings: ReconditioningConfig | None,
    ) -> dict[str, LayerReport]:
        if settings is None:
            with distributed.failing_together("reading the weights"):
                return {layer.name: _as_trained(layer) for layer in layers}
        problems = [
            layer.problem(seen)
            for layer, seen in zip(layers, moments, strict=True)
            if seen is not None
        ]
        solutions = distributed.solve(problems, settings)
        for layer, solution in zip(layers, solutions, strict=True):
            layer.write(solution)
            layer.weight_quantizer.search_bounds(layer.weight)
        return {solution.report.name: solution.report for solution in solutions}

    def _round(
        self, layers: Sequence[QuantizedLayer], moments: Sequence[Moments | None]
    ) -> dict[str, LayerReport]:
        if self.rounds is None:
            return {}
        # A grid that widens with its weight would move under the entries already rounded.
        movable = [
            (layer, seen)
            for layer, seen in zip(layers, moments, strict=True)
            if seen is not None and not layer.weight_quantizer.depends_on_weight
        ]
        solutions = distributed.solve([layer.problem(m) for layer, m in movable], self.rounds)
        for (layer, _), solution in zip(movable, solutions, strict=True):
            layer.write(solution)
        return {solution.report.name: solution.report for solution in solutions}

    def _tensors(self) -> list[Tensor]:
        weights = (t for x in self.layers for t in (x.weight, x.bias) if t is not None)
        ends = (x.weight_quantizer for x in self.layers)
        return [*weights, *(end for q in ends for end in (q.lower, q.upper))]

    def state(self) -> list[Tensor]:
        return [tensor.detach().clone() for tensor in self._tensors()]

    def restore(self, state: list[Tensor] | None = None) -> None:
        for tensor, value in zip(self._tensors(), state or self.before, strict=True):
            tensor.copy_(value)


def _as_trained(layer: QuantizedLayer) -> LayerReport:
    weight = layer.rows_first(layer.weight)
    return unchanged(layer.name, weight, layer.geometry, layer.row_blocks)


def together(images: Sequence[Any], size: int) -> list[Any]:
    """Batches of up to ``size`` neighbouring tensors of one shape; all else as it is."""
    batches: list[Any] = []
    pending: list[Tensor] = []
    for image in images:
        if pending and (not _alike(pending[0], image) or len(pending) == size):
            batches.append(torch.cat(pending))
            pending = []
        if isinstance(image, Tensor):
            pending.append(image)
        else:
            batches.append(image)
    return [*batches, torch.cat(pending)] if pending else batches


def _alike(first: Tensor, second: Any) -> bool:
    return isinstance(second, Tensor) and first.shape[1:] == second.shape[1:]


def sequence_of(images: Sequence[Any]) -> list[Any]:
    """As many of the first images as may stand still in a network, at least one."""
    pixels = 0
    chosen: list[Any] = []
    for image in images:
        sizes = (t.shape[0] * t[0, 0].numel() for t in tree_leaves(image) if _is_image(t))
        pixels += max(sizes, default=1)
        if chosen and pixels > _SEQUENCE_PIXELS:
            break
        chosen.append(image)
    return together(chosen, _AT_ONCE)


def _is_image(x: Any) -> bool:
    return isinstance(x, Tensor) and x.ndim > 2 and x.numel() > 0
