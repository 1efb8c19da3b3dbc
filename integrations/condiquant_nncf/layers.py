"""The layers of a network that get quantized, found in NNCF's graph of it; the same on every backend."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import nncf
from nncf.common.graph.graph import NNCFGraph, NNCFNode
from nncf.scopes import get_ignored_node_names_from_ignored_scope
from torch import Tensor, nn

from condiquant_nncf.backends.choose import CondiQuantAlgoBackend, get_algo_backend
from condiquant_plugin import distillation
from condiquant_plugin.errors import InputError
from condiquant_plugin.layerwise.moments import LayerGeometry
from condiquant_plugin.layerwise.scope import Kind, Scope, select_layers
from condiquant_plugin.methods.condiquant.reconditioning import fused_blocks

if TYPE_CHECKING:
    from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import GraphModelWrapper


@dataclass(frozen=True)
class Layer:
    """A layer with a weight, or the product of two activations (``weight_name is None``)."""

    name: str
    """Module name of a layer with a weight, on both backends where the graph keeps it, else NNCF's node
    name. Of a product, :func:`condiquant_plugin.calls.product_name` on torch, else NNCF's node name. A
    further use of the same weight has ``#1``, ``#2`` … behind it."""
    node: NNCFNode = field(repr=False)
    geometry: LayerGeometry = LayerGeometry()
    weight_node: NNCFNode | None = field(default=None, repr=False)
    bias_node: NNCFNode | None = field(default=None, repr=False)
    weight_name: str | None = None
    """Name of the weight in the model: as in ``state_dict``, or of the constant."""
    bias_name: str | None = None
    weight_port: int = 1
    weight_transposed: bool = False
    """Whether the weight of a matrix product is kept as ``(in_features, out_features)``."""
    activation_ports: tuple[int, ...] = (0,)
    """Input ports that carry activations."""
    transposed_inputs: frozenset[int] = frozenset()
    """Activation ports whose last two axes are the other way round than the product takes them."""
    row_blocks: int = 1
    """3 for a fused query-key-value projection: its row blocks are matrices of their own."""
    in_scope: bool = True
    """False for a layer outside the scope, which gets bits of its own."""
    reuses_weight: bool = False
    """Whether an earlier layer has the same weight."""

    @property
    def output_axis(self) -> int:
        """Axis of the weight that counts output channels."""
        return int(self.geometry.kind == "conv_transpose" or self.weight_transposed)

    def rows_first(self, weight: Tensor) -> Tensor:
        """The weight as :mod:`condiquant_plugin.layerwise.moments` takes it, and back."""
        return weight.mT.contiguous() if self.weight_transposed else weight

    def features_last(self, x: Tensor, port: int) -> Tensor:
        """What arrives at ``port`` in the order of the product."""
        return x.mT if port in self.transposed_inputs else x

    def input_name(self, port: int) -> str:
        """Name of the quantizer at ``port``."""
        suffix = "input" if self.weight_node is not None else f"input{port}"
        return f"{self.name}.{suffix}"


class IgnoredScopeError(InputError, nncf.ValidationError):
    """NNCF's own error for an ``ignored_scope`` that matches nothing, in one line."""


def find_layers(
    model: GraphModelWrapper | Any,
    scope: Scope,
    ignored_scope: nncf.IgnoredScope | None = None,
    *,
    others: bool = False,
) -> list[Layer]:
    """Layers to quantize, in the order in which the network computes them.

    Layers whose input does not depend on the image (position-bias tables) are left alone.

    Args:
        model: a torch model in :func:`condiquant_nncf.wrap`, an ``ov.Model``, or the backend of one.
        scope: see :data:`condiquant_plugin.layerwise.scope.Scope`.
        ignored_scope: NNCF's, matched against node names.
        others: also the linear layers and convolutions outside the scope, marked as such.

    Raises:
        InputError: if nothing is left to quantize, or ``ignored_scope`` matches nothing; the latter is
            an ``nncf.ValidationError`` too.
    """
    backend = model if isinstance(model, CondiQuantAlgoBackend) else get_algo_backend(model)
    graph = backend.graph
    ignored: set[str] = set()
    if ignored_scope is not None:
        try:
            ignored = get_ignored_node_names_from_ignored_scope(
                ignored_scope, graph, strict=ignored_scope.validate
            )
        except (nncf.ValidationError, re.error) as error:
            raise IgnoredScopeError(" ".join(f"ignored_scope: {error}".split())) from error
    dependent = _dependent_on_inputs(backend)
    nodes = [
        n
        for n in graph.topological_sort()
        if backend.is_layer(n) and _activations_depend(n, graph, backend, dependent)
    ]
    selected = select_layers(
        nodes,
        lambda node: _kind(node, backend),
        scope,
        is_excluded=lambda node: node.node_name in ignored,
        others=others,
        network=backend.model_name,
        exclusion="ignored_scope",
    )
    layers = [
        replace(_with_blocks(backend.layer(node), backend), in_scope=in_scope)
        for node, in_scope in selected
    ]
    return list(_distinct(layers))


def feature_blocks(model: nn.Module, layers: Sequence[Layer]) -> list[str]:
    """Names of the blocks that hold ``layers``; see :func:`distillation.feature_blocks` of the core."""
    owners = (la.name for la in layers if la.weight_name is not None and not la.reuses_weight)
    return distillation.feature_blocks(model, owners)


def same_padding(kernel: tuple[int, int], dilation: tuple[int, int], name: str) -> tuple[int, int]:
    """Padding that keeps the size at stride 1.

    Raises:
        InputError: an even kernel, which needs more on one side.
    """
    totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    if any(total % 2 for total in totals):
        raise InputError(f'{name} has padding="same" with an even kernel: put it in ignored_scope')
    return totals[0] // 2, totals[1] // 2


def _kind(node: NNCFNode, backend: CondiQuantAlgoBackend) -> Kind:
    if backend.is_convolution(node):
        return "convolution"
    return "linear" if len(backend.activation_ports(node)) == 1 else "product"


def _distinct(layers: Sequence[Layer]) -> Iterator[Layer]:
    uses: Counter[str] = Counter()
    weights: set[str] = set()
    for layer in layers:
        use, weight = uses[layer.name], layer.weight_name
        uses[layer.name] += 1
        name = f"{layer.name}#{use}" if use else layer.name
        yield replace(layer, name=name, reuses_weight=weight in weights)
        if weight is not None:
            weights.add(weight)


def _dependent_on_inputs(backend: CondiQuantAlgoBackend) -> set[int]:
    reached: set[int] = set()
    pending = backend.input_nodes()
    while pending:
        node = pending.pop()
        if node.node_id not in reached and backend.passes_values(node):
            reached.add(node.node_id)
            pending.extend(backend.graph.get_next_nodes(node))
    return reached


def _activations_depend(
    node: NNCFNode, graph: NNCFGraph, backend: CondiQuantAlgoBackend, dependent: set[int]
) -> bool:
    sources = {e.input_port_id: e.from_node.node_id for e in graph.get_input_edges(node)}
    return all(sources.get(port) in dependent for port in backend.activation_ports(node))


def _with_blocks(layer: Layer, backend: CondiQuantAlgoBackend) -> Layer:
    if layer.weight_name is None:
        return layer
    rows = backend.weight(layer).shape[layer.output_axis]
    return replace(layer, row_blocks=fused_blocks(layer.name, rows))
