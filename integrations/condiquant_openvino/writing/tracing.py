"""Torch network to OpenVINO's graph, with placeholders for what quantizes and binarizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino as ov
from openvino.frontend.pytorch import ConversionExtension
from torch import Tensor, nn

from condiquant_openvino.writing.binarization import Binarizer
from condiquant_openvino.writing.from_torch import from_torch
from condiquant_openvino.writing.labels import labelled, labelled_calls, without_call
from condiquant_openvino.writing.quantizer_graphs import Quantizer
from condiquant_plugin import InputError, fake_quantizers
from condiquant_plugin.intake import check_is_float32
from condiquant_plugin.uniform import grid


class Placeholder(ov.Op):
    """Stands for a fake quantizer while OpenVINO simplifies the graph around it."""

    def __init__(self, inputs: list[ov.Output] | None = None, label: str = "") -> None:
        super().__init__(self, inputs)
        self.label = label
        if inputs is not None:
            self.constructor_validate_and_infer_types()

    def validate_and_infer_types(self) -> None:
        self.set_output_type(0, self.get_input_element_type(0), self.get_input_partial_shape(0))

    def clone_with_new_inputs(self, new_inputs: list[ov.Output]) -> Placeholder:
        return Placeholder(new_inputs, self.label)

    def has_evaluate(self) -> bool:
        return False

    def evaluate(self, outputs: Any, inputs: Any) -> bool:
        """Refuses, or weights would be folded."""
        return False

    def visit_attributes(self, visitor: Any) -> bool:
        visitor.on_attributes({"label": self.label})
        return True


@dataclass(frozen=True)
class Traced:
    """A graph, and what its placeholders stand for, by their labels."""

    graph: ov.Model
    quantizers: dict[str, Quantizer]
    binarizers: dict[str, Binarizer]
    overflow: grid.Overflow
    """What the quantizers allow."""


def trace(
    model: nn.Module,
    example_input: Tensor,
    static: bool,
    input_names: Sequence[str],
    output_names: Sequence[str],
) -> Traced:
    """Arguments and errors as :func:`condiquant_openvino.convert`."""
    example_input = example_input[:1].float()
    check_is_float32(model)
    shape: list[int] = list(example_input.shape)
    if not static and len(shape) == 4:
        shape[2:] = [-1, -1]
    quantizers: dict[str, Quantizer] = {}
    binarizers: dict[str, Binarizer] = {}

    def mark_signs(context: Any) -> list[ov.Output]:
        threshold, label = (context.get_values_from_const_input(i) for i in (1, 2))
        binarizers[label] = Binarizer(label, np.array(threshold, np.float32))
        return Placeholder([context.get_input(0)], label).outputs()

    def mark(context: Any) -> list[ov.Output]:
        lower, step, zero = (
            np.array(context.get_values_from_const_input(i), dtype).reshape(
                tuple(context.get_input(i).get_shape())
            )
            for i, dtype in ((1, np.float32), (2, np.float32), (3, np.int32))
        )
        bits, kind, label, refinement = (
            context.get_values_from_const_input(i) for i in (4, 5, 6, 7)
        )
        quantizers[label] = Quantizer(label, lower, step, zero, int(bits), kind, int(refinement))
        return Placeholder([context.get_input(0)], label).outputs()

    extensions = [
        ConversionExtension("condiquant::fake_quantize", mark),
        ConversionExtension("condiquant::binarize", mark_signs),
    ]
    was_training = model.training
    try:
        with labelled_calls(model.eval()):
            graph = from_torch(
                model,
                example_input,
                input=[ov.PartialShape(shape)],
                extension=extensions,
                share_weights=False,
            )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise InputError(f"OpenVINO cannot convert {type(model).__name__}: {reason}") from error
    finally:
        model.train(was_training)
    for port, name in zip(graph.inputs, input_names, strict=False):
        port.get_tensor().set_names({name})
    for port, name in zip(graph.outputs, output_names, strict=False):
        port.get_tensor().set_names({name})
    graph.set_friendly_name(type(model).__name__)
    _name_transforms(graph, model)
    allowed = {quantizer.overflow for quantizer in fake_quantizers(model).values()}
    return Traced(graph, quantizers, binarizers, "vnni" if "vnni" in allowed else "safe")


def without_placeholders(graph: ov.Model) -> ov.Model:
    """A copy in which nothing is quantized, transformed or binarized."""
    in_float = graph.clone()
    for node in in_float.get_ordered_ops():
        if isinstance(node, Placeholder):
            for quotient in quotients_by_row(node):
                quotient.output(0).replace(node.input_value(0).get_node().input_value(0))
            node.output(0).replace((transform_of(node) or node).input_value(0))
    in_float.validate_nodes_and_infer_types()
    return in_float


def quotients_by_row(placeholder: Placeholder) -> list[ov.Node]:
    """What divides a quantized softmax map by the sums of its rows; none where rows have no scales."""
    users = [port.get_node() for port in placeholder.output(0).get_target_inputs()]
    return [user for user in users if user.get_friendly_name() == _rows_name(placeholder.label)]


def _name_transforms(graph: ov.Model, model: nn.Module) -> None:
    """After the layers whose inputs they transform, and what ends a softmax map by row likewise."""
    with labelled(model) as quantizers:
        transforming = {label for label, quantizer in quantizers.items() if quantizer.transforms}
        by_row = {label for label, quantizer in quantizers.items() if quantizer.softmax}
    for node in graph.get_ordered_ops():
        if not isinstance(node, Placeholder):
            continue
        if without_call(node.label) in transforming:
            _product_before(node).set_friendly_name(_transform_name(node.label))
        if without_call(node.label) in by_row:
            for port in node.output(0).get_target_inputs():
                if port.get_node().get_type_name() == "Divide":
                    port.get_node().set_friendly_name(_rows_name(node.label))


def transform_of(placeholder: Placeholder) -> ov.Node | None:
    """The product that transforms an input; None where there is none."""
    product = _product_before(placeholder)
    is_one = product.get_friendly_name() == _transform_name(placeholder.label)
    return product if is_one else None


def _product_before(placeholder: Placeholder) -> ov.Node:
    """What would be the product in front of a quantizer that transforms, whose shift is added to it."""
    source = placeholder.input_value(0).get_node()
    return source.input_value(0).get_node() if source.get_type_name() == "Add" else source


def _transform_name(label: str) -> str:
    return f"{label.removesuffix('.input')}.transform"


def _rows_name(label: str) -> str:
    return f"{label}.rows"
