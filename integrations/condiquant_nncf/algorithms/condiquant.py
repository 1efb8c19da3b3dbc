"""CondiQuant as an algorithm of NNCF: recondition weights in front of any quantization."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import nncf
from nncf.common.graph.graph import NNCFGraph
from nncf.common.logging import nncf_logger
from nncf.common.logging.track_progress import track
from nncf.common.tensor_statistics.statistic_point import StatisticPointsContainer

from condiquant_nncf.algorithms.input_bounds import InputBounds, OnBothBackends
from condiquant_nncf.algorithms.moments import InputMoments
from condiquant_nncf.backends.base import CondiQuantAlgoBackend
from condiquant_nncf.backends.choose import get_algo_backend, get_float_backend
from condiquant_nncf.configuration import QuantizationConfig
from condiquant_nncf.layer import Layer
from condiquant_plugin.errors import InputError
from condiquant_plugin.layerwise.moments import Moments
from condiquant_plugin.layerwise.problem import (
    LayerProblem,
    LayerReport,
    Method,
    Solution,
    block_shape,
)
from condiquant_plugin.uniform.grid import SnappedGrid


class CondiQuant(OnBothBackends):
    """Replaces the weights (and biases) of the layers of a float model.

    Put it first in a pipeline: ``Pipeline([[CondiQuant()], *create_ptq_pipeline().pipeline_steps])``.

    Args:
        config: which layers, and how to recondition them. The default objective is ``least_squares``
            if there are ``input_bounds``, else ``condition``.
        subset_size: calibration items to use.
        input_bounds: an :class:`InputBounds` in an earlier step of the same pipeline, which the
            objective ``least_squares`` needs; :func:`create_condiquant_pipeline` puts it there.
        moments: an :class:`InputMoments` in an earlier step, instead of collecting them here.

    Raises:
        InputError: ``least_squares`` without ``input_bounds``; ``inputs="compressed"``.
    """

    def __init__(
        self,
        config: QuantizationConfig | None = None,
        *,
        subset_size: int = 300,
        input_bounds: InputBounds | None = None,
        moments: InputMoments | None = None,
    ) -> None:
        config = config or QuantizationConfig()
        settings = config.reconditioning()
        if config.recondition == "auto" and settings is not None and input_bounds is None:
            settings = replace(settings, objective="condition")
        if settings is None:
            raise InputError("recondition=None leaves CondiQuant nothing to do: leave it out")
        if settings.needs_quantized_inputs and input_bounds is None:
            raise InputError(
                'objective="least_squares" needs bounds of the inputs: use create_condiquant_pipeline(), '
                'or objective="condition"'
            )
        if settings.inputs == "compressed":
            raise InputError(
                'inputs="compressed" needs a torch model that can stand still: use quantize() or '
                'quantize_network(), or inputs="original"'
            )
        self._config, self._settings = config, settings
        self._is_given = moments is not None
        bounds = input_bounds if settings.needs_quantized_inputs else None
        self._moments = moments or InputMoments(
            config, subset_size=subset_size, input_bounds=bounds
        )
        self.reports: list[LayerReport] = []
        """What became of every layer in the last run."""

    def get_statistic_points(self, model: Any, graph: NNCFGraph) -> StatisticPointsContainer:
        """Moments of the layers' inputs.

        Raises:
            InputError: a quantized model, or one without a layer in scope.
        """
        if self._is_given:
            get_float_backend(model, graph)
            return StatisticPointsContainer()
        return self._moments.get_statistic_points(model, graph)

    def apply(
        self,
        model: Any,
        graph: NNCFGraph,
        statistic_points: StatisticPointsContainer | None = None,
        dataset: nncf.Dataset | None = None,
    ) -> Any:
        """The model with reconditioned weights; :attr:`reports` says what changed."""
        if not self._is_given:
            self._moments.apply(model, graph, statistic_points)
        backend = get_algo_backend(model, graph)
        moments = self._moments.moments
        layers = [layer for layer in self._config.find_layers(backend) if layer.name in moments]
        model, self.reports = recondition(backend, layers, moments, self._settings)
        nncf_logger.info(_summary(self.reports))
        return model


def recondition(
    backend: CondiQuantAlgoBackend,
    layers: Sequence[Layer],
    moments: Mapping[str, Moments],
    method: Method,
    grids: Mapping[str, SnappedGrid] | None = None,
) -> tuple[Any, list[LayerReport]]:
    """Solve all layers with a weight, equal shapes in one batch, and put the weights into the model.

    Args:
        grids: levels by layer name, rows first, for methods that round; layers without are left alone.
    """
    uses: dict[str, list[Layer]] = defaultdict(list)
    for layer in layers:
        if layer.weight_name is not None:
            uses[layer.weight_name].append(layer)
    kept = [same for same in uses.values() if grids is None or same[0].name in grids]
    problems = [_problem(backend, same, moments, grids or {}) for same in kept]
    solutions = _solve(problems, method)
    solved = [
        (same, same[0].rows_first(solution.weight), solution.bias)
        for same, solution in zip(kept, solutions, strict=True)
    ]
    return backend.update(solved), [solution.report for solution in solutions]


def _problem(
    backend: CondiQuantAlgoBackend,
    uses: Sequence[Layer],
    moments: Mapping[str, Moments],
    grids: Mapping[str, SnappedGrid],
) -> LayerProblem:
    """One layer, or several that share their weight: their inputs count together."""
    first = uses[0]
    total = moments[first.name]
    for other in uses[1:]:
        total = total + moments[other.name]
    return LayerProblem(
        first.name,
        first.rows_first(backend.weight(first)),
        backend.bias(first),
        total,
        first.geometry,
        first.row_blocks,
        grids.get(first.name),
    )


def _solve(problems: Sequence[LayerProblem], method: Method) -> list[Solution]:
    batches: dict[tuple[int, int], list[LayerProblem]] = defaultdict(list)
    for problem in problems:
        batches[block_shape(problem)].append(problem)
    solutions: dict[str, Solution] = {}
    for batch in track(list(batches.values()), description="Solving layers"):
        solved = method.solve(batch)
        solutions.update(zip((p.name for p in batch), solved, strict=True))
    return [solutions[problem.name] for problem in problems]


def _summary(reports: Sequence[LayerReport]) -> str:
    before, after, error = (
        median(getattr(report, name) for report in reports)
        for name in ("condition_before", "condition_after", "output_error")
    )
    return (
        f"CondiQuant reconditioned {len(reports)} layers: median condition number {before:.4g} before, "
        f"{after:.4g} after, median relative change of the output {error:.2g}"
    )
