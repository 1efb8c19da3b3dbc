"""Puts between operators that the CPU plugin computes wrongly in a row one that changes no value."""

from __future__ import annotations

import numpy as np
import openvino as ov
import openvino.opset13 as ops

from condiquant_openvino.quantizer_graphs import (
    BYTES,
    EXIT,
    PREFIX,
    PRODUCTS,
    constant_values,
    has_weight,
    is_encoder,
    origin,
)

_TAKEN_IN = {"Add", "Subtract", "Multiply", "Divide", "Maximum", "Minimum", "Relu"}
"""By the kernel of a product in front of them."""


def separate(model: ov.Model) -> None:
    """Separate in place."""
    for node in model.get_ordered_ops():
        if is_encoder(node) and _ends_attention(node):
            for port in node.output(0).get_target_inputs():
                if port.get_node().get_friendly_name().endswith((BYTES, EXIT)):
                    # Of two FakeQuantize in a row, the kernel of the product loses the first.
                    lowest, highest = (node.input_value(i).get_node().data.item() for i in (3, 4))
                    port.replace_source_output(ops.clamp(node.output(0), lowest, highest).output(0))
        elif node.get_type_name() == "MVN" and _is_scaled_product(node.input_value(0)):
            # The low-precision transforms move the product's scale past it, but not past its epsilon.
            same = ops.power(node.input_value(0), ops.constant(np.float32(1)))
            node.input(0).replace_source_output(same.output(0))


def _ends_attention(encoder: ov.Node) -> bool:
    """Whether a product of two activations comes before, and between them only what its kernel takes in."""
    ahead, seen = [encoder.input_value(0).get_node()], set()
    while ahead:
        node = ahead.pop()
        if node.get_type_name() == "MatMul" and not has_weight(node):
            return True
        if node.get_type_name() in _TAKEN_IN and node.get_friendly_name() not in seen:
            seen.add(node.get_friendly_name())
            ahead += [value.get_node() for value in node.input_values()]
    return False


def _is_scaled_product(values: ov.Output) -> bool:
    """Whether a quantized product comes before, and no bias or second tensor, which keep the scale there."""
    node = values.get_node()
    while node.get_type_name() not in PRODUCTS:
        tensors = [
            value
            for value in node.input_values()
            if value.get_element_type().is_real() and constant_values(value) is None
        ]
        if len(tensors) != 1:
            return False
        is_sum, node = node.get_type_name() == "Add", tensors[0].get_node()
        if is_sum and node.get_type_name() in PRODUCTS:
            return False
    return any(origin(v).get_friendly_name().startswith(PREFIX) for v in node.input_values())
