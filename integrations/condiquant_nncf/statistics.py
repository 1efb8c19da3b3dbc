"""Moments of layer inputs, collected by NNCF's statistics engine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import nncf
from nncf.common.graph.transformations.commands import TargetType
from nncf.common.tensor_statistics.collectors import (
    AggregatorBase,
    TensorCollector,
    TensorReducerBase,
)
from nncf.common.tensor_statistics.statistic_point import (
    StatisticPoint,
    StatisticPointsContainer,
)
from nncf.quantization.algorithms.pipeline import collect_statistics
from nncf.tensor import Tensor as NNCFTensor
from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import GraphModelWrapper
from nncf.torch.graph.transformations.commands import PTTargetPoint
from torch import Tensor

from condiquant_nncf.layers import Layer
from condiquant_plugin import gram
from condiquant_plugin.fake_quantizer import FakeQuantizer

_ALGORITHM = "condiquant"
_KEY = "moments"


class MomentsReducer(TensorReducerBase):
    """A layer's input to its :class:`condiquant_plugin.gram.Moments`."""

    def __init__(self, layer: Layer, quantizer: FakeQuantizer | None) -> None:
        super().__init__(inplace=False)
        self._layer, self._quantizer = layer, quantizer

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MomentsReducer) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[str, gram.LayerGeometry, int]:
        # NNCF merges equal reducers on one tensor: layers that read the same input through the same
        # geometry and quantizer share their moments, others must differ.
        return type(self).__name__, self._layer.geometry, id(self._quantizer)

    def _reduce_out_of_place(self, x: list[NNCFTensor]) -> list[NNCFTensor]:
        data: Tensor = x[0].data
        quantized = None if self._quantizer is None else self._quantizer(data)
        result = gram.moments(data, self._layer.geometry, quantized, name=self._layer.name)
        return [_Moments(result)]


class _Moments(NNCFTensor):
    """Carries moments through NNCF's collectors, which pass tensors only."""

    def __init__(self, value: gram.Moments) -> None:
        super().__init__(value.gram)
        self.value = value


class MomentsAggregator(AggregatorBase):
    """Adds up moments."""

    def _register_reduced_input_impl(self, x: _Moments) -> None:
        if self._container:
            self._container[0] = self._container[0] + x.value
        else:
            self._container.append(x.value)

    def _aggregate_impl(self) -> gram.Moments:
        result: gram.Moments = self._container[0]
        return result


def collect_moments(
    wrapped: GraphModelWrapper,
    layers: Iterable[Layer],
    batches: Iterable[Tensor],
    quantizers: Mapping[str, FakeQuantizer] | None = None,
) -> dict[str, gram.Moments]:
    """Moments of the input of every layer with a weight, over all batches.

    Args:
        wrapped: the float network.
        batches: images, ``(batch, channels, height, width)``.
        quantizers: input quantizer by layer name, for the quantized moments.
    """
    points = StatisticPointsContainer()
    collectors: dict[str, TensorCollector] = {}
    for layer in layers:
        if layer.weight_node is None:
            continue
        collector = TensorCollector()
        quantizer = None if quantizers is None else quantizers[layer.name]
        collector.register_statistic_branch(
            _KEY, MomentsReducer(layer, quantizer), MomentsAggregator()
        )
        target = PTTargetPoint(TargetType.OPERATOR_PRE_HOOK, layer.node.node_name, input_port_id=0)
        points.add_statistic_point(StatisticPoint(target, collector, _ALGORITHM))
        collectors[layer.name] = collector
    collect_statistics(points, wrapped, wrapped.get_graph(), nncf.Dataset(list(batches)))
    return {name: collector.get_statistics()[_KEY] for name, collector in collectors.items()}
