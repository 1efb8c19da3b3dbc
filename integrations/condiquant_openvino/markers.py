"""The quantizers in a written IR: what a node does in one, and what surrounds it."""

from __future__ import annotations

from collections.abc import Iterable

import openvino as ov
from numpy.typing import NDArray

from condiquant_plugin.uniform.marking import MODEL_KEY, MODEL_VALUE, NODE_KEY, Marker, Role

EXITS = (Role.EXIT, Role.TRANSPOSED_EXIT)

_OUTPUT_CHANNEL_AXES = {
    "Convolution": {0},
    "ConvolutionBackpropData": {1},
    "GroupConvolution": {0, 1},
    "GroupConvolutionBackpropData": {0, 2},
}

PRODUCTS = {*_OUTPUT_CHANNEL_AXES, "MatMul"}


def node_name(label: str, role: Role = Role.MAIN) -> str:
    """Friendly name of a node of the quantizer ``label``, for people and reports."""
    return f"{role}/{label}"


def mark(node: ov.Node, marker: Marker) -> None:
    """Say what a node is, and call it so."""
    node.get_rt_info()[NODE_KEY] = marker.to_text()
    node.set_friendly_name(node_name(marker.label, marker.role))


def marker_of(node: ov.Node) -> Marker | None:
    """What a node of a written quantizer says of itself; None if it belongs to none."""
    marker = any_marker_of(node)
    return None if marker is None or marker.role is Role.WHOLE else marker


def any_marker_of(node: ov.Node) -> Marker | None:
    """As :func:`marker_of`, also of a quantizer that is not written for kernels."""
    info = node.get_rt_info()
    return Marker.from_text(info[NODE_KEY].astype(str)) if NODE_KEY in info else None


def role_of(node: ov.Node) -> Role | None:
    """What ``node`` does in a written quantizer; None if it belongs to none."""
    marker = marker_of(node)
    return None if marker is None else marker.role


def label_of(node: ov.Node) -> str | None:
    """Label of the written quantizer that ``node`` belongs to; None if it belongs to none."""
    marker = marker_of(node)
    return None if marker is None else marker.label


def main_nodes(nodes: Iterable[ov.Node]) -> dict[str, ov.Node]:
    """By label, the nodes that round activations or give weights."""
    marked = ((marker_of(node), node) for node in nodes)
    return {m.label: node for m, node in marked if m is not None and m.role is Role.MAIN}


def set_version(model: ov.Model) -> None:
    """Say of a model that its quantizers, if it has any, are marked."""
    model.set_rt_info(MODEL_VALUE, MODEL_KEY)


def mark_by_names(model: ov.Model) -> None:
    """Mark an IR of an earlier version, which told the nodes of quantizers by their friendly names."""
    if model.has_rt_info(MODEL_KEY):
        return
    for node in model.get_ops():
        role, slash, label = node.get_friendly_name().partition("/")
        if slash and role in set(Role) - {Role.WHOLE}:
            mark(node, Marker(Role(role), label, bits=_bits_of_rounding(node)))
    set_version(model)


def _bits_of_rounding(node: ov.Node) -> int | None:
    """From the levels of a FakeQuantize, or the Clamp behind a quantizer in float form."""
    if node.get_type_name() == "FakeQuantize":
        return int(node.get_attributes()["levels"]).bit_length() - 1
    for position in node.output(0).get_target_inputs():
        for port in position.get_node().output(0).get_target_inputs():
            if node.get_type_name() == "Subtract" and port.get_node().get_type_name() == "Clamp":
                return int(port.get_node().get_attributes()["max"]).bit_length()
    return None


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


def arriving(node: ov.Node) -> ov.Output:
    """What a node that rounds gets, past one that keeps it apart."""
    source = node.input_value(0)
    is_apart = role_of(source.get_node()) is Role.APART
    return source.get_node().input_value(0) if is_apart else source


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
