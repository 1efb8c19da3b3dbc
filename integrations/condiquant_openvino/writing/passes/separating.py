"""Puts between operators that the CPU plugin computes wrongly in a row one that changes no value."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import openvino as ov
import openvino.opset13 as ops

from condiquant_openvino.markers import (
    EXITS,
    PRODUCTS,
    Role,
    bytes_of,
    constant_values,
    has_weight,
    is_encoder,
    mark,
    marker_of,
    origin,
    role_of,
)
from condiquant_openvino.writing.quantizer_graphs import LEVELS_OF_TRANSFORMS, same

_POST_OPERATORS = {
    "Add", "Subtract", "Multiply", "Divide", "Maximum", "Minimum", "Relu", "Clamp", "Round",
}  # fmt: skip
"""What the kernel of a product takes in behind it."""
_PASSED_BY_SCALES = {
    "Add", "Subtract", "Multiply", "Divide", "Relu", "PRelu", "Clamp", "Reshape", "Transpose", "Squeeze",
    "Unsqueeze", "Broadcast", "Concat", "Split", "VariadicSplit", "Slice", "StridedSlice", "Gather", "Pad",
    "AvgPool", "MaxPool", "Interpolate", "DepthToSpace", "SpaceToBatch", "BatchToSpace", "ShuffleChannels",
    "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin",
}  # fmt: skip
"""What the low-precision transforms move the scale of a quantized product past."""
_NORMS = {"MVN", "GroupNormalization"}


def separate(model: ov.Model) -> None:
    """Separate in place."""
    for node in model.get_ordered_ops():
        if is_encoder(node):
            if _ends_attention(node):
                _clamp_between(node)
            elif _would_take_bias(node):
                if node.get_attributes()["levels"] == 256:
                    _round_twice(node)
                else:
                    _keep_apart(node)
            elif _ends_grouped_sum(node):
                _keep_out_of_kernel(node)
        elif node.get_type_name() in _NORMS and _has_scale(node.input_value(0)):
            # The scale would be moved past the norm as well, but not into its epsilon.
            _keep_apart(node)
        elif node.get_type_name() in PRODUCTS - {"MatMul"} and _has_scale(node.output(0)):
            ports = node.output(0).get_target_inputs()
            if sum(port.get_node().get_type_name() != "ShapeOf" for port in ports) > 1:
                # The kernel would take in, for all consumers, what one of them multiplies with.
                unmoved = same(node.output(0))
                for port in ports:
                    port.replace_source_output(unmoved)


def _keep_apart(node: ov.Node) -> None:
    """From what computes its input."""
    node.input(0).replace_source_output(same(node.input_value(0)))


def _keep_out_of_kernel(node: ov.Node) -> None:
    """By the one operator that changes no value and is not taken in by the kernel before it."""
    lowest = ops.constant(np.finfo(np.float32).min)
    node.input(0).replace_source_output(ops.maximum(node.input_value(0), lowest).output(0))


def _ends_grouped_sum(encoder: ov.Node) -> bool:
    """Whether an encoder rounds the sum of a grouped int8 convolution and another tensor.

    Of a dynamic shape a kernel that takes in both gives something else.
    """
    total = encoder.input_value(0).get_node()
    if total.get_type_name() != "Add" or total.get_output_partial_shape(0).is_static:
        return False
    for value in total.input_values():
        node = value.get_node()
        if _is_bias(node):
            node = node.input_value(0).get_node()
        if node.get_type_name() == "GroupConvolution" and _has_scale(node.output(0)):
            return not _is_bias(total)
    return False


def _clamp_between(encoder: ov.Node) -> None:
    """In the kernel of the product the first of two FakeQuantize in a row is lost."""
    lowest, highest = (encoder.input_value(i).get_node().data for i in (3, 4))
    for port in encoder.output(0).get_target_inputs():
        if role_of(port.get_node()) in (Role.BYTES, *EXITS):
            clamped = ops.clamp(encoder.output(0), float(lowest.min()), float(highest.max()))
            port.replace_source_output(clamped.output(0))


def _round_twice(encoder: ov.Node) -> None:
    """The bias in front of 256 levels alone is lost, behind which bytes are rearranged."""
    integers = [encoder.input_value(i) for i in (3, 4)]
    ports = encoder.output(0).get_target_inputs()
    again = ops.fake_quantize(encoder.output(0), *integers, *integers, 256)
    marker = marker_of(encoder)
    assert marker is not None  # encoders are marked
    mark(again, replace(marker, role=Role.BYTES))
    for port in ports:
        port.replace_source_output(again.output(0))


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


def _would_take_bias(encoder: ov.Node) -> bool:
    """Whether the transforms take the bias in front into the bounds of an encoder, and drop both."""
    users = [port.get_node() for port in encoder.output(0).get_target_inputs()]
    joined = any(role_of(node) in EXITS for node in users)
    if joined or encoder.get_attributes()["levels"] not in LEVELS_OF_TRANSFORMS:
        return False
    ports = bytes_of(encoder).output(0).get_target_inputs()
    rearranged = any(port.get_node().get_type_name() != "Convert" for port in ports)
    return rearranged and _is_bias(encoder.input_value(0).get_node())


def _is_bias(node: ov.Node) -> bool:
    """Of a product; the scale of the product stays in front of it."""
    return (
        node.get_type_name() == "Add"
        and node.input_value(0).get_node().get_type_name() in PRODUCTS
        and constant_values(node.input_value(1)) is not None
    )


def _has_scale(values: ov.Output) -> bool:
    """Whether the scale of a quantized product may be moved behind ``values``."""
    node = values.get_node()
    if node.get_type_name() in PRODUCTS:
        return any(role_of(origin(v)) is not None for v in node.input_values())
    tensors = [
        value
        for value in node.input_values()
        if value.get_element_type().is_real() and constant_values(value) is None
    ]
    if not tensors or node.get_type_name() not in _PASSED_BY_SCALES or _is_bias(node):
        return False
    together = any if node.get_type_name() == "Multiply" else all
    return together(map(_has_scale, tensors))
