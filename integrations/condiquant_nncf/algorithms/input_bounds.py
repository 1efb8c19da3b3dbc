"""Quantizers for layers, and the bounds of their inputs (DOBI) as an algorithm of NNCF."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import nncf
from nncf.common.graph.graph import NNCFGraph
from nncf.common.tensor_statistics.statistic_point import StatisticPointsContainer
from nncf.common.utils.backend import BackendType
from nncf.quantization.algorithms.algorithm import Algorithm

from condiquant_nncf.algorithms.statistics import collected, sample_branch, statistic_points
from condiquant_nncf.backends.base import CondiQuantAlgoBackend
from condiquant_nncf.backends.choose import AVAILABLE_BACKENDS, get_algo_backend, get_float_backend
from condiquant_nncf.configuration import QuantizationConfig
from condiquant_nncf.layer import Layer
from condiquant_plugin.errors import InputError, check_finite
from condiquant_plugin.uniform.fake_quantizer import FakeQuantizer
from condiquant_plugin.uniform.sampling import BOUNDS_CROPS

Placed = tuple[Layer, int | None, FakeQuantizer]


class OnBothBackends(Algorithm):
    """An algorithm for torch models and for ``ov.Model``."""

    @property
    def available_backends(self) -> list[BackendType]:
        """PyTorch and OpenVINO."""
        return AVAILABLE_BACKENDS


class BoundsAlgorithm(OnBothBackends):
    """Searches bounds of layer inputs on a sample of the calibration items."""

    def __init__(
        self, config: QuantizationConfig | None = None, *, subset_size: int = BOUNDS_CROPS
    ) -> None:
        self._config = config or QuantizationConfig()
        if self._config.bounds_inputs != "float":
            raise InputError(
                'bounds_inputs="quantized" is for quantize_network() only: use "float"'
            )
        self._config.check_no_transform("is for torch networks with learned bounds")
        self._subset_size = subset_size
        self._algorithm_key = f"{type(self).__name__}_{hash(self)}"

    def get_statistic_points(self, model: Any, graph: NNCFGraph) -> StatisticPointsContainer:
        """Samples of the layers' inputs.

        Raises:
            InputError: a quantized model, or one without a layer in scope; NaN or Inf in a weight.
        """
        backend = get_float_backend(model, graph)
        layers = self._layers(backend)
        check_weights(backend, layers)
        branch = sample_branch(self._subset_size)
        return statistic_points(backend, layers, branch, self._algorithm_key)

    def _layers(self, backend: CondiQuantAlgoBackend) -> list[Layer]:
        return self._config.find_layers(backend)

    def _searched(self, placed: Placed, points: Any, backend: CondiQuantAlgoBackend) -> Placed:
        layer, port, quantizer = placed
        if port is None:
            quantizer.search_bounds(backend.weight(layer))
        else:
            sample = collected(points, backend, layer, port, self._algorithm_key)
            quantizer.to(sample.device).search_bounds(sample)
        return placed


class InputBounds(BoundsAlgorithm):
    """Finds the bounds of all inputs and leaves the model as it is, for the algorithms behind."""

    def __init__(
        self, config: QuantizationConfig | None = None, *, subset_size: int = BOUNDS_CROPS
    ) -> None:
        super().__init__(config, subset_size=subset_size)
        self._found: dict[str, FakeQuantizer] | None = None

    @property
    def by_input(self) -> dict[str, FakeQuantizer]:
        """Quantizers by their names, those of the factors of products too.

        Raises:
            InputError: before the algorithm has run.
        """
        if self._found is None:
            raise InputError(
                "bounds of the inputs are not there yet: put InputBounds into an earlier step"
            )
        return self._found

    @property
    def quantizers(self) -> dict[str, FakeQuantizer]:
        """Input quantizer of every layer with a weight, by the layer's name; errors as above."""
        suffix = ".input"
        found = self.by_input.items()
        return {n.removesuffix(suffix): q for n, q in found if n.endswith(suffix)}

    def apply(
        self,
        model: Any,
        graph: NNCFGraph,
        statistic_points: StatisticPointsContainer | None = None,
        dataset: nncf.Dataset | None = None,
    ) -> Any:
        """The model as it is."""
        backend = get_algo_backend(model, graph)
        placed = create_quantizers(backend, self._layers(backend), self._config, weights=False)
        searched = [self._searched(item, statistic_points, backend) for item in placed]
        self._found = {quantizer.name: quantizer for _, _, quantizer in searched}
        return model


def check_weights(backend: CondiQuantAlgoBackend, layers: Sequence[Layer]) -> None:
    """Raise InputError for NaN or Inf, before they spoil the inputs of other layers."""
    for layer in layers:
        if layer.weight_node is not None:
            check_finite(backend.weight(layer), f"the weight of {layer.name}")


def create_quantizers(
    backend: CondiQuantAlgoBackend,
    layers: list[Layer],
    config: QuantizationConfig,
    *,
    weights: bool = True,
    transforms: bool = False,
) -> Iterator[Placed]:
    """A quantizer for every input port and, where the port is ``None``, every weight; no bounds yet.

    Args:
        transforms: whether inputs may be transformed, which is yet to be set how, and rows of softmax maps
            have scales, as the config says.
    """
    for layer in layers:
        weight_bits, activation_bits = config.bits(layer.name, layer.in_scope)
        for port in layer.activation_ports:
            transformed = transforms and config.transforms(activation_bits)
            scaled = transforms and config.scales_rows(activation_bits)
            yield layer, port, backend.quantizer_class(
                activation_bits,
                "activation" if layer.weight_node is not None else "operand",
                side=config.activation_side,
                name=layer.input_name(port),
                zero_on_grid=config.zero_on_grid,
                overflow=config.overflow,
                transforms=_features(backend, layer) if transformed else 0,
                softmax=scaled and backend.takes_softmax_map(layer, port),
            )  # fmt: skip
        if weights and layer.weight_node is not None and not layer.reuses_weight:
            rows = backend.weight(layer).shape[layer.output_axis]
            yield layer, None, backend.quantizer_class(
                weight_bits,
                "weight",
                row_blocks=rows if config.weight_granularity == "channel" else layer.row_blocks,
                axis=layer.output_axis,
                name=f"{layer.name}.weight",
                zero_on_grid=config.zero_on_grid,
                overflow=config.overflow,
            )  # fmt: skip


def _features(backend: CondiQuantAlgoBackend, layer: Layer) -> int:
    """Of a linear layer in scope, whose input has them last; else 0."""
    linear = layer.weight_node is not None and layer.geometry.kind == "linear"
    if not (linear and layer.in_scope) or layer.transposed_inputs:
        return 0
    return int(layer.rows_first(backend.weight(layer)).shape[-1])
