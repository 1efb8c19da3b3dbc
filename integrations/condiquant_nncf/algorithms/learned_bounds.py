"""Fake quantizers with free, learned bounds (DOBI) as an algorithm of NNCF."""

from __future__ import annotations

from typing import Any

import nncf
from nncf.common.graph.graph import NNCFGraph
from nncf.common.logging import nncf_logger
from nncf.common.tensor_statistics.statistic_point import StatisticPointsContainer

from condiquant_nncf.algorithms.condiquant import recondition
from condiquant_nncf.algorithms.input_bounds import (
    BoundsAlgorithm,
    InputBounds,
    Placed,
    create_quantizers,
)
from condiquant_nncf.algorithms.moments import InputMoments
from condiquant_nncf.backends.base import CondiQuantAlgoBackend
from condiquant_nncf.backends.choose import get_algo_backend, get_float_backend
from condiquant_nncf.configuration import QuantizationConfig
from condiquant_plugin.errors import InputError
from condiquant_plugin.layerwise.problem import LayerReport
from condiquant_plugin.methods.gptq.rounding import GPTQ
from condiquant_plugin.uniform.grid import SnappedGrid
from condiquant_plugin.uniform.sampling import BOUNDS_CROPS


class LearnedBoundsQuantization(BoundsAlgorithm):
    """Places fake quantizers of 2 to 8 bits on weights, layer inputs and operands of products.

    On torch they are :class:`condiquant_plugin.FakeQuantizer` modules, whose bounds train; in an
    ``ov.Model`` they are FakeQuantize nodes with the same snapped bounds. Ranges need not be symmetric,
    nor hold zero as a level.

    Args:
        config: which layers, bits, granularity and rounding.
        subset_size: calibration items to use.
        input_bounds: an :class:`InputBounds` in an earlier step, instead of searching them here.
        moments: an :class:`InputMoments` in an earlier step, with which ``rounding="gptq"`` rounds;
            without them every entry goes to its nearest level.

    Raises:
        InputError: ``bounds_inputs`` other than ``"float"``.
    """

    def __init__(
        self,
        config: QuantizationConfig | None = None,
        *,
        subset_size: int = BOUNDS_CROPS,
        input_bounds: InputBounds | None = None,
        moments: InputMoments | None = None,
    ) -> None:
        super().__init__(config, subset_size=subset_size)
        self._input_bounds = input_bounds
        self._moments = moments if self._config.rounding == "gptq" else None
        self.rounding: list[LayerReport] = []
        """What rounding did to each layer's output in the last run."""

    def get_statistic_points(self, model: Any, graph: NNCFGraph) -> StatisticPointsContainer:
        """Samples of the layers' inputs, where their bounds are not known yet.

        Raises:
            InputError: a quantized model, or one without a layer in scope; NaN or Inf in a weight.
        """
        if self._input_bounds is None:
            return super().get_statistic_points(model, graph)
        get_float_backend(model, graph)
        return StatisticPointsContainer()

    def apply(
        self,
        model: Any,
        graph: NNCFGraph,
        statistic_points: StatisticPointsContainer | None = None,
        dataset: nncf.Dataset | None = None,
    ) -> Any:
        """The model with quantizers, their bounds searched (DOBI)."""
        backend = get_algo_backend(model, graph)
        layers = self._layers(backend)
        placed = [
            self._known(item) or self._searched(item, statistic_points, backend)
            for item in create_quantizers(backend, layers, self._config)
        ]
        if self._moments is not None:
            backend = self._rounded(placed, backend)
        nncf_logger.info(
            f"LearnedBoundsQuantization placed {len(placed)} quantizers on {len(layers)} layers"
        )
        return backend.insert_quantizers(placed)

    def _known(self, placed: Placed) -> Placed | None:
        layer, port, quantizer = placed
        if self._input_bounds is None or port is None:
            return None
        known = self._input_bounds.by_input
        if quantizer.name not in known:
            raise InputError(f"no bounds for {quantizer.name}: give InputBounds the same config")
        return layer, port, known[quantizer.name]

    def _rounded(
        self, placed: list[Placed], backend: CondiQuantAlgoBackend
    ) -> CondiQuantAlgoBackend:
        """The model with weights that the quantizers round to GPTQ's levels."""
        assert self._moments is not None
        moments, grids = self._moments.moments, dict[str, SnappedGrid]()
        for layer, port, quantizer in placed:
            if port is None and layer.name in moments:
                grids[layer.name] = quantizer.levels_of(backend.weight(layer)).map(layer.rows_first)
        layers = [layer for layer in self._layers(backend) if layer.name in moments]
        model, self.rounding = recondition(backend, layers, moments, GPTQ(), grids)
        return get_algo_backend(model, backend.graph)
