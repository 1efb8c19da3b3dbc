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

_POST_OPERATORS = {"Add", "Subtract", "Multiply", "Divide", "Maximum", "Minimum", "Relu"}
"""What the kernel of a product takes in behind it."""
_PASSED_BY_SCALES = {
    "Add", "Subtract", "Multiply", "Divide", "Relu", "PRelu", "Clamp", "Reshape", "Transpose", "Squeeze",
    "Unsqueeze", "Broadcast", "Concat", "Split", "VariadicSplit", "Slice", "StridedSlice", "Gather", "Pad",
    "AvgPool", "MaxPool", "Interpolate", "DepthToSpace", "SpaceToBatch", "BatchToSpace", "ShuffleChannels",
    "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin",
}  # fmt: skip
"""What the low-precision transforms move the scale of a quantized product past."""


def separate(model: ov.Model) -> None:
    """Separate in place: two FakeQuantize behind attention, a norm and the product in front of it."""
    for node in model.get_ordered_ops():
        if is_encoder(node) and _ends_attention(node):
            (port,) = node.output(0).get_target_inputs()
            # In the kernel of the product the first of two FakeQuantize in a row is lost.
            if port.get_node().get_friendly_name().endswith((BYTES, EXIT)):
                lowest, highest = (node.input_value(i).get_node().data for i in (3, 4))
                clamped = ops.clamp(node.output(0), float(lowest.min()), float(highest.max()))
                port.replace_source_output(clamped.output(0))
        elif node.get_type_name() in {"MVN", "GroupNormalization"} and _has_scale(
            node.input_value(0)
        ):
            # The scale would be moved past the norm as well, but not into its epsilon.
            same = ops.power(node.input_value(0), ops.constant(np.float32(1)))
            node.input(0).replace_source_output(same.output(0))


def _ends_attention(encoder: ov.Node) -> bool:
    """Whether an encoder may be in the kernel of a product of two activations."""
    ahead, seen = [encoder.input_value(0).get_node()], set()
    while ahead:
        node = ahead.pop()
        if node.get_type_name() == "MatMul" and not has_weight(node):
            return True
        if node.get_type_name() in _POST_OPERATORS and node.get_friendly_name() not in seen:
            seen.add(node.get_friendly_name())
            ahead += [value.get_node() for value in node.input_values()]
    return False


def _has_scale(values: ov.Output) -> bool:
    """Whether the scale of a quantized product may be moved behind ``values``."""
    node = values.get_node()
    if node.get_type_name() in PRODUCTS:
        return any(origin(v).get_friendly_name().startswith(PREFIX) for v in node.input_values())
    tensors = [
        value
        for value in node.input_values()
        if value.get_element_type().is_real() and constant_values(value) is None
    ]
    if not tensors or node.get_type_name() not in _PASSED_BY_SCALES:
        return False
    if node.get_type_name() == "Add" and len(tensors) == 1:
        # A bias keeps the scale where it is.
        return tensors[0].get_node().get_type_name() not in PRODUCTS and _has_scale(tensors[0])
    together = any if node.get_type_name() == "Multiply" else all
    return together(map(_has_scale, tensors))
