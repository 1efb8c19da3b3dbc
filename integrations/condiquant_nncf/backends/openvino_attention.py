"""OpenVINO's fused attention taken apart, so that its products can be quantized."""

from __future__ import annotations

import numpy as np
import openvino as ov
import openvino.opset13 as ops


def split_attention(model: ov.Model) -> None:
    """Replace ScaledDotProductAttention by MatMul, Softmax, MatMul in place.

    ``convert_model`` fuses attention on its own; PyTorch's graph of the same network has the products.
    Causal attention, boolean masks and keys of unknown rank stay as they are.
    """
    for node in model.get_ordered_ops():
        if node.get_type_name() == "ScaledDotProductAttention" and _is_plain(node):
            query, key, value, *rest = node.input_values()
            name = node.get_friendly_name()
            scores = ops.matmul(query, key, False, True, name=f"{name}/scores")
            scale = _scale(query, rest[1:])
            if not _is_constant(scale, 1.0):
                scores = ops.multiply(scores, scale)
            if rest and not _is_constant(rest[0], 0.0):
                scores = ops.add(scores, rest[0])
            result = ops.matmul(ops.softmax(scores, -1), value, False, False, name=name)
            node.set_friendly_name(f"{name}/fused")
            for port in node.output(0).get_target_inputs():
                port.replace_source_output(result.output(0))


def _is_plain(node: ov.Node) -> bool:
    mask = node.input_values()[3:4]
    known = node.input_value(0).get_partial_shape()
    return (
        not node.get_attributes()["causal"]
        and not any(m.get_element_type() == ov.Type.boolean for m in mask)
        and known.rank.is_static
        and (node.get_input_size() == 5 or known[-1].is_static)
    )


def _scale(query: ov.Output, given: list[ov.Output]) -> ov.Output:
    if given:
        return given[0]
    features = query.get_partial_shape()[-1].get_length()
    return ops.constant(np.float32(features**-0.5)).output(0)


def _is_constant(source: ov.Output, value: float) -> bool:
    node = source.get_node()
    return bool(node.get_type_name() == "Constant" and np.all(node.data == value))
