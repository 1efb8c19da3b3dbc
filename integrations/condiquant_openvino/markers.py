"""The quantizers in a written IR: what a node does in one, and what surrounds it."""

from __future__ import annotations

from enum import StrEnum

import openvino as ov
from numpy.typing import NDArray


class Role(StrEnum):
    """What a node of a written quantizer does; stands in front of the label, which users choose."""

    MAIN = "fake_quantize"
    """Rounds an activation, or gives a packed weight."""
    BYTES = "fake_quantize.bytes"
    POSITION = "fake_quantize.position"
    SCALED = "fake_quantize.scaled"
    EXIT = "fake_quantize.exit"
    """Gives the quantized values of an activation."""
    TRANSPOSED_EXIT = "fake_quantize.transposed_exit"
    """Gives them with the last two axes swapped against the network."""


EXITS = (Role.EXIT, Role.TRANSPOSED_EXIT)

_OUTPUT_CHANNEL_AXES = {
    "Convolution": {0},
    "ConvolutionBackpropData": {1},
    "GroupConvolution": {0, 1},
    "GroupConvolutionBackpropData": {0, 2},
}

PRODUCTS = {*_OUTPUT_CHANNEL_AXES, "MatMul"}


def node_name(label: str, role: Role = Role.MAIN) -> str:
    """Friendly name of a node of the quantizer ``label``."""
    return f"{role}/{label}"


def parse_name(name: str) -> tuple[Role, str] | None:
    """Role and label in a friendly name; None for a node of no quantizer."""
    role, slash, label = name.partition("/")
    return (Role(role), label) if slash and role in list(Role) else None


def role_of(node: ov.Node) -> Role | None:
    """What ``node`` does in a quantizer; None if it belongs to none."""
    parsed = parse_name(node.get_friendly_name())
    return None if parsed is None else parsed[0]


def label_of(node: ov.Node) -> str | None:
    """Label of the quantizer that ``node`` belongs to; None if it belongs to none."""
    parsed = parse_name(node.get_friendly_name())
    return None if parsed is None else parsed[1]


def constant_values(value: ov.Output) -> NDArray | None:
    """Values of a constant, also behind a Convert; None if ``value`` is computed."""
    node = value.get_node()
    if node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    return node.data if node.get_type_name() == "Constant" else None


def only_rearranges(node: ov.Node) -> bool:
    """Whether a node has the values of its first input, in an order known before it runs."""
    return node.get_type_name() in {"Reshape", "Transpose", "Squeeze", "Unsqueeze"} and all(
        value.get_node().get_type_name() == "Constant" for value in node.input_values()[1:]
    )


def origin(source: ov.Output) -> ov.Node:
    """The node whose values ``source`` has, past operators that only rearrange them."""
    node = source.get_node()
    while only_rearranges(node):
        node = node.input_value(0).get_node()
    return node


def has_weight(node: ov.Node) -> bool:
    """Whether a node is a product with a weight, quantized or float."""
    if node.get_type_name() not in PRODUCTS:
        return False
    weight = origin(node.input_value(1))
    return weight.get_type_name() == "Constant" or role_of(weight) is Role.MAIN


def output_channel_axes(product: ov.Node) -> set[int]:
    """Axes of the output channels in the second operand."""
    if product.get_type_name() != "MatMul":
        return _OUTPUT_CHANNEL_AXES[product.get_type_name()]
    rank = product.input_value(1).get_partial_shape().rank.get_length()
    return {rank - 2 if product.get_attributes()["transpose_b"] else rank - 1}


def bytes_of(encoder: ov.Node) -> ov.Node:
    """The Convert at the end of what :func:`to_bytes` made; ``encoder`` is its first node."""
    node = encoder
    while node.get_type_name() != "Convert":
        (port,) = node.output(0).get_target_inputs()
        node = port.get_node()
    return node


def is_in_float(exit_node: ov.Node) -> bool:
    """Whether :func:`decode` gave its values to a float kernel."""
    return bool(exit_node.input_value(0).get_node().get_type_name() == "Power")


def decoded_integers(exit_node: ov.Node) -> ov.Output:
    """The bytes that :func:`decode` got."""
    convert = exit_node.input_value(0).get_node()
    if is_in_float(exit_node):
        convert = convert.input_value(0).get_node()
    return convert.input_value(0)


def encoder_of(exit_node: ov.Node) -> ov.Node | None:
    """The FakeQuantize whose integers a node of :data:`EXITS` decodes; None for another form."""
    if exit_node.get_type_name() not in {"Multiply", "FakeQuantize"}:
        return None
    node = exit_node
    while not is_encoder(node):
        node = node.input_value(0).get_node()
    return node


def is_encoder(node: ov.Node) -> bool:
    """Whether a node is the FakeQuantize that rounds in :func:`encode`."""
    return node.get_type_name() == "FakeQuantize" and role_of(node) is Role.MAIN
