"""One calibration: what all candidates share, and what each of them makes of the network."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from condiquant_plugin.calibration.candidates import (
    Calibration,
    Candidate,
    candidates,
    fidelity_in_db,
)
from condiquant_plugin.calibration.images import (
    few_at_once,
    held_out,
    sequence_length,
    sequence_of,
    together,
)
from condiquant_plugin.configuration import QuantizationConfig
from condiquant_plugin.forward_pass import run
from condiquant_plugin.layerwise import distributed
from condiquant_plugin.layerwise.moments import Moments, has_wide_patches
from condiquant_plugin.layerwise.problem import LayerProblem, LayerReport, Solution
from condiquant_plugin.layerwise.quantized import (
    QuantizedLayer,
    collect_moments,
    computing_floats,
)
from condiquant_plugin.layerwise.sequential import solve_in_sequence
from condiquant_plugin.methods.alignment.transform import transform_inputs
from condiquant_plugin.methods.condiquant.reconditioning import ReconditioningConfig, unchanged
from condiquant_plugin.methods.equalization.scaling import Scaling, equalize, find_scalings
from condiquant_plugin.methods.gptq.rounding import GPTQ
from condiquant_plugin.uniform.bounds_search import search_bounds
from condiquant_plugin.uniform.fake_quantizer import (
    fake_quantizers,
    snapped_together,
)

_EQUALIZED_ON = 4
"""Images of one size that channels' ranges are taken from."""
_SAME = 1e-4
"""Of the ends of a range: rounding in float32 changes less, factors of channels change more."""


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
    if config.transform != "none":
        transform_inputs(model, layers, few_at_once(images, batch_size), config.transform_kind)
    chains = any(layer.geometry.kind != "linear" for layer in layers)
    tried = candidates(config, sequences=chains) if layers else [Candidate(None)]
    kept, chosen = held_out(len(images))
    seen = images if unseen else [images[i] for i in kept]
    scalings = _scalings(model, layers, seen[:_EQUALIZED_ON]) if config.tries_equalizing else []
    chooses = len(tried) > 1 or bool(scalings)
    if chooses and not unseen:
        unseen, images = [images[i] for i in chosen], seen
    job = _Job(model, layers, list(images), config, bounds_images, batch_size, scalings)
    job.search()
    if chooses:
        job.hold_out(unseen)
    job.collect([each.settings for each in tried])
    results = [job.solve(tried[0])]
    if scalings:
        plain = job.start
        job.equalize(scalings)
        job.search()
        job.collect([each.settings for each in tried], plain)
        results.append(job.solve(tried[0]))
        if job.best(results) is results[0]:
            job.start = plain
    results += [job.solve(each) for each in tried[1:]]
    best = job.best(results)
    job.restore(best.state)
    fidelity = {each.calibration.chosen: each.fidelity for each in results} if chooses else {}
    return replace(best.calibration, fidelity=fidelity, seconds=job.seconds)


def _scalings(
    model: nn.Module, layers: Sequence[QuantizedLayer], images: Sequence[Any]
) -> list[Scaling]:
    """What makes the quantized layers' outputs better, the same in all processes."""
    if not layers:
        return []
    with distributed.failing_together("equalizing channels"):
        found = find_scalings(model, layers, together(images, _EQUALIZED_ON)[0])
    shared = distributed.agreed([(each.factors, each.exponent) for each in found])
    pairs = zip(found, shared, strict=True)
    every = [replace(each, factors=f.to(each.factors), exponent=e) for each, (f, e) in pairs]
    return [each for each in every if each.exponent]


@dataclass
class _Start:
    """What candidates begin with: a network that computes what the float one does, and its bounds."""

    state: list[Tensor]
    moments: dict[str, Moments] = field(default_factory=dict)
    equalized: dict[str, float] = field(default_factory=dict)
    ranges: dict[str, Tensor] = field(default_factory=dict)
    """Ends of the grids of each layer's inputs, that the moments are taken with."""

    def shares(self, layer: QuantizedLayer, other: _Start) -> bool:
        """Whether a layer's inputs are those of ``other``, up to what rounding does to floats."""
        name = layer.name
        return (
            name not in self.equalized
            and name in other.moments
            and torch.allclose(self.ranges[name], other.ranges[name], rtol=_SAME, atol=0)
        )


@dataclass
class _Result:
    """What a candidate made of the network, and how close that is to the float one."""

    calibration: Calibration
    state: list[Tensor]
    fidelity: float


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
        scalings: Sequence[Scaling],
    ) -> None:
        self.model, self.layers, self.config = model, list(layers), config
        self.images = images
        self.batch_size = batch_size
        self.batches = together(images, batch_size)
        self.bounds_batches = together(images[:bounds_images], batch_size)
        self.seconds = {"gram": 0.0, "recondition": 0.0, "bounds": 0.0}
        self.called_once: set[str] = set()
        self.solved: dict[
            tuple[str, ReconditioningConfig | GPTQ], tuple[LayerProblem, Solution]
        ] = {}
        self.rounds = GPTQ() if config.rounding == "gptq" else None
        self.changeable = self._tensors(scalings)
        self.start = _Start(self.state())
        self.unseen: Sequence[Any] = ()
        self.targets: list[Tensor] = []

    def equalize(self, scalings: Sequence[Scaling]) -> None:
        self.restore(self.start.state)
        with distributed.failing_together("equalizing channels"):
            kept = equalize(self.model, scalings, self.batches[0])
        equalized = {name: each.exponent for each in kept for name in each.readers}
        self.start = _Start(self.state(), equalized=equalized)

    def search(self) -> None:
        started = time.perf_counter()
        with distributed.failing_together("searching bounds"):
            quantized = self.config.bounds_inputs == "quantized"
            search_bounds(self.model, self.bounds_batches, quantized_inputs=quantized)
        distributed.broadcast_bounds(self.model)
        self.seconds["bounds"] += time.perf_counter() - started
        self.start.state = self.state()

    def hold_out(self, images: Sequence[Any]) -> None:
        """Judge candidates on ``images``."""
        with computing_floats(self.model):
            self.unseen = few_at_once(images)
            self.targets = [run(self.model, batch) for batch in self.unseen]

    @staticmethod
    def best(results: Sequence[_Result]) -> _Result:
        return max(results, key=lambda result: result.fidelity)

    def collect(
        self, settings: Sequence[ReconditioningConfig | None], other: _Start | None = None
    ) -> None:
        """Moments of all layers, of those whose inputs are the same with ``other`` its own."""
        given = [each for each in settings if each is not None]
        if not self.layers or not (given or self.rounds):
            return
        started = time.perf_counter()
        self.start.ranges = {layer.name: _ranges(layer) for layer in self.layers}
        shared = [x.name for x in self.layers if other is not None and self.start.shares(x, other)]
        known = {name: other.moments[name] for name in shared} if other is not None else {}
        rest = [layer for layer in self.layers if layer.name not in known]
        quantized = bool(self.rounds) or any(each.needs_quantized_inputs for each in given)
        batches = self.batches
        if any(has_wide_patches(layer.weight.shape[1], layer.geometry) for layer in rest):
            # One by one they would take long; how they are batched changes the sums' last bits.
            batches = few_at_once(self.images, self.batch_size)
        found: dict[str, Moments] = {}
        once = self.called_once & known.keys()
        if rest:
            collected = collect_moments(self.model, rest, batches, quantized=quantized)
            found = collected.moments
            once |= {name for name, uses in collected.uses.items() if uses == 1}
        self.called_once = once
        self.start.moments = {x.name: (known | found)[x.name] for x in self.layers}
        self.seconds["gram"] += time.perf_counter() - started

    def solve(self, candidate: Candidate) -> _Result:
        """New weights, their bounds and their rounding."""
        self.restore(self.start.state)
        calibration = self._solved(candidate)
        fidelity = 0.0
        if self.targets:
            with snapped_together(self.model):
                outputs = [run(self.model, batch) for batch in self.unseen]
            pairs = zip(_by_image(outputs), _by_image(self.targets), strict=True)
            fidelity = distributed.agreed(mean(fidelity_in_db(o, target) for o, target in pairs))
        return _Result(calibration, self.state(), fidelity)

    def _solved(self, candidate: Candidate) -> Calibration:
        started = time.perf_counter()
        reports: dict[str, LayerReport] = {}
        rounding: dict[str, LayerReport] = {}
        settings, alone = candidate.settings, self.layers
        in_sequence: list[QuantizedLayer] = []
        if settings is not None and settings.inputs == "compressed":
            in_sequence = [layer for layer in alone if layer.name in self.called_once]
            alone = [layer for layer in alone if layer.name not in self.called_once]
        moments = [self.start.moments.get(layer.name) for layer in alone]
        reports |= self._recondition(alone, moments, settings)
        rounding |= self._round(alone, moments)

        def solve_one(layer: QuantizedLayer, seen: Moments) -> LayerReport:
            found = self._recondition([layer], [seen], settings)
            rounding.update(self._round([layer], [seen]))
            return found[layer.name]

        if in_sequence:
            batches = sequence_of(self.images)
            # What is known is of all images, of all processes and of a network as trained.
            every = sequence_length(self.images) == len(self.images) and not alone
            known = self.start.moments if every and distributed.world_size() == 1 else None
            solved = solve_in_sequence(self.model, in_sequence, batches, solve_one, known)
            reports |= {layer.name: r for layer, r in zip(in_sequence, solved, strict=True)}
        self.seconds["recondition"] += time.perf_counter() - started
        names = [layer.name for layer in self.layers]
        rounded = [rounding[name] for name in names if name in rounding]
        equalized = self.start.equalized
        name = f"{candidate.name}, equalized" if equalized else candidate.name
        return Calibration([reports[n] for n in names], name, rounding=rounded, equalized=equalized)

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
        solutions = self._solutions(problems, settings)
        for layer, solution in zip(layers, solutions, strict=True):
            layer.write(solution)
            layer.weight_quantizer.search_bounds(layer.weight)
        return {solution.report.name: solution.report for solution in solutions}

    def _solutions(
        self, problems: Sequence[LayerProblem], method: ReconditioningConfig | GPTQ
    ) -> list[Solution]:
        """Those of problems that an earlier candidate had are kept."""
        found: dict[str, Solution] = {}
        for problem in problems:
            before = self.solved.get((problem.name, method))
            if before is not None and _is_same(problem, before[0]):
                found[problem.name] = before[1]
        rest = [problem for problem in problems if problem.name not in found]
        for problem, solution in zip(rest, distributed.solve(rest, method), strict=True):
            found[problem.name] = solution
            # Moments of a sequence are nobody else's, and many.
            if problem.moments is self.start.moments.get(problem.name):
                self.solved[problem.name, method] = problem, solution
        return [found[problem.name] for problem in problems]

    def _round(
        self, layers: Sequence[QuantizedLayer], moments: Sequence[Moments | None]
    ) -> dict[str, LayerReport]:
        if self.rounds is None:
            return {}
        given = [(x, seen) for x, seen in zip(layers, moments, strict=True) if seen is not None]
        solutions = self._solutions([layer.problem(m) for layer, m in given], self.rounds)
        for (layer, _), solution in zip(given, solutions, strict=True):
            layer.write(solution)
        return {solution.report.name: solution.report for solution in solutions}

    def _tensors(self, scalings: Sequence[Scaling]) -> list[Tensor]:
        """All that a calibration may change, each once."""
        weights = (t for x in self.layers for t in (x.weight, x.bias) if t is not None)
        ends = (end for q in fake_quantizers(self.model).values() for end in (q.lower, q.upper))
        scaled = (tensor for each in scalings for tensor in each.link.tensors())
        return list({id(tensor): tensor for tensor in (*weights, *ends, *scaled)}.values())

    def state(self) -> list[Tensor]:
        return [tensor.detach().clone() for tensor in self.changeable]

    def restore(self, state: list[Tensor]) -> None:
        for tensor, value in zip(self.changeable, state, strict=True):
            tensor.copy_(value)


def _by_image(outputs: Sequence[Tensor]) -> list[Tensor]:
    return [image for output in outputs for image in output.split(1)]


def _is_same(problem: LayerProblem, other: LayerProblem) -> bool:
    """Whether two problems of a layer have one solution."""
    return problem.moments is other.moments and all(
        torch.equal(mine, theirs)
        for mine, theirs in zip(_given(problem), _given(other), strict=True)
    )


def _given(problem: LayerProblem) -> list[Tensor]:
    bias = [] if problem.bias is None else [problem.bias]
    grid = [] if problem.grid is None else [problem.grid.lower, problem.grid.step]
    return [problem.weight, *bias, *grid]


def _ranges(layer: QuantizedLayer) -> Tensor:
    """Lower and upper ends for each input quantizer."""
    ends = [end for each in layer.input_quantizers for end in (each.lower, each.upper)]
    return torch.stack([end.detach().clone() for end in ends])


def _as_trained(layer: QuantizedLayer) -> LayerReport:
    weight = layer.rows_first(layer.weight)
    return unchanged(layer.name, weight, layer.geometry, layer.row_blocks)
