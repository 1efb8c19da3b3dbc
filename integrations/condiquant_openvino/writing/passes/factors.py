"""Constant factors of weights, moved back behind the products that OpenVINO's conversion took them from."""

from __future__ import annotations

import numpy as np
import openvino as ov
import openvino.opset13 as ops
from numpy.typing import NDArray

from condiquant_openvino.markers import (
    PRODUCTS,
    constant_values,
    only_rearranges,
    origin,
    output_channel_axes,
)
from condiquant_openvino.writing.tracing import Placeholder


def move_factors_behind_products(model: ov.Model) -> None:
    """In place: a weight that is quantized and then multiplied is none that an int8 kernel takes.

    ``layer(x) * 0.2``, as residual branches have it, comes as a weight times 0.2; a
    normalization likewise.

    Args:
        model: with placeholders for its quantizers.
    """
    for product in model.get_ordered_ops():
        if product.get_type_name() not in PRODUCTS:
            continue
        multiply = origin(product.input_value(1))
        if multiply.get_type_name() != "Multiply" or not _feeds_only(multiply, product):
            continue
        for index in (0, 1):
            weight, factor = multiply.input_value(index), multiply.input_value(1 - index)
            values = constant_values(factor)
            if values is None or not _is_quantized_constant(origin(weight)):
                continue
            by_channel = _by_output_channel(np.asarray(values), multiply, product)
            if by_channel is None:
                continue
            consumers = product.output(0).get_target_inputs()
            multiply.output(0).replace(weight)
            scaled = ops.multiply(product, ops.constant(by_channel))
            for port in consumers:
                port.replace_source_output(scaled.output(0))


def _feeds_only(node: ov.Node, product: ov.Node) -> bool:
    while node != product:
        ports = node.output(0).get_target_inputs()
        if len(ports) != 1:
            return False
        (port,) = ports
        node = port.get_node()
    return True


def _is_quantized_constant(node: ov.Node) -> bool:
    return isinstance(node, Placeholder) and constant_values(node.input_value(0)) is not None


def _by_output_channel(
    factor: NDArray[np.float32], multiply: ov.Node, product: ov.Node
) -> NDArray[np.float32] | None:
    """A factor of a product's weight as one of its output; None if entries of a channel differ in it."""
    full = np.broadcast_to(factor, tuple(multiply.get_output_shape(0)))
    full = _rearranged(full, product.input_value(1), multiply)
    axes = sorted(output_channel_axes(product))
    rows = np.moveaxis(full, axes, range(len(axes)))
    rows = rows.reshape(int(np.prod(rows.shape[: len(axes)])), -1)
    if (rows != rows[:, :1]).any():
        return None
    channels = rows[:, 0]
    if (channels == channels[0]).all():
        return channels[0]
    if product.get_type_name() == "MatMul":
        return channels
    spatial = product.get_output_partial_shape(0).rank.get_length() - 2
    return channels.reshape(1, -1, *(1,) * spatial)


def _rearranged(values: NDArray, output: ov.Output, start: ov.Node) -> NDArray:
    """Values of ``start`` as ``output`` has them, behind operators that only rearrange."""
    node = output.get_node()
    if node == start:
        return values
    assert only_rearranges(node)
    before = _rearranged(values, node.input_value(0), start)
    if node.get_type_name() == "Transpose":
        return before.transpose(constant_values(node.input_value(1)))
    return before.reshape(tuple(node.get_output_shape(0)))
