"""What each product of an IR runs as on the CPU plugin, and why not int8 where it does not.

The plugin's runtime graph names its nodes after the operators they replace. A whole attention may be
one node of type Subgraph: its products are told apart by the tensors that enter it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import openvino as ov

from condiquant_openvino.markers import (
    EXITS,
    PRODUCTS,
    any_marker_of,
    constant_values,
    is_in_float,
    label_of,
    only_rearranges,
    origin,
    output_channel_axes,
    role_of,
)

INT8 = "int8"
_BYTES = {"u8", "i8"}
_KERNELS = {"BinaryConvolution", "Convolution", "Deconvolution", "FullyConnected", "MatMul"}
_FUSED = {"Subgraph", "ScaledDotProductAttention"}
_ATTENTION = "ScaledDotProductAttention"
_ENDS = {*PRODUCTS, _ATTENTION, "Result"}
_LOST = "not in the runtime graph"
_DEQUANTIZATION = re.compile(r"/Dequantization\w+$")
_QUANTIZER_SUFFIX = re.compile(r"\.(weight|input[01]?)(?=#\d+$|$)")


@dataclass(frozen=True)
class LayerExecution:
    """One convolution or matrix product of an IR on a device."""

    name: str
    """The layer, from the label of its quantizer; without one, the operator's friendly name."""
    operator: str
    """OpenVINO type, as ``MatMul``."""
    runs_as: str
    """``int8``, or the element type that the kernel multiplies: ``f32``, ``bf16``, ``f16``."""
    reason: str
    """Why not int8, one clause; empty for int8."""
    operands: str = ""
    """Kind and bits of each operand, as ``activation 4, weight 4``; ``float`` of one without quantizer."""


def layer_executions(ir: ov.Model, compiled: ov.CompiledModel) -> list[LayerExecution]:
    """Every product of an IR, in the order of the graph.

    A ScaledDotProductAttention counts as the two products it is made of.

    Args:
        compiled: from ``ir``, on the CPU plugin.
    """
    uses = [
        (node, part)
        for node in ir.get_ordered_ops()
        if node.get_type_name() in {*PRODUCTS, _ATTENTION}
        for part in range(2 if node.get_type_name() == _ATTENTION else 1)
    ]
    runtime = _RuntimeGraph(compiled, {node.get_friendly_name() for node, _ in uses})
    executors = [runtime.executor(node, part) for node, part in uses]
    products_in = Counter(executor.get_name() for executor in executors if executor)
    constants, seen = _constants(ir), Counter[str]()
    executions = []
    for (node, part), executor in zip(uses, executors, strict=True):
        runs_as = "unknown"
        if executor is not None:
            key = executor.get_name()
            runs_as = _precision_of_product(executor, seen[key], products_in[key])
            seen[key] += 1
        executions.append(_execution(node, part, runs_as, constants))
    return executions


def int8_share(layers: Sequence[LayerExecution]) -> float:
    """Share of the products that run as int8; 0 without products."""
    return sum(layer.runs_as == INT8 for layer in layers) / max(len(layers), 1)


class _RuntimeGraph:
    """Nodes of the runtime graph that multiply, by the names of the operators they replace."""

    def __init__(self, compiled: ov.CompiledModel, product_names: set[str]) -> None:
        self._kernels: dict[str, ov.Node] = {}
        self._fused: dict[str, ov.Node] = {}
        for node in compiled.get_runtime_model().get_ordered_ops():
            if _layer_type(node) in _KERNELS:
                self._kernels |= dict.fromkeys(_replaced(node), node)
            elif _layer_type(node) in _FUSED:
                names = _replaced(node)
                if not product_names.isdisjoint(names):
                    self._fused |= dict.fromkeys(names, node)

    def executor(self, product: ov.Node, part: int) -> ov.Node | None:
        """The node that runs a product, ``part`` 0 or 1 of an attention."""
        found = self._find(product)
        if found and part == 0 and product.get_type_name() == _ATTENTION:
            return _scores_of(found)
        return found

    def _find(self, product: ov.Node) -> ov.Node | None:
        node = product
        while True:
            name = node.get_friendly_name()
            if (found := self._kernels.get(name) or self._fused.get(name)) is not None:
                return found
            # What OpenVINO fuses bears the name of the last operator in it.
            consumers = [port.get_node() for port in node.output(0).get_target_inputs()]
            if len(consumers) != 1 or consumers[0].get_type_name() in _ENDS:
                return None
            (node,) = consumers


def _layer_type(node: ov.Node) -> str:
    info = node.get_rt_info()
    return str(info["layerType"].astype(str)) if "layerType" in info else ""


def _replaced(node: ov.Node) -> list[str]:
    """Names of the operators that a runtime node replaces, in order."""
    names = node.get_rt_info()["originalLayersNames"].astype(str).split(",")
    names = [name.removesuffix("_original") for name in (*names, node.get_friendly_name())]
    if _layer_type(node) in _KERNELS:
        # A product that took in its dequantization may be left with that name only.
        names = [_DEQUANTIZATION.sub("", name) for name in names]
    return list(dict.fromkeys(name for name in names if name))


def _precision(operands: Sequence[ov.Output]) -> str:
    types = [operand.get_element_type().get_type_name() for operand in operands]
    return next((name for name in types if name not in _BYTES), INT8)


def _precision_of_product(node: ov.Node, index: int, products: int) -> str:
    """Precision of the ``index``-th of the products that a runtime node computes.

    The first one takes the first two tensors that enter. A later one takes what is computed inside,
    in the type that its other operand has: the last tensors that enter, past biases and scales.
    """
    if index == 0:
        return _precision(node.input_values()[:2])
    entering = [v for v in node.input_values() if _layer_type(v.get_node()) != "Const"]
    position = index - products
    if len(entering) < 2 - position:
        return _precision(node.input_values()[-1:])
    return _precision([entering[position]])


def _scores_of(executor: ov.Node) -> ov.Node | None:
    """What computes the scores of the attention whose values ``executor`` sums."""
    if _layer_type(executor) in _FUSED:
        return executor
    node = executor.input_value(0).get_node()
    while _layer_type(node) not in _KERNELS:
        if not node.inputs():
            return None
        node = node.input_value(0).get_node()
    return node


def _constants(ir: ov.Model) -> set[str]:
    """Names of the nodes that depend on constants only."""
    found: set[str] = set()
    for node in ir.get_ordered_ops():
        above = {value.get_node().get_name() for value in node.input_values()}
        if node.get_type_name() == "Constant" or (above and above <= found):
            found.add(node.get_name())
    return found


def _execution(product: ov.Node, part: int, runs_as: str, constants: set[str]) -> LayerExecution:
    operator, described = product.get_type_name(), "float, float"
    if operator == _ATTENTION:
        name = f"{product.get_friendly_name()}/{('scores', 'values')[part]}"
        reason = "not quantized"
    else:
        operands = [_Operand(product, index, constants) for index in (0, 1)]
        labels = [operand.label for operand in reversed(operands) if operand.label]
        name = _QUANTIZER_SUFFIX.sub("", labels[0]) if labels else product.get_friendly_name()
        reason = _reason(operands)
        described = ", ".join(operand.described() for operand in operands)
    if runs_as == "unknown":
        reason = _LOST
    return LayerExecution(name, operator, runs_as, "" if runs_as == INT8 else reason, described)


class _Operand:
    """An operand of a product and the quantizer it comes from."""

    def __init__(self, product: ov.Node, index: int, constants: set[str]) -> None:
        self.product = product
        self.source = product.input_value(index)
        self.node = origin(self.source)
        self.marker = any_marker_of(self.node)
        self.label = label_of(self.node) or ""
        self.is_weight = index == 1 and self.node.get_name() in constants
        self.is_elementwise = bool(self.label) and self.node.get_type_name() == "Add"
        self.quantized = bool(self.label) or self._is_fake_quantize() or self._is_integer()

    def described(self) -> str:
        """Kind and bits of its quantizer, as far as they are known."""
        if self.marker is None:
            return "quantized" if self.quantized else "float"
        known = (self.marker.kind, self.marker.bits)
        return " ".join(str(value) for value in known if value is not None) or "quantized"

    def _is_fake_quantize(self) -> bool:
        return bool(self.node.get_type_name() == "FakeQuantize")

    def _is_integer(self) -> bool:
        """Whether it is a dequantization of bytes."""
        return bool(self.node.get_type_name() == "Multiply") and any(
            node.get_type_name() == "Convert"
            and node.get_input_element_type(0).get_type_name() in _BYTES
            for node in self._dequantization()
        )

    def _dequantization(self) -> Iterator[ov.Node]:
        node = self.node.input_value(0).get_node()
        if node.get_type_name() == "Subtract":
            yield node
            node = node.input_value(0).get_node()
        yield node

    def is_per_channel(self) -> bool:
        """Whether it has more than one grid."""
        shapes = [v.get_partial_shape() for v in self.node.input_values()[1:]]
        return any(shape.is_static and prod(shape.to_shape()) > 1 for shape in shapes)

    def is_scaled_along_its_inputs(self) -> bool:
        """Whether a weight's scale varies along an axis that the product sums over."""
        scale = self.node.input_value(1).get_partial_shape()
        if scale.is_dynamic or len(scale) != len(self.source.get_partial_shape()):
            return False
        rows = {axis for axis, size in enumerate(scale.to_shape()) if size > 1}
        return not rows <= output_channel_axes(self.product)

    def feeds_float_operator(self) -> bool:
        """Whether something else than a product takes its values."""
        return _feeds_float_operator(self.node.output(0))

    def has_zero_point(self) -> bool:
        """Whether its integers are shifted."""
        if self._is_fake_quantize():
            low, high = (constant_values(self.node.input_value(i)) for i in (3, 4))
            if low is None or high is None:
                return True
            step = (high - low) / (self.node.get_attributes()["levels"] - 1)
            return bool((low < 0).any() and (np.abs(low + high) > 1.5 * step).any())
        return any(node.get_type_name() == "Subtract" for node in self._dequantization())

    def operator_behind_quantizer(self) -> str:
        """Type of the operator that a quantizer's values pass last on their way here, if any do."""
        node = self.node
        while node.inputs() and node.get_type_name() not in _ENDS:
            node = origin(node.input_value(0))
            if label_of(node) is not None:
                return str(self.node.get_type_name())
        return ""

    def float_form(self) -> str:
        """Why it reaches the product as floats; empty if it could be bytes."""
        if self._is_fake_quantize() and (levels := self.node.get_attributes()["levels"]) < 255:
            return f"FakeQuantize of {levels} levels"
        if self.is_weight and not self._is_fake_quantize() and not self._is_integer():
            if self.is_scaled_along_its_inputs():
                return "weight quantized per input channel"
            return "weight in float form"
        if role_of(self.node) in EXITS and is_in_float(self.node):
            return "attention in float, as for isa=avx2"
        if not self.is_weight and (self.is_elementwise or self._is_fake_quantize()):
            if self.is_per_channel():
                return "input quantized per channel"
            if self.feeds_float_operator():
                return "another consumer of the quantized input is a float operator"
            if self.is_elementwise:
                return "input quantizer in float form"
        return ""


def _reason(operands: Sequence[_Operand]) -> str:
    """Why the plugin takes a float kernel."""
    first, second = operands
    if not (first.quantized or second.quantized):
        return "not quantized"
    if not second.quantized and second.is_weight:
        return "its weight is not quantized"
    for operand in operands:
        if not operand.quantized:
            what = "its input" if second.is_weight else "one operand"
            why = operand.operator_behind_quantizer()
            why = (
                f"{why} stands between {what} and its quantizer"
                if why
                else f"{what} is not quantized"
            )
            form = second.float_form() if second.is_weight else ""
            return f"{form}: {why}" if form else why
    for operand in operands:
        if form := operand.float_form():
            return form
    operator = first.product.get_type_name()
    if operator == "GroupConvolutionBackpropData":
        return "the plugin has no int8 kernel for it"
    without_zero_point = operator == "ConvolutionBackpropData" or not second.is_weight
    if without_zero_point and any(operand.has_zero_point() for operand in operands):
        return "zero point of an operand"
    return "the plugin chose a float kernel"


def _feeds_float_operator(values: ov.Output) -> bool:
    for port in values.get_target_inputs():
        node = port.get_node()
        if only_rearranges(node):
            if _feeds_float_operator(node.output(0)):
                return True
        elif node.get_type_name() not in PRODUCTS:
            return True
    return False
