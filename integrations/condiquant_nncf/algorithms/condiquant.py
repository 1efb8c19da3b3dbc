"""CondiQuant as an algorithm of NNCF: recondition weights in front of any quantization."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import nncf
from nncf.common.graph.graph import NNCFGraph
from nncf.common.logging import nncf_logger
from nncf.common.logging.track_progress import track
from nncf.common.tensor_statistics.statistic_point import StatisticPointsContainer
from nncf.common.utils.backend import BackendType
from nncf.quantization.algorithms.algorithm import Algorithm

from condiquant_nncf.algorithms.learned_bounds import InputBounds
from condiquant_nncf.algorithms.statistics import collected, moments_branch, statistic_points
from condiquant_nncf.backends.base import CondiQuantAlgoBackend
from condiquant_nncf.backends.choose import AVAILABLE_BACKENDS, get_algo_backend, get_float_backend
from condiquant_nncf.configuration import QuantizationConfig
from condiquant_nncf.layer import Layer
from condiquant_plugin.errors import InputError
from condiquant_plugin.layerwise import distributed
from condiquant_plugin.layerwise.moments import Moments
from condiquant_plugin.layerwise.problem import (
    LayerProblem,
    LayerReport,
    Method,
    Solution,
    block_shape,
)
from condiquant_plugin.methods.condiquant.reconditioning import ReconditioningConfig


class CondiQuant(Algorithm):
    """Replaces the weights (and biases) of the layers of a float model.

    Put it first in a pipeline: ``Pipeline([[CondiQuant()], *create_ptq_pipeline().pipeline_steps])``.

    Args:
        config: which layers, and how to recondition them. The default objective is ``least_squares``
            if there are ``input_bounds``, else ``condition``.
        subset_size: calibration items to use.
        input_bounds: an :class:`InputBounds` in an earlier step of the same pipeline, which the
            objective ``least_squares`` needs; :func:`create_condiquant_pipeline` puts it there.

    Raises:
        InputError: ``least_squares`` without ``input_bounds``.
    """

    def __init__(
        self,
        config: QuantizationConfig | None = None,
        *,
        subset_size: int = 300,
        input_bounds: InputBounds | None = None,
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
        self._config, self._settings = config, settings
        self._subset_size, self._input_bounds = subset_size, input_bounds
        self._algorithm_key = f"CondiQuant_{hash(self)}"
        self.reports: list[LayerReport] = []
        """What became of every layer in the last run."""

    @property
    def available_backends(self) -> list[BackendType]:
        """PyTorch and OpenVINO."""
        return AVAILABLE_BACKENDS

    def get_statistic_points(self, model: Any, graph: NNCFGraph) -> StatisticPointsContainer:
        """Moments of the layers' inputs.

        Raises:
            InputError: a quantized model, or one without a layer in scope.
        """
        backend = get_float_backend(model, graph)
        layers, quantizers = self._layers(backend), None
        if self._settings.needs_quantized_inputs:
            assert self._input_bounds is not None
            quantizers = self._input_bounds.quantizers
            missing = [layer.name for layer in layers if layer.name not in quantizers]
            if missing:
                raise InputError(
                    f"no input bounds for {missing[0]}: give InputBounds the same config"
                )
        branch = moments_branch(quantizers, self._subset_size, self._settings.moments_dtype)
        return statistic_points(backend, layers, branch, self._algorithm_key)

    def apply(
        self,
        model: Any,
        graph: NNCFGraph,
        statistic_points: StatisticPointsContainer | None = None,
        dataset: nncf.Dataset | None = None,
    ) -> Any:
        """The model with reconditioned weights; :attr:`reports` says what changed."""
        assert statistic_points is not None
        backend = get_algo_backend(model, graph)
        layers = self._layers(backend)
        moments = {
            layer.name: collected(
                statistic_points, backend, layer, layer.activation_ports[0], self._algorithm_key
            )
            for layer in layers
        }
        model, self.reports = recondition(backend, layers, moments, self._settings)
        nncf_logger.info(_summary(self.reports))
        return model

    def _layers(self, backend: CondiQuantAlgoBackend) -> list[Layer]:
        layers = self._config.find_layers(backend)
        return [layer for layer in layers if layer.in_scope and layer.weight_name is not None]


def recondition(
    backend: CondiQuantAlgoBackend,
    layers: Sequence[Layer],
    moments: Mapping[str, Moments],
    settings: ReconditioningConfig,
    *,
    shared: bool = False,
) -> tuple[Any, list[LayerReport]]:
    """Solve all layers with a weight, equal shapes in one batch, and put the weights into the model.

    Args:
        shared: split the layers among the processes of ``torch.distributed``, where all must call this
            with equal moments.
    """
    uses: dict[str, list[Layer]] = defaultdict(list)
    for layer in layers:
        if layer.weight_name is not None:
            uses[layer.weight_name].append(layer)
    problems = [_problem(backend, same, moments) for same in uses.values()]
    solver = partial(_solve, method=settings)
    solutions = distributed.solve(problems, settings, solver) if shared else solver(problems)
    solved = [
        (same, same[0].rows_first(solution.weight), solution.bias)
        for same, solution in zip(uses.values(), solutions, strict=True)
    ]
    return backend.update(solved), [solution.report for solution in solutions]


def _problem(
    backend: CondiQuantAlgoBackend, uses: Sequence[Layer], moments: Mapping[str, Moments]
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
    )


def _solve(problems: Sequence[LayerProblem], method: Method) -> list[Solution]:
    batches: dict[tuple[int, int], list[LayerProblem]] = defaultdict(list)
    for problem in problems:
        batches[block_shape(problem)].append(problem)
    solutions: dict[str, Solution] = {}
    for batch in track(list(batches.values()), description="Reconditioning weights"):
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
