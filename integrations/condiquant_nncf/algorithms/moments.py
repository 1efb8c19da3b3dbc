"""Moments of the inputs of all layers in scope, collected once for the algorithms behind."""

from __future__ import annotations

from typing import Any

import nncf
from nncf.common.graph.graph import NNCFGraph
from nncf.common.tensor_statistics.statistic_point import StatisticPointsContainer

from condiquant_nncf.algorithms.input_bounds import InputBounds, OnBothBackends
from condiquant_nncf.algorithms.statistics import collected, moments_branch, statistic_points
from condiquant_nncf.backends.base import CondiQuantAlgoBackend
from condiquant_nncf.backends.choose import get_algo_backend, get_float_backend
from condiquant_nncf.configuration import QuantizationConfig
from condiquant_nncf.layer import Layer
from condiquant_plugin.errors import InputError
from condiquant_plugin.layerwise.moments import Moments


class InputMoments(OnBothBackends):
    """Collects what reconditioning and rounding need of the data, and leaves the model as it is.

    Args:
        config: which layers.
        subset_size: calibration items to use.
        input_bounds: an :class:`InputBounds` in an earlier step, for the moments of quantized inputs.
    """

    def __init__(
        self,
        config: QuantizationConfig | None = None,
        *,
        subset_size: int = 300,
        input_bounds: InputBounds | None = None,
    ) -> None:
        self._config = config or QuantizationConfig()
        self._subset_size, self._input_bounds = subset_size, input_bounds
        self._algorithm_key = f"InputMoments_{hash(self)}"
        self._found: dict[str, Moments] | None = None

    @property
    def moments(self) -> dict[str, Moments]:
        """Of every layer in scope with a weight, by its name.

        Raises:
            InputError: before the algorithm has run.
        """
        if self._found is None:
            raise InputError("moments are not there yet: put InputMoments into an earlier step")
        return self._found

    def get_statistic_points(self, model: Any, graph: NNCFGraph) -> StatisticPointsContainer:
        """Moments of the layers' inputs.

        Raises:
            InputError: a quantized model, or one without a layer in scope.
        """
        backend = get_float_backend(model, graph)
        layers, quantizers = self._layers(backend), None
        if self._input_bounds is not None:
            quantizers = self._input_bounds.quantizers
            missing = [layer.name for layer in layers if layer.name not in quantizers]
            if missing:
                raise InputError(
                    f"no input bounds for {missing[0]}: give InputBounds the same config"
                )
        branch = moments_branch(quantizers, self._subset_size)
        return statistic_points(backend, layers, branch, self._algorithm_key)

    def apply(
        self,
        model: Any,
        graph: NNCFGraph,
        statistic_points: StatisticPointsContainer | None = None,
        dataset: nncf.Dataset | None = None,
    ) -> Any:
        """The model as it is."""
        assert statistic_points is not None
        backend = get_algo_backend(model, graph)
        self._found = {
            layer.name: collected(
                statistic_points, backend, layer, layer.activation_ports[0], self._algorithm_key
            )
            for layer in self._layers(backend)
        }
        return model

    def _layers(self, backend: CondiQuantAlgoBackend) -> list[Layer]:
        layers = self._config.find_layers(backend)
        return [layer for layer in layers if layer.in_scope and layer.weight_name is not None]
