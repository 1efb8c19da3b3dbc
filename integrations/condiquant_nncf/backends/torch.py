"""PyTorch models: NNCF's traced graph and its function hooks."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from types import MappingProxyType
from typing import Any

import nncf
import nncf.torch.graph.operator_metatypes as om
import torch
import torch.nn.functional as F
from nncf.common.factory import EngineFactory, ModelTransformerFactory
from nncf.common.graph.graph import NNCFGraph, NNCFNode
from nncf.common.graph.transformations.commands import TargetType
from nncf.common.graph.transformations.layout import TransformationLayout
from nncf.torch.function_hook import get_hook_storage, is_wrapped, wrap_model
from nncf.torch.function_hook.commands import PT2ConstUpdateCommand, PT2InsertionCommand
from nncf.torch.function_hook.hook_executor_mode import FunctionHookMode, OpMeta
from nncf.torch.function_hook.hook_storage import HookStorage
from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import GraphModelWrapper
from nncf.torch.graph.transformations.commands import PTTargetPoint
from nncf.torch.model_graph_manager import get_const_data, get_const_node
from nncf.torch.quantization.layers import BaseQuantizer, BaseWeightsDecompressor
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from condiquant_nncf.backends.base import CondiQuantAlgoBackend, Solved
from condiquant_nncf.fake_quantizer import HookFakeQuantizer
from condiquant_nncf.layer import Layer, same_padding
from condiquant_plugin.calls import calling_module, factors, product_name
from condiquant_plugin.errors import InputError
from condiquant_plugin.forward_pass import run
from condiquant_plugin.intake import plain_float_copy, rebuilt_parameters, refuse_rebuilt
from condiquant_plugin.layerwise.moments import LayerGeometry
from condiquant_plugin.uniform.fake_quantizer import FakeQuantizer

_LINEAR = (om.PTLinearMetatype,)
_CONVOLUTIONS = (
    om.PTConv2dMetatype,
    om.PTDepthwiseConv2dSubtype,
    om.PTConvTranspose2dMetatype,
)
_PRODUCTS = (om.PTMatMulMetatype,)
_CONVOLUTION_FUNCTIONS = (F.conv2d, F.conv_transpose2d)
_ARGUMENTS: dict[Any, tuple[str, ...]] = {
    **dict.fromkeys((F.linear, *_CONVOLUTION_FUNCTIONS), ("input", "weight", "bias")),
    torch.matmul: ("input", "other"),
    **dict.fromkeys((torch.bmm, torch.mm), ("input", "mat2")),
}
"""Tensors that a function takes, in order."""
_PASSING_ON = (om.PTDropoutMetatype, om.PTNoopMetatype)
"""What changes nothing in evaluation mode."""
_QUANTIZERS = (FakeQuantizer, BaseQuantizer, BaseWeightsDecompressor)


def wrap(network: nn.Module, example_input: Any) -> GraphModelWrapper:
    """A deep copy of ``network`` that NNCF can put hooks into; ``.model`` is the copy.

    Args:
        example_input: what the network takes, usually ``(batch, channels, height, width)``; a tuple or
            dict holds several inputs.

    Raises:
        InputError: the network itself is an ``nn.Sequential``, which would call NNCF's hooks as layers;
            it does not take the example, or does not return one tensor; see also
            :func:`condiquant_plugin.intake.plain_float_copy`.
    """
    copy = plain_float_copy(network)
    if isinstance(copy, nn.Sequential):
        raise InputError(
            "NNCF cannot hook into a bare nn.Sequential: make it a child of an nn.Module"
        )
    example_input = as_float32(example_input)
    rebuilt, products = frozenset[str](), dict[str, str]()
    if not is_wrapped(copy):  # else it may have quantizers that NNCF compiles C++ for

        def observed(model: nn.Module) -> Any:
            with _ProductNames(model, products), _KeywordCalls(model):
                return run(model, example_input)

        rebuilt = frozenset(rebuilt_parameters(copy, observed))
    wrapped = _Wrapped(wrap_model(copy), example_input)
    wrapped.rebuilt, wrapped.products = rebuilt, products
    return wrapped


def as_float32(inputs: Any) -> Any:
    """``inputs`` with all float tensors in float32."""
    return tree_map_only(Tensor, lambda x: x.float() if x.is_floating_point() else x, inputs)


class _Wrapped(GraphModelWrapper):
    """Knows as well which parameters a forward pass overwrites, and which module computes a product."""

    rebuilt: frozenset[str] = frozenset()
    products: Mapping[str, str] = MappingProxyType({})
    """Names of products by NNCF's node names, which leave out modules inside an ``nn.ModuleList``."""


class _ProductNames(FunctionHookMode):
    """Names products after the module that computes them."""

    def __init__(self, model: nn.Module, found: dict[str, str]) -> None:
        super().__init__(model, HookStorage())
        self._names = {module: name for name, module in model.named_modules()}
        self._products: Counter[nn.Module] = Counter()
        self._found = found

    def execute_pre_hooks(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], op_meta: OpMeta
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Called for every function, which ``op_meta`` gives the name of its node."""
        if factors(op_meta.func, args, kwargs):
            module = self.module_call_stack[-1]
            name = product_name(self._names[module], self._products[module])
            self._found[op_meta.op_name] = name
            self._products[module] += 1
        return super().execute_pre_hooks(args, kwargs, op_meta)


class _KeywordCalls(TorchFunctionMode):
    """Refuses calls whose tensors NNCF would take for one another: it counts them as they come."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._names = {module: name for name, module in model.named_modules()}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        order = _ARGUMENTS.get(func, ())
        given = [name for name, value in kwargs.items() if name in order and value is not None]
        fixed = given == sorted(given, key=order.index)
        if not fixed or (given and not args and func in _CONVOLUTION_FUNCTIONS):
            module = calling_module(sys._getframe(1))
            place = self._names.get(module) or type(module).__name__ if module else "the network"
            raise InputError(
                f"{place} calls {func.__name__} with {given[0]}=, where NNCF mistakes its tensors: pass "
                f"{' and '.join(order[:2])} by position"
            )
        return func(*args, **kwargs)


def prepare(network: nn.Module, example_input: Any) -> GraphModelWrapper:
    """As :func:`wrap`, after the network has run on the example once.

    Raises:
        InputError: also a quantized network, before it runs: NNCF compiles C++ for its quantizers.
    """
    wrapped = wrap(network, example_input)
    PTCondiQuantAlgoBackend(wrapped, NNCFGraph()).check_is_float()
    with torch.no_grad():
        EngineFactory.create(wrapped).infer(wrapped.example_input)
    return wrapped


class PTCondiQuantAlgoBackend(CondiQuantAlgoBackend):
    """A torch model in NNCF's wrapper."""

    quantizer_class = HookFakeQuantizer
    model: GraphModelWrapper

    @property
    def model_name(self) -> str:
        """Class of the network."""
        return type(self.model.model).__name__

    def copy_of_model(self) -> GraphModelWrapper:
        """A deep copy, wrapper included."""
        return deepcopy(self.model)

    @torch.no_grad()
    def outputs(self, items: Iterable[Any]) -> list[Tensor]:
        """Of the model."""
        return [run(self.model.model, item) for item in items]

    def is_quantized(self) -> bool:
        """Whether a module or hook is a quantizer, NNCF's or ours."""
        hooks = (hook for _, hook in get_hook_storage(self.model.model).named_hooks())
        found = (*self.model.model.modules(), *hooks)
        return any(isinstance(module, _QUANTIZERS) for module in found)

    def input_nodes(self) -> list[NNCFNode]:
        """Where the model's inputs come in."""
        return [n for n in self.graph.get_all_nodes() if n.metatype is om.PTInputNoopMetatype]

    def passes_values(self, node: NNCFNode) -> bool:
        """True: shapes are no nodes of a traced graph."""
        return True

    def is_layer(self, node: NNCFNode) -> bool:
        """Whether the node is a matrix product or a 2-d convolution."""
        if node.metatype in _PRODUCTS:
            constants = node.layer_attributes.constant_port_ids
            return not constants or (len(constants) == 1 and self._is_matrix(node, *constants))
        return node.metatype in (*_LINEAR, *_CONVOLUTIONS)

    def is_convolution(self, node: NNCFNode) -> bool:
        """Whether the node is a convolution, plain or transposed."""
        return node.metatype in _CONVOLUTIONS

    def activation_ports(self, node: NNCFNode) -> tuple[int, ...]:
        """Input ports without a constant."""
        if node.metatype in _PRODUCTS:
            return tuple(p for p in (0, 1) if p not in node.layer_attributes.constant_port_ids)
        return (0,)

    def takes_softmax_map(self, layer: Layer, port: int) -> bool:
        """Whether a factor of a product is a softmax map, whose rows the product sums over."""
        if port != 0 or layer.weight_node is not None:
            return False
        node = self._source(layer.node)
        while node is not None and node.metatype in _PASSING_ON:
            node = self._source(node)
        return node is not None and _is_over_last_axis(node)

    def _source(self, node: NNCFNode) -> NNCFNode | None:
        """What gives the first input of a node."""
        edges = self.graph.get_input_edges(node)
        return next((edge.from_node for edge in edges if edge.input_port_id == 0), None)

    def layer(self, node: NNCFNode) -> Layer:
        """Describe a node that :meth:`is_layer`."""
        ports = self.activation_ports(node)
        if len(ports) == 2:
            products: Mapping[str, str] = getattr(self.model, "products", {})
            name = products.get(node.node_name, node.node_name)
            return Layer(name, node, activation_ports=ports)
        weight_port = 1 - ports[0]
        weight_node = self._constant(node, weight_port, "weight")
        if weight_node is None:
            raise InputError(f"the weight of {node.node_name} is computed: put it in ignored_scope")
        product = node.metatype in _PRODUCTS
        bias_node = None if product else self._constant(node, 2, "bias")
        weight_name = weight_node.layer_attributes.name
        rebuilt: frozenset[str] = getattr(self.model, "rebuilt", frozenset())
        refuse_rebuilt(node.node_name, weight_name, rebuilt, "put it in ignored_scope")
        return Layer(
            weight_name.removesuffix(".weight"),
            node,
            _geometry(node, get_const_data(weight_node, self.model.model)),
            weight_node,
            bias_node,
            weight_name=weight_name,
            bias_name=None if bias_node is None else bias_node.layer_attributes.name,
            weight_port=weight_port,
            weight_transposed=product and weight_port == 1,
            activation_ports=ports,
            transposed_inputs=frozenset({1}) if weight_port == 0 else frozenset(),
        )

    def weight(self, layer: Layer) -> Tensor:
        """The data of the parameter or buffer itself."""
        data: Tensor = get_const_data(layer.weight_node, self.model.model)
        return data

    def bias(self, layer: Layer) -> Tensor | None:
        """The data of the parameter or buffer itself."""
        if layer.bias_node is None:
            return None
        data: Tensor = get_const_data(layer.bias_node, self.model.model)
        return data

    def update(self, solved: Sequence[Solved]) -> GraphModelWrapper:
        """The same model with other data in its parameters and buffers."""
        layout = TransformationLayout()
        for (layer, *_), weight, bias in solved:
            layout.register(PT2ConstUpdateCommand(layer.weight_node, weight))
            if layer.bias_node is not None and bias is not None:
                layout.register(PT2ConstUpdateCommand(layer.bias_node, bias))
        return ModelTransformerFactory.create(self.model).transform(layout)

    def target_point(self, layer: Layer, port: int) -> PTTargetPoint:
        """In front of the function."""
        return PTTargetPoint(TargetType.OPERATOR_PRE_HOOK, layer.node.node_name, input_port_id=port)

    def insert_quantizers(
        self, quantizers: Sequence[tuple[Layer, int | None, FakeQuantizer]]
    ) -> GraphModelWrapper:
        """The same model with the quantizers as hooks."""
        layout = TransformationLayout()
        for layer, port, quantizer in quantizers:
            quantizer.train(self.model.model.training)
            targets = (
                self._weight_points(layer) if port is None else [self.target_point(layer, port)]
            )
            layout.register(PT2InsertionCommand(targets, quantizer))
        return ModelTransformerFactory.create(self.model).transform(layout)

    def _weight_points(self, layer: Layer) -> list[PTTargetPoint]:
        """Behind a parameter; NNCF runs no hooks there for a buffer, so in front of all its uses."""
        assert layer.weight_node is not None
        name = layer.weight_node.node_name
        if layer.weight_name in dict(self.model.model.named_parameters()):
            return [PTTargetPoint(TargetType.OPERATOR_POST_HOOK, name, input_port_id=0)]
        edges = self.graph.get_output_edges(layer.weight_node)
        return [
            PTTargetPoint(
                TargetType.OPERATOR_PRE_HOOK, e.to_node.node_name, input_port_id=e.input_port_id
            )
            for e in edges
            if self.is_layer(e.to_node)
        ]

    def _constant(self, node: NNCFNode, port: int, role: str) -> NNCFNode | None:
        """The parameter or buffer at a port; None if nothing goes in there."""
        try:
            return get_const_node(node, port, self.graph)
        except nncf.InternalError as error:
            raise InputError(
                f"the {role} of {node.node_name} is computed: put it in ignored_scope"
            ) from error

    def _is_matrix(self, node: NNCFNode, port: int) -> bool:
        constant = get_const_node(node, port, self.graph)
        return bool(get_const_data(constant, self.model.model).ndim == 2)


def _is_over_last_axis(node: NNCFNode) -> bool:
    """Whether a node is a softmax of the axis that a product sums over."""
    if node.metatype is not om.PTSoftmaxMetatype:
        return False
    (x, *rest), given = node.layer_attributes.op_args, node.layer_attributes.op_kwargs
    axis = given.get("dim", rest[0] if rest else None)
    return axis in (-1, len(x.shape) - 1)


def _geometry(node: NNCFNode, weight: Tensor) -> LayerGeometry:
    if node.metatype not in _CONVOLUTIONS:
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
        kind="conv_transpose" if transposed else "conv",
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
    return same_padding(kernel, dilation, node.node_name)
