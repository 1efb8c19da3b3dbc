"""The layers of a PyTorch network that get quantized, found in NNCF's graph of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Literal

import nncf
import nncf.torch.graph.operator_metatypes as om
from nncf.common.graph.graph import NNCFGraph, NNCFNode
from nncf.scopes import get_ignored_node_names_from_ignored_scope
from nncf.torch.function_hook import wrap_model
from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import GraphModelWrapper
from nncf.torch.model_graph_manager import get_const_node
from torch import Tensor, nn

from condiquant_plugin.errors import InputError
from condiquant_plugin.gram import LayerGeometry

Scope = Literal["transformer", "all"]

_LINEAR = (om.PTLinearMetatype,)
_CONVOLUTIONS = (
    om.PTConv2dMetatype,
    om.PTDepthwiseConv2dSubtype,
    om.PTConvTranspose2dMetatype,
)
_PRODUCTS = (om.PTMatMulMetatype,)
_INPUTS = (om.PTInputNoopMetatype,)


@dataclass(frozen=True)
class Layer:
    """A layer with a weight, or the product of two activations (``weight_name is None``)."""

    name: str
    """Module name of a layer with a weight; NNCF's node name of a product."""
    node: NNCFNode = field(repr=False)
    geometry: LayerGeometry = LayerGeometry()
    weight_node: NNCFNode | None = field(default=None, repr=False)
    bias_node: NNCFNode | None = field(default=None, repr=False)
    row_blocks: int = 1
    """3 for a fused query-key-value projection: its row blocks are matrices of their own."""
    in_scope: bool = True
    """False for a layer outside the scope, which gets bits of its own."""

    @property
    def weight_name(self) -> str | None:
        """Name of the weight parameter, as in ``state_dict``."""
        return None if self.weight_node is None else self.weight_node.layer_attributes.name

    @property
    def bias_name(self) -> str | None:
        """Name of the bias parameter, as in ``state_dict``."""
        return None if self.bias_node is None else self.bias_node.layer_attributes.name

    @property
    def activation_ports(self) -> tuple[int, ...]:
        """Input ports that carry activations."""
        return (0,) if self.weight_node is not None else (0, 1)


def wrap(network: nn.Module, example_input: Tensor) -> GraphModelWrapper:
    """A deep copy of ``network`` that NNCF can put hooks into; ``.model`` is the copy.

    Args:
        example_input: ``(batch, channels, height, width)``, any size the network takes.

    Raises:
        InputError: if the network itself is an ``nn.Sequential``, which would call NNCF's hooks as layers.
    """
    if isinstance(network, nn.Sequential):
        raise InputError(
            "NNCF cannot hook into a bare nn.Sequential: make it a child of an nn.Module"
        )
    return GraphModelWrapper(wrap_model(deepcopy(network).eval()), example_input)


def find_layers(
    wrapped: GraphModelWrapper,
    scope: Scope,
    ignored_scope: nncf.IgnoredScope | None = None,
    *,
    others: bool = False,
) -> list[Layer]:
    """Layers to quantize, in the order in which the network computes them.

    Layers whose input does not depend on the image (position-bias tables) are left alone.

    Args:
        scope: ``"transformer"`` takes linear layers and products of activations (attention);
            ``"all"`` takes every linear layer and convolution but the first and the last, and products.
        ignored_scope: NNCF's, matched against node names.
        others: also the linear layers and convolutions outside the scope, marked as such.

    Raises:
        InputError: if nothing is left to quantize, or ``ignored_scope`` matches nothing.
    """
    graph = wrapped.get_graph()
    ignored: set[str] = set()
    if ignored_scope is not None:
        try:
            ignored = get_ignored_node_names_from_ignored_scope(
                ignored_scope, graph, strict=ignored_scope.validate
            )
        except (nncf.ValidationError, re.error) as error:
            raise InputError(" ".join(f"ignored_scope: {error}".split())) from error
    dependent = _reachable_from_inputs(graph)
    nodes = [
        n
        for n in graph.topological_sort()
        if n.metatype in (*_LINEAR, *_CONVOLUTIONS, *_PRODUCTS)
        and _activations_depend(n, graph, dependent)
    ]
    if scope == "transformer":
        outside = {n.node_id for n in nodes if n.metatype in _CONVOLUTIONS}
    else:
        with_weight = [n.node_id for n in nodes if n.metatype not in _PRODUCTS]
        outside = set(with_weight[:1] + with_weight[-1:])
    layers = [
        replace(_layer(n, graph, wrapped.model), in_scope=n.node_id not in outside)
        for n in nodes
        if n.node_name not in ignored and (others or n.node_id not in outside)
    ]
    if not any(layer.in_scope for layer in layers):
        raise InputError(
            f"scope={scope!r} matches no layer of {type(wrapped.model).__name__}: "
            'use scope "all" for convolutional networks, and check ignored_scope'
        )
    return layers


def feature_blocks(model: nn.Module, layers: Sequence[Layer]) -> list[str]:
    """Names of the blocks that hold ``layers``: their nearest ancestors in a list of modules.

    These are the places where a quantized network is compared with the float one (2DQuant's features).
    """
    blocks: dict[str, None] = {}
    for layer in layers:
        name = layer.name if layer.weight_name is not None else ""
        while name:
            parent, _, _ = name.rpartition(".")
            if isinstance(model.get_submodule(parent), nn.ModuleList | nn.Sequential):
                blocks[name] = None
                break
            name = parent
    return list(blocks)


def _reachable_from_inputs(graph: NNCFGraph) -> set[int]:
    reached: set[int] = set()
    pending = list(_input_nodes(graph))
    while pending:
        node = pending.pop()
        if node.node_id not in reached:
            reached.add(node.node_id)
            pending.extend(graph.get_next_nodes(node))
    return reached


def _input_nodes(graph: NNCFGraph) -> Iterator[NNCFNode]:
    return (n for n in graph.get_all_nodes() if n.metatype in _INPUTS)


def _activations_depend(node: NNCFNode, graph: NNCFGraph, dependent: set[int]) -> bool:
    ports = (0, 1) if node.metatype in _PRODUCTS else (0,)
    sources = {e.input_port_id: e.from_node.node_id for e in graph.get_input_edges(node)}
    return all(sources.get(port) in dependent for port in ports)


def _layer(node: NNCFNode, graph: NNCFGraph, model: nn.Module) -> Layer:
    if node.metatype in _PRODUCTS:
        return Layer(node.node_name, node)
    try:
        weight_node = get_const_node(node, 1, graph)
    except nncf.InternalError:
        weight_node = None
    if weight_node is None:
        raise InputError(f"the weight of {node.node_name} is computed: put it in ignored_scope")
    bias_node = get_const_node(node, 2, graph)
    name = weight_node.layer_attributes.name.removesuffix(".weight")
    weight = model.get_parameter(weight_node.layer_attributes.name)
    fused = name.rpartition(".")[2] == "qkv" and weight.shape[0] % 3 == 0
    return Layer(name, node, _geometry(node, weight), weight_node, bias_node, 3 if fused else 1)


def _geometry(node: NNCFNode, weight: Tensor) -> LayerGeometry:
    if node.metatype in _LINEAR:
        return LayerGeometry()
    transposed = node.metatype is om.PTConvTranspose2dMetatype
    names = ["stride", "padding", "dilation", "groups"]
    if transposed:
        names = ["stride", "padding", "output_padding", "groups", "dilation"]
    given = dict(zip(names, node.layer_attributes.op_args[3:], strict=False))
    given |= {n: v for n, v in node.layer_attributes.op_kwargs.items() if n in names}
    kernel = (int(weight.shape[-2]), int(weight.shape[-1]))
    dilation = _pair(given.get("dilation", 1))
    return LayerGeometry(
        kind="conv_transpose2d" if transposed else "conv2d",
        kernel_size=kernel,
        stride=_pair(given.get("stride", 1)),
        padding=_padding(given.get("padding", 0), kernel, dilation, node),
        output_padding=_pair(given.get("output_padding", 0)),
        dilation=dilation,
        groups=int(given.get("groups", 1)),
    )


def _pair(value: int | tuple[int, ...] | list[int]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return int(value[0]), int(value[-1])


def _padding(
    value: int | str | tuple[int, ...],
    kernel: tuple[int, int],
    dilation: tuple[int, int],
    node: NNCFNode,
) -> tuple[int, int]:
    if not isinstance(value, str):
        return _pair(value)
    if value == "valid":
        return 0, 0
    totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    if any(total % 2 for total in totals):
        raise InputError(
            f'{node.node_name} has padding="same" with an even kernel: put it in ignored_scope'
        )
    return totals[0] // 2, totals[1] // 2
