"""The layers of a network that get quantized, found in NNCF's graph of it; the same on every backend."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import nncf
from nncf.common.graph.graph import NNCFGraph, NNCFNode
from nncf.scopes import get_ignored_node_names_from_ignored_scope
from torch import nn

from condiquant_nncf.backends.base import CondiQuantAlgoBackend
from condiquant_nncf.backends.choose import get_algo_backend
from condiquant_nncf.layer import Layer
from condiquant_plugin import distillation
from condiquant_plugin.errors import InputError
from condiquant_plugin.layerwise.problem import fused_blocks
from condiquant_plugin.layerwise.scope import Kind, Scope, select_layers

if TYPE_CHECKING:
    from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import GraphModelWrapper


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
