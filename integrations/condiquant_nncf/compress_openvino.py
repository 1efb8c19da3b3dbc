"""``ov.Model`` with weights of few bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import nncf
from nncf.common.factory import build_graph

from condiquant_nncf.algorithms.statistics import collect_moments
from condiquant_nncf.backends.openvino import OVCondiQuantAlgoBackend, prepare
from condiquant_nncf.backends.openvino_weights import replace_weight
from condiquant_nncf.layer import Layer
from condiquant_nncf.layers import find_layers
from condiquant_plugin.errors import InputError
from condiquant_plugin.layerwise.problem import LayerProblem, Method
from condiquant_plugin.methods.compression.form import CompressedWeight

_MOMENTS_AT_ONCE = 2**28
"""Bytes of moments that are collected in one pass over the dataset."""


def compress_model(
    model: Any, items: Sequence[Any], method: Method, ignored_scope: nncf.IgnoredScope | None
) -> Any:
    """A new ``ov.Model`` with the weights that a method finds; the last product stays, as NNCF keeps it.

    Raises:
        InputError: no layers; a weight that is not ``(rows, features)`` behind its input.
    """
    copy = prepare(model, split_attention=False)
    backend = OVCondiQuantAlgoBackend(copy, build_graph(copy))
    found = find_layers(backend, "transformer", ignored_scope)
    weighted = [layer for layer in found if layer.weight_name is not None]
    layers = weighted if _ends_behind(backend, weighted) else weighted[:-1]
    if not layers:
        raise InputError(
            f"{backend.model_name} has no linear layer beside its last: there is nothing to compress"
        )
    for layer in layers:
        if layer.weight_port != 1 or layer.weight_transposed or layer.transposed_inputs:
            raise InputError(f"{layer.name} is laid out in another way: put it in ignored_scope")
        if layer.reuses_weight:
            raise InputError(f"{layer.name} shares its weight: put its uses in ignored_scope")
    forms: dict[str, CompressedWeight] = {}
    for some in _parts(backend, layers):
        moments = collect_moments(copy, some, items, dtype=method.moments_dtype)
        problems = [
            LayerProblem(layer.name, backend.weight(layer), None, moments.pop(layer.name))
            for layer in some
        ]
        for problem, solution in zip(problems, method.solve(problems), strict=True):
            assert isinstance(solution.form, CompressedWeight)
            forms[problem.name] = solution.form
    nodes = {node.get_friendly_name(): node for node in copy.get_ops()}
    for layer in layers:
        replace_weight(nodes[layer.node.node_name], forms[layer.name])
    copy.validate_nodes_and_infer_types()
    return copy


def _ends_behind(backend: OVCondiQuantAlgoBackend, layers: Sequence[Layer]) -> bool:
    """Whether the head is a product that is no candidate anyway."""
    products = [n for n in backend.graph.topological_sort() if backend.is_layer(n)]
    return bool(layers) and products[-1].node_name != layers[-1].node.node_name


def _parts(backend: OVCondiQuantAlgoBackend, layers: Sequence[Layer]) -> Iterator[list[Layer]]:
    """Consecutive layers whose moments fit in memory together."""
    part: list[Layer] = []
    size = 0
    for layer in layers:
        features = backend.weight(layer).shape[1]
        if part and size + 8 * features**2 > _MOMENTS_AT_ONCE:
            yield part
            part, size = [], 0
        part.append(layer)
        size += 8 * features**2
    yield part
