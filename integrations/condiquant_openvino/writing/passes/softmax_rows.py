"""Softmax maps whose rows have scales of their own: written for the kernels that multiply them."""

from __future__ import annotations

import openvino as ov
import openvino.opset13 as ops

from condiquant_openvino.writing.tracing import Placeholder, quotients_by_row


def write_softmax_rows(model: ov.Model) -> None:
    """In place: exponentials in front of quantizers of such maps, sums of rows behind products.

    A softmax map over the largest entries of its rows is ``exp(scores - largest score)``, which needs no
    sums; and a product takes the integers that were rounded, so what it gives is divided.

    Args:
        model: with placeholders for its quantizers.
    """
    for node in model.get_ordered_ops():
        if isinstance(node, Placeholder) and (quotients := quotients_by_row(node)):
            _take_exponentials(node)
            for quotient in quotients:
                _divide_behind_products(quotient)


def _take_exponentials(rounded: ov.Node) -> None:
    scaled = rounded.input_value(0).get_node()
    if scaled.get_type_name() != "Divide":
        return
    softmax, largest = (value.get_node() for value in scaled.input_values())
    if softmax.get_type_name() != "Softmax" or largest.get_type_name() != "ReduceMax":
        return
    scores = softmax.input_value(0)
    most = ops.reduce_max(scores, largest.input_value(1), keep_dims=True)
    rounded.input(0).replace_source_output(ops.exp(ops.subtract(scores, most)).output(0))


def _divide_behind_products(quotient: ov.Node) -> None:
    for port in quotient.output(0).get_target_inputs():
        product = port.get_node()
        if product.get_type_name() != "MatMul" or port.get_index() != 0:
            continue
        flags = product.get_attributes()
        if flags["transpose_a"]:
            continue
        consumers = product.output(0).get_target_inputs()
        product.input(0).replace_source_output(quotient.input_value(0))
        divided = ops.divide(product, quotient.input_value(1))
        for consumer in consumers:
            consumer.replace_source_output(divided.output(0))
