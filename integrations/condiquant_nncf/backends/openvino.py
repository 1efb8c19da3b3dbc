"""``ov.Model``: NNCF's graph of it and its model transformer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import nncf.openvino.graph.metatypes.openvino_metatypes as om
import numpy as np
import openvino as ov
import openvino.opset13 as ops
import torch
from nncf.common.factory import ModelTransformerFactory
from nncf.common.graph.graph import NNCFNode
from nncf.common.graph.transformations.commands import TargetType
from nncf.common.graph.transformations.layout import TransformationLayout
from nncf.openvino.graph.node_utils import get_add_bias_node, get_const_value_as_numpy_tensor
from nncf.openvino.graph.node_utils import get_node_with_bias_value as get_bias_constant
from nncf.openvino.graph.transformations.command_creation import OVCommandCreator
from nncf.openvino.graph.transformations.commands import (
    OVQuantizerInsertionCommand,
    OVTargetPoint,
)
from nncf.openvino.rt_info import dump_parameters
from nncf.quantization.fake_quantize import FakeQuantizeParameters
from nncf.tensor import Tensor as NNCFTensor
from torch import Tensor

from condiquant_nncf.backends import openvino_attention as attention
from condiquant_nncf.backends.base import CondiQuantAlgoBackend, Solved
from condiquant_nncf.layer import Layer, same_padding
from condiquant_plugin.errors import InputError
from condiquant_plugin.layerwise.moments import LayerGeometry
from condiquant_plugin.uniform.fake_quantizer import FakeQuantizer
from condiquant_plugin.uniform.marking import MODEL_KEY, MODEL_VALUE, NODE_KEY, Marker, Role

_PLAIN = (om.OVConvolutionMetatype, om.OVConvolutionBackpropDataMetatype)
_GROUPED = (
    om.OVGroupConvolutionMetatype,
    om.OVDepthwiseConvolutionMetatype,
    om.OVGroupConvolutionBackpropDataMetatype,
)
_TRANSPOSED = (om.OVConvolutionBackpropDataMetatype, om.OVGroupConvolutionBackpropDataMetatype)
_SHAPES = (om.OVShapeOfMetatype,)
_QUANTIZERS = ("FakeQuantize", "FakeConvert")
_HALF = (ov.Type.f16, ov.Type.bf16)
_SIMULATION = {"LP_TRANSFORMS_MODE": "NO", "INFERENCE_PRECISION_HINT": "f32"}
_NAMES_ARE_DISTINCT = ["nncf", "friendly_names_were_updated"]
"""NNCF makes names distinct itself otherwise, which fails where three are equal."""
_STORED_IN_HALF = "_compressed"
"""What OpenVINO appends to the name of a constant when it saves it as float16."""
_FROM_TORCH = re.compile(r"__module\.(.+)/aten::")


def prepare(model: Any, *, split_attention: bool = True) -> Any:
    """A copy as NNCF and the algorithms need it, for a pipeline composed by hand.

    Friendly names are distinct, and constants stored in half precision (``ov.save_model``) float32.

    Args:
        split_attention: take fused attention apart, as :mod:`.openvino_attention` does.
    """
    copy = model.clone()
    _decompress(copy)
    if split_attention:
        attention.split_attention(copy)
    taken: Counter[str] = Counter()
    for node in copy.get_ordered_ops():
        name = node.get_friendly_name()
        if taken[name]:
            node.set_friendly_name(f"{name}#{taken[name]}")
        taken[name] += 1
    copy.set_rt_info("True", _NAMES_ARE_DISTINCT)
    return copy


def finish(model: Any, parameters: Mapping[str, Any]) -> Any:
    """Write down in the model what was done, as NNCF does."""
    dump_parameters(model, dict(parameters), "condiquant")
    return model


class OVCondiQuantAlgoBackend(CondiQuantAlgoBackend):
    """An OpenVINO model whose friendly names are distinct."""

    @cached_property
    def _nodes(self) -> dict[str, Any]:
        return {node.get_friendly_name(): node for node in self.model.get_ops()}

    @property
    def model_name(self) -> str:
        """Friendly name of the model."""
        return str(self.model.get_friendly_name())

    def copy_of_model(self) -> Any:
        """A clone."""
        return self.model.clone()

    def outputs(self, items: Iterable[Any]) -> list[Tensor]:
        """Of the model as it is: kernels would put quantizers together and round otherwise."""
        compiled = ov.compile_model(self.model, "CPU", _SIMULATION)
        return [torch.from_numpy(compiled(item)[0].copy()) for item in items]

    def is_quantized(self) -> bool:
        """Whether there are FakeQuantize nodes, or NNCF has compressed the weights."""
        compressed = self.model.has_rt_info(["nncf", "weight_compression"])
        return compressed or any(n.node_type in _QUANTIZERS for n in self.graph.get_all_nodes())

    def input_nodes(self) -> list[NNCFNode]:
        """Where the model's inputs come in."""
        return list(self.graph.get_nodes_by_metatypes([om.OVParameterMetatype]))

    def passes_values(self, node: NNCFNode) -> bool:
        """False for ShapeOf."""
        return node.metatype not in _SHAPES

    def is_layer(self, node: NNCFNode) -> bool:
        """Whether the node is a matrix product or a 2-d convolution."""
        if node.metatype is om.OVMatMulMetatype:
            ports = self._constant_ports(node)
            return not ports or (len(ports) == 1 and len(self._shape(node, ports[0])) == 2)
        if not self.is_convolution(node):
            return False
        shape = self._nodes[node.node_name].input_value(1).get_partial_shape()
        return shape.rank.is_static and len(shape) == (5 if node.metatype in _GROUPED else 4)

    def is_convolution(self, node: NNCFNode) -> bool:
        """Whether the node is a convolution, plain or transposed."""
        return node.metatype in (*_PLAIN, *_GROUPED)

    def activation_ports(self, node: NNCFNode) -> tuple[int, ...]:
        """Input ports without a constant."""
        if node.metatype is om.OVMatMulMetatype:
            return tuple(p for p in (0, 1) if p not in self._constant_ports(node))
        return (0,)

    def layer(self, node: NNCFNode) -> Layer:
        """Describe a node that :meth:`is_layer`."""
        ports = self.activation_ports(node)
        attributes = self._nodes[node.node_name].get_attributes()
        product = node.metatype is om.OVMatMulMetatype
        flags = [product and attributes[name] for name in ("transpose_a", "transpose_b")]
        # A product sums over the last axis of port 0 and the last but one of port 1.
        swapped = {p for p in ports if flags[p] != (product and p == 1 and len(ports) == 1)}
        if len(ports) == 2:
            return Layer(
                node.node_name, node, activation_ports=ports, transposed_inputs=frozenset(swapped)
            )
        weight_port = 1 - ports[0]
        if weight_port not in self._constant_ports(node):
            raise InputError(f"the weight of {node.node_name} is computed: put it in ignored_scope")
        constant = node.layer_attributes.constant_attributes[weight_port]["name"]
        layer = Layer(
            _layer_name(node, constant),
            node,
            self._geometry(node),
            self.graph.get_node_by_name(constant),
            weight_name=constant,
            weight_port=weight_port,
            weight_transposed=product and flags[weight_port] != (weight_port == 1),
            activation_ports=ports,
            transposed_inputs=frozenset(swapped),
        )
        bias = self._bias_constant(layer)
        if bias is None:
            return layer
        return replace(layer, bias_node=bias, bias_name=bias.node_name)

    def weight(self, layer: Layer) -> Tensor:
        """A float32 copy of the constant."""
        shape = self._shape(layer.node, layer.weight_port)
        return self._constant(str(layer.weight_name)).reshape(_torch_shape(shape))

    def bias(self, layer: Layer) -> Tensor | None:
        """A float32 copy of the constant of the Add behind the layer."""
        return None if layer.bias_name is None else self._constant(layer.bias_name).reshape(-1)

    def update(self, solved: Sequence[Solved]) -> Any:
        """A new model with other constants."""
        layout = TransformationLayout()
        for (layer, *_), weight, bias in solved:
            shape = self._shape(layer.node, layer.weight_port)
            layout.register(
                OVCommandCreator.create_command_to_update_weight(
                    layer.node, weight.detach().reshape(shape).numpy(), layer.weight_port
                )
            )
            if layer.bias_name is not None and bias is not None:
                layout.register(
                    OVCommandCreator.create_command_to_update_bias(
                        layer.node, bias.detach().numpy(), self.graph
                    )
                )
        model = ModelTransformerFactory.create(self.model).transform(layout)
        nodes = {node.get_friendly_name(): node for node in model.get_ops()}
        for (first, *others), _, _ in solved:
            for other in others:  # NNCF gives the first use a constant of its own
                for mine, theirs in zip(self._sources(first), self._sources(other), strict=True):
                    values = nodes[mine[0]].input_value(mine[1])
                    nodes[theirs[0]].input(theirs[1]).replace_source_output(values)
        return model

    def _sources(self, layer: Layer) -> list[tuple[str, int]]:
        """Node and port where the weight and, if there is one, the bias go in."""
        places = [(str(layer.node.node_name), layer.weight_port)]
        if layer.bias_name is not None:
            add = get_add_bias_node(layer.node, self.graph)
            places.append((add.node_name, add.layer_attributes.get_const_port_ids()[0]))
        return places

    def target_point(self, layer: Layer, port: int) -> OVTargetPoint:
        """In front of the operation."""
        return OVTargetPoint(TargetType.PRE_LAYER_OPERATION, layer.node.node_name, port)

    def insert_quantizers(
        self, quantizers: Sequence[tuple[Layer, int | None, FakeQuantizer]]
    ) -> Any:
        """A new model with a FakeQuantize of the snapped bounds for every quantizer, named like it."""
        layout, placed = TransformationLayout(), {}
        for layer, port, quantizer in quantizers:
            if quantizer.in_float:
                continue
            if port is None:
                kind, side, at = TargetType.OPERATION_WITH_WEIGHTS, "weights", layer.weight_port
            else:
                kind, side, at = TargetType.PRE_LAYER_OPERATION, "input", port
            point = OVTargetPoint(kind, layer.node.node_name, at)
            layout.register(OVQuantizerInsertionCommand(point, self._parameters(layer, quantizer)))
            placed[f"{layer.node.node_name}/fq_{side}_{at}"] = quantizer
        model = ModelTransformerFactory.create(self.model).transform(layout)
        taken = {node.get_friendly_name(): node for node in model.get_ops()}
        first = {layer.weight_name: layer for layer, port, _ in quantizers if port is None}
        for layer, _, _ in quantizers:
            if layer.reuses_weight:
                source = first[layer.weight_name]
                values = taken[source.node.node_name].input_value(source.weight_port)
                taken[layer.node.node_name].input(layer.weight_port).replace_source_output(values)
        for given, quantizer in placed.items():
            name, node = quantizer.name, taken[given]
            if name in taken:
                taken[name].set_friendly_name(f"{name}/values")
            node.set_friendly_name(name)
            node.get_rt_info()[NODE_KEY] = _marker(quantizer).to_text()
        model.set_rt_info(MODEL_VALUE, MODEL_KEY)
        return model

    def _parameters(self, layer: Layer, quantizer: FakeQuantizer) -> FakeQuantizeParameters:
        grid = quantizer.snapped()
        bounds = [self._spread(b, layer, quantizer) for b in (grid.lower, grid.upper)]
        return FakeQuantizeParameters(*bounds, *bounds, grid.last_code + 1)

    def _spread(self, bound: Tensor, layer: Layer, quantizer: FakeQuantizer) -> NNCFTensor:
        """Bounds as they broadcast against the operation's input."""
        if quantizer.row_blocks > 1:
            shape = self._shape(layer.node, layer.weight_port)
            sizes = list(_torch_shape(shape))
            rows = sizes[quantizer.axis]
            bound = bound.repeat_interleave(rows // quantizer.row_blocks)
            if len(shape) == 5 and quantizer.axis == 1:
                raise InputError(
                    f"{layer.name}: OpenVINO has no bounds per channel for grouped transposed "
                    'convolutions: use weight_granularity="tensor", or put it in ignored_scope'
                )
            sizes = [rows if i == quantizer.axis else 1 for i in range(len(sizes))]
            bound = bound.view([*shape[:2], 1, 1, 1] if len(shape) == 5 else sizes)
        return NNCFTensor(np.atleast_1d(bound.numpy()))

    def _constant_ports(self, node: NNCFNode) -> list[int]:
        attributes = node.layer_attributes
        return [] if attributes is None else list(attributes.get_const_port_ids())

    def _shape(self, node: NNCFNode, port: int) -> tuple[int, ...]:
        return tuple(self._nodes[node.node_name].input_value(port).get_shape())

    def _constant(self, name: str) -> Tensor:
        values = get_const_value_as_numpy_tensor(self._nodes[name])
        return torch.from_numpy(np.array(values, np.float32))

    def _bias_constant(self, layer: Layer) -> NNCFNode | None:
        """The constant that is added to every output channel, if nothing else uses the product."""
        consumers = self.graph.get_next_nodes(layer.node)
        add = get_add_bias_node(layer.node, self.graph)
        if len(consumers) != 1 or add is None:
            return None
        constant = get_bias_constant(add, self.graph)
        shape = self._shape(add, add.layer_attributes.get_const_port_ids()[0])
        rows = self._rows(layer)
        channel = -3 if layer.geometry.kind != "linear" else -1 - (layer.weight_port == 0)
        sizes = dict(enumerate(shape, -len(shape)))
        if sizes.pop(channel, 1) != rows or any(size != 1 for size in sizes.values()):
            return None
        return constant

    def _rows(self, layer: Layer) -> int:
        shape = self._shape(layer.node, layer.weight_port)
        rows = _torch_shape(shape)[layer.output_axis]
        transposed = layer.geometry.kind == "conv_transpose"
        return rows * layer.geometry.groups if transposed else rows

    def _geometry(self, node: NNCFNode) -> LayerGeometry:
        if not self.is_convolution(node):
            return LayerGeometry()
        shape = self._shape(node, 1)
        operation = self._nodes[node.node_name]
        attributes = operation.get_attributes()
        transposed = node.metatype in _TRANSPOSED
        if transposed and operation.get_input_size() > 2:
            raise InputError(f"{node.node_name} is given its output shape: put it in ignored_scope")
        kernel, dilation = _pair(shape[-2:]), _pair(attributes["dilations"])
        stride, padding = _pair(attributes["strides"]), _pair(attributes["pads_begin"])
        automatic = attributes["auto_pad"]
        if automatic.startswith("same") and not transposed and stride == (1, 1):
            padding = same_padding(kernel, dilation, node.node_name)
        elif automatic.startswith("same") or padding != _pair(attributes["pads_end"]):
            raise InputError(f"{node.node_name} pads its sides unequally: put it in ignored_scope")
        elif automatic == "valid":
            padding = (0, 0)
        return LayerGeometry(
            kind="conv_transpose" if transposed else "conv",
            kernel_size=kernel,
            stride=stride,
            padding=padding,
            output_padding=_pair(attributes["output_padding"]) if transposed else (0, 0),
            dilation=dilation,
            groups=shape[0] if node.metatype in _GROUPED else 1,
        )


def _marker(quantizer: FakeQuantizer) -> Marker:
    grid = quantizer.snapped()
    zero = tuple(grid.zero.reshape(-1).int().tolist())
    return Marker(Role.WHOLE, quantizer.name, quantizer.kind, grid.bits, grid.refinement, zero)


def _decompress(model: Any) -> None:
    """Make float32 constants of those that are stored in half precision and converted at once."""
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Constant" and node.get_element_type() in _HALF:
            ports = node.output(0).get_target_inputs()
            converts = [port.get_node() for port in ports if _is_decompression(port.get_node())]
            if not converts:
                continue
            values = get_const_value_as_numpy_tensor(node).astype(np.float32)
            name = node.get_friendly_name().removesuffix(_STORED_IN_HALF)
            constant = ops.constant(values, name=name)
            for convert in converts:
                for port in convert.output(0).get_target_inputs():
                    port.replace_source_output(constant.output(0))


def _is_decompression(node: Any) -> bool:
    return bool(node.get_type_name() == "Convert" and node.get_element_type() == ov.Type.f32)


def _layer_name(node: NNCFNode, constant: str) -> str:
    """The module's name, if the model comes from PyTorch."""
    if constant.startswith("self."):
        name = constant.removeprefix("self.").partition("#")[0]
        return name.removesuffix(_STORED_IN_HALF).removesuffix(".weight")
    found = _FROM_TORCH.match(node.node_name)
    return found.group(1) if found else str(node.node_name)


def _torch_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of the weight with the axis of the groups joined."""
    if len(shape) != 5:
        return tuple(shape)
    return (shape[0] * shape[1], *shape[2:])


def _pair(values: Sequence[int]) -> tuple[int, int]:
    return int(values[0]), int(values[1])
