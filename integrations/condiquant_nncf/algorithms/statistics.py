"""Statistics of layer inputs, collected by NNCF's engine: moments, and samples to search bounds on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import nncf
import torch
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
from torch import Tensor

from condiquant_nncf.backends.base import CondiQuantAlgoBackend
from condiquant_nncf.backends.choose import get_algo_backend
from condiquant_nncf.layer import Layer
from condiquant_plugin.layerwise import distributed
from condiquant_plugin.layerwise.moments import Moments, moments_of, no_moments
from condiquant_plugin.uniform.fake_quantizer import FakeQuantizer
from condiquant_plugin.uniform.sampling import Sample

if TYPE_CHECKING:
    from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import GraphModelWrapper

_KEY = "value"

Branch = Callable[[Layer, int], tuple[TensorReducerBase, AggregatorBase] | None]


class _Carrier(NNCFTensor):
    """Takes any value through NNCF's collectors, which pass tensors only."""

    def __init__(self, value: Any) -> None:
        super().__init__(torch.empty(1))
        self.value = value


class _InputReducer(TensorReducerBase):
    """Sees a layer's input as a torch tensor in the order of the product."""

    def __init__(self, layer: Layer, port: int) -> None:
        super().__init__(inplace=False)
        self._layer, self._port = layer, port

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _InputReducer) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[Any, ...]:
        # NNCF merges equal reducers on one tensor, and their aggregators with them.
        return type(self).__name__, self._port in self._layer.transposed_inputs

    def _input(self, x: list[NNCFTensor]) -> Tensor:
        return self._layer.features_last(torch.as_tensor(x[0].data).detach(), self._port)


class MomentsReducer(_InputReducer):
    """A layer's input to its :class:`condiquant_plugin.Moments`."""

    def __init__(
        self, layer: Layer, quantizer: FakeQuantizer | None, dtype: torch.dtype = torch.float64
    ) -> None:
        super().__init__(layer, layer.activation_ports[0])
        self._quantizer, self._dtype = quantizer, dtype

    def _identity(self) -> tuple[Any, ...]:
        return (*super()._identity(), self._layer.geometry, id(self._quantizer), self._dtype)

    def _reduce_out_of_place(self, x: list[NNCFTensor]) -> list[NNCFTensor]:
        data = self._input(x)
        quantized = None if self._quantizer is None else self._quantizer(data)
        layer = self._layer
        moments = moments_of(data, layer.geometry, quantized, name=layer.name, dtype=self._dtype)
        return [_Carrier(moments)]


class MomentsAggregator(AggregatorBase):
    """Adds up moments."""

    def _register_reduced_input_impl(self, x: _Carrier) -> None:
        if self._container:
            self._container[0] = self._container[0] + x.value
        else:
            self._container.append(x.value)

    def _aggregate_impl(self) -> Moments:
        result: Moments = self._container[0]
        return result


class SampleReducer(_InputReducer):
    """A layer's input as it is; the aggregator takes the sample."""

    def _reduce_out_of_place(self, x: list[NNCFTensor]) -> list[NNCFTensor]:
        return [_Carrier(self._input(x))]


class SampleAggregator(AggregatorBase):
    """Takes a :class:`condiquant_plugin.uniform.sampling.Sample` of the items."""

    def __init__(self, num_samples: int | None = None) -> None:
        super().__init__(num_samples=num_samples)
        self._sample = Sample()

    def reset(self) -> None:
        """Forget all items."""
        super().reset()
        self._sample = Sample()

    def _register_reduced_input_impl(self, x: _Carrier) -> None:
        self._sample.add(x.value)

    def _aggregate_impl(self) -> Tensor:
        return self._sample.entries()


def statistic_points(
    backend: CondiQuantAlgoBackend, layers: Iterable[Layer], branch: Branch, algorithm: str
) -> StatisticPointsContainer:
    """Points at the inputs of ``layers``, wherever ``branch`` gives a reducer and an aggregator."""
    points = StatisticPointsContainer()
    for layer in layers:
        for port in layer.activation_ports:
            found = branch(layer, port)
            if found is not None:
                collector = TensorCollector()
                collector.register_statistic_branch(_KEY, *found)
                target = backend.target_point(layer, port)
                points.add_statistic_point(StatisticPoint(target, collector, algorithm))
    return points


def collected(
    points: StatisticPointsContainer,
    backend: CondiQuantAlgoBackend,
    layer: Layer,
    port: int,
    algorithm: str,
) -> Any:
    """What was collected at an input."""
    target = backend.target_point(layer, port)
    (collector,) = points.get_algo_statistics_for_node(
        layer.node.node_name,
        lambda p: algorithm in p.algorithm_to_tensor_collectors and p.target_point == target,
        algorithm,
    )
    return collector.get_statistics()[_KEY]


def moments_branch(
    quantizers: Mapping[str, FakeQuantizer] | None,
    num_samples: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> Branch:
    """Moments of layers with a weight, quantized ones too if there are quantizers by layer name."""

    def branch(layer: Layer, port: int) -> tuple[TensorReducerBase, AggregatorBase] | None:
        if layer.weight_node is None:
            return None
        quantizer = None if quantizers is None else quantizers[layer.name]
        return MomentsReducer(layer, quantizer, dtype), MomentsAggregator(num_samples=num_samples)

    return branch


def sample_branch(num_samples: int | None = None) -> Branch:
    """Samples of every input."""
    return lambda layer, port: (SampleReducer(layer, port), SampleAggregator(num_samples))


def collect_moments(
    wrapped: GraphModelWrapper | Any,
    layers: Sequence[Layer],
    batches: Iterable[Any],
    quantizers: Mapping[str, FakeQuantizer] | None = None,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Moments]:
    """Moments of the input of every layer with a weight, over all batches.

    Under ``torch.distributed`` all processes call this with the same batches; each runs its part of
    them and gets the moments of all.

    Args:
        wrapped: the float network; a torch model in :func:`condiquant_nncf.wrap`, or an ``ov.Model``.
        batches: images, ``(batch, channels, height, width)``.
        quantizers: input quantizer by layer name, for the quantized moments.
        dtype: of the sums; :attr:`condiquant_plugin.layerwise.problem.Method.moments_dtype`.

    Raises:
        InputError: NaN or Inf in the input of a layer.
        DistributedError: another process ended or failed.
    """
    backend, batches = get_algo_backend(wrapped), list(batches)
    layers = [layer for layer in layers if layer.weight_node is not None]
    mine = distributed.share(batches)
    with distributed.failing_together("collecting moments"):
        if batches and not mine:
            moments = {
                n.name: no_moments(
                    n.rows_first(backend.weight(n)),
                    n.geometry,
                    quantized=quantizers is not None,
                    dtype=dtype,
                )
                for n in layers
            }
        else:
            branch = moments_branch(quantizers, dtype=dtype)
            points = statistic_points(backend, layers, branch, "condiquant")
            collect_statistics(points, wrapped, backend.graph, nncf.Dataset(mine))
            moments = {
                n.name: collected(points, backend, n, n.activation_ports[0], "condiquant")
                for n in layers
            }
    distributed.all_reduce(moments.values())
    return moments
