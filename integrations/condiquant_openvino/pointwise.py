"""Linear layers as convolutions of one pixel, which without VNNI have the faster int8 kernel."""

from __future__ import annotations

import numpy as np
import openvino as ov
import openvino.opset13 as ops
from numpy.typing import NDArray

from condiquant_openvino.quantizer_graphs import (
    EXITS,
    Role,
    constant_values,
    encoder_of,
    origin,
    redirect,
    role_of,
)

_TOKENS = 3


def convolve(model: ov.Model) -> None:
    """Replace every quantized linear layer of tokens ``(batch, tokens, channels)``, in place."""
    for product in model.get_ordered_ops():
        if product.get_type_name() == "MatMul" and _is_quantized_linear(product):
            _convolve(product)


def _is_quantized_linear(product: ov.Node) -> bool:
    inputs, weight = product.input_values()
    shapes = [value.get_partial_shape() for value in (inputs, weight)]
    flags = product.get_attributes()
    packed = weight.get_node()
    return (
        [len(shape) for shape in shapes] == [_TOKENS, 2]
        and (flags["transpose_a"], flags["transpose_b"]) == (False, True)
        and role_of(packed) is Role.MAIN
        and packed.input_value(0).get_node().get_type_name() == "Convert"
        and role_of(source := origin(inputs)) in EXITS
        and encoder_of(source) is not None
    )


def _convolve(product: ov.Node) -> None:
    inputs, weight = product.input_values()
    turn = ops.constant(np.array([0, 2, 1]))
    channels_first = ops.transpose(inputs, turn)
    shape = [*weight.get_shape(), 1]
    kernel = ops.reshape(weight, ops.constant(np.array(shape)), False)
    result = ops.convolution(channels_first, kernel, [1], [0], [0], [1])
    result.set_friendly_name(product.get_friendly_name())
    last = product.output(0)
    if (bias := _bias(product)) is not None:
        add, values = bias
        result = ops.add(result, ops.constant(values.reshape(1, -1, 1)))
        result.set_friendly_name(add.get_friendly_name())
        last = add.output(0)
    redirect(last, ops.transpose(result, turn).output(0))


def _bias(product: ov.Node) -> tuple[ov.Node, NDArray[np.float32]] | None:
    ports = product.output(0).get_target_inputs()
    if len(ports) != 1:
        return None
    (port,) = ports
    add = port.get_node()
    values = (
        constant_values(add.input_value(1 - port.get_index()))
        if add.get_type_name() == "Add"
        else None
    )
    size = product.get_output_partial_shape(0)[2]
    if values is None or values.size != size or values.shape[-1:] != (values.size,):
        return None
    return add, values
