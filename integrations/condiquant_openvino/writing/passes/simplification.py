"""What the conversion from PyTorch leaves in a graph, made simpler before anything is quantized."""

from __future__ import annotations

import re

import openvino as ov
import openvino.opset13 as ops
from openvino.passes import ConstantFolding, Manager

from condiquant_openvino.markers import constant_values
from condiquant_openvino.writing.quantizer_graphs import redirect

_PIXEL_SHUFFLE = re.compile(r"(?:^|/)aten::pixel_shuffle/[^/]+$")


def simplify(model: ov.Model) -> None:
    """Simplify in place; ``model`` takes one image at a time."""
    folding = Manager()
    folding.register_pass(ConstantFolding())
    folding.run_passes(model)
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Pad":
            _remove_empty_padding(node)
        elif node.get_type_name() == "Reshape":
            _add_mask_without_batch_axis(node)
        elif node.get_type_name() == "Transpose":
            _shuffle_pixels_at_once(node)


def _remove_empty_padding(pad: ov.Node) -> None:
    sizes = [constant_values(pad.input_value(i)) for i in (1, 2)]
    if all(values is not None and not values.any() for values in sizes):
        redirect(pad.output(0), pad.input_value(0))


def _add_mask_without_batch_axis(merge: ov.Node) -> None:
    """``(windows, heads, n, n)`` is viewed as ``(1, windows, heads, n, n)`` to add a mask of windows.

    In four dimensions the plugin runs the whole attention as one kernel.
    """
    add = merge.input_value(0).get_node()
    if add.get_type_name() != "Add" or len(add.output(0).get_target_inputs()) != 1:
        return
    split, mask = add.input_value(0).get_node(), add.input_value(1)
    shapes = add.get_output_partial_shape(0), mask.get_partial_shape()
    if split.get_type_name() != "Reshape" or any(len(shape) != 5 for shape in shapes):
        return
    scores = split.input_value(0)
    before, after = scores.get_partial_shape(), merge.get_output_partial_shape(0)
    batch, windows, heads = list(mask.get_partial_shape())[:3]
    if len(before) != 4 or before != after or batch != 1 or heads != 1:
        return
    if windows.is_static and before[0].is_static and windows != before[0]:
        return
    flat = ops.squeeze(mask, ops.constant([0]))
    redirect(merge.output(0), ops.add(scores, flat).output(0))


def _shuffle_pixels_at_once(transpose: ov.Node) -> None:
    """PixelShuffle comes as Reshape, Transpose, Reshape; DepthToSpace takes any memory layout."""
    order = constant_values(transpose.input_value(1))
    consumers = [port.get_node() for port in transpose.output(0).get_target_inputs()]
    split = transpose.input_value(0).get_node()
    kinds = [split.get_type_name(), *(node.get_type_name() for node in consumers)]
    if order is None or list(order) != [0, 1, 4, 2, 5, 3] or kinds != ["Reshape", "Reshape"]:
        return
    image, merged = split.input_value(0), consumers[0].output(0)
    before, parts = image.get_partial_shape(), list(split.get_output_partial_shape(0))
    if len(before) != 4 or before[1].is_dynamic or any(d.is_dynamic for d in parts[2:4]):
        return
    rows, columns = (d.get_length() for d in parts[2:4])
    # Height and width may be dynamic: that they are the image's is known from the operator's name.
    if rows != columns or not _PIXEL_SHUFFLE.search(transpose.get_friendly_name()):
        return
    redirect(merged, ops.depth_to_space(image, "depth_first", rows).output(0))
