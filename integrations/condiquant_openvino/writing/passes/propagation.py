"""Moves quantizers towards what computes their input, and merges those that meet.

Rounding to a grid commutes with every operator that only rearranges values. Behind a projection to
queries, keys and values it turns three float tensors that are permuted, split and rounded into one that
is rounded by the projection's own kernel, and permuted as bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import openvino as ov
import openvino.opset13 as ops
from numpy.typing import NDArray

from condiquant_openvino.markers import (
    PRODUCTS,
    bytes_of,
    constant_values,
    has_weight,
    is_encoder,
    marker_of,
)
from condiquant_openvino.writing.quantizer_graphs import LEVELS_OF_TRANSFORMS, redirect, to_bytes
from condiquant_plugin.uniform.marking import Marker

Bounds = list[NDArray[np.float32]]
"""Input and output bounds of a FakeQuantize, each of the rank of its input."""


@dataclass(frozen=True)
class _Encoder:
    """FakeQuantize to integers; a Convert to bytes is behind it."""

    node: ov.Node

    @property
    def source(self) -> ov.Output:
        return self.node.input_value(0)

    @property
    def convert(self) -> ov.Node:
        return bytes_of(self.node)

    @property
    def marker(self) -> Marker:
        marker = marker_of(self.node)
        assert marker is not None  # encoders are marked
        return marker

    @property
    def bounds(self) -> Bounds:
        rank = len(self.source.get_partial_shape())
        values = [self.node.input_value(i).get_node().data for i in (1, 2, 3, 4)]
        return [v.reshape((1,) * (rank - v.ndim) + v.shape) for v in values]

    @property
    def kind(self) -> tuple[int, str]:
        """Only encoders of the same number of levels and the same byte type can merge."""
        byte = self.convert.get_output_element_type(0).get_type_name()
        return self.node.get_attributes()["levels"], byte

    @property
    def is_bound_to_convolution(self) -> bool:
        """Whether it gives signed bytes to one: at a distance they stay signed.

        Right behind a FakeQuantize the plugin makes them unsigned; kernels of signed ones halve odd weights
        without VNNI.
        """
        decoders = (port.get_node() for port in self.convert.output(0).get_target_inputs())
        exits = (
            port.get_node() for each in decoders for port in each.output(0).get_target_inputs()
        )
        products = (
            port.get_node() for each in exits for port in each.output(0).get_target_inputs()
        )
        return self.kind[1] == "i8" and any(
            node.get_type_name() in PRODUCTS and node.get_type_name() != "MatMul"
            for node in products
        )


@dataclass(frozen=True)
class _Selection:
    """An operator that takes the indices ``start`` to ``stop`` of one axis."""

    axis: int
    start: int
    stop: int
    keeps_axis: bool


def propagate(model: ov.Model) -> ov.Model:
    """A copy of ``model`` in which nothing moves any more."""
    apart: set[str] = set()
    while True:
        candidate = model.clone()
        _move(candidate, apart)
        refused = {
            n.get_friendly_name()
            for n in candidate.get_ops()
            if is_encoder(n) and not _is_runnable(_Encoder(n))
        }
        if refused <= apart:
            candidate.validate_nodes_and_infer_types()
            return candidate
        apart |= refused


def _move(model: ov.Model, apart: set[str]) -> None:
    moved = True
    while moved:
        moved = False
        for node in model.get_ordered_ops():
            if _is_live_encoder(node):
                moved |= _share(_Encoder(node)) or _rise(_Encoder(node), apart)


def _is_runnable(encoder: _Encoder) -> bool:
    """Whether the CPU plugin takes it: of a dynamic shape with bounds per channel only in a kernel."""
    varying = {axis for bound in encoder.bounds for axis, n in enumerate(bound.shape) if n > 1}
    if varying <= {1}:
        return True
    if encoder.kind[0] in LEVELS_OF_TRANSFORMS:
        return False  # taken apart, no kernel takes it in
    if encoder.source.get_partial_shape().is_static:
        return True
    producer = encoder.source.get_node()
    if producer.get_type_name() == "Add":
        producer = producer.input_value(0).get_node()
    return _data_consumers(encoder.source) == 1 and producer.get_type_name() == "MatMul"


def _encoders(tensor: ov.Output) -> list[_Encoder]:
    consumers = [port.get_node() for port in tensor.get_target_inputs()]
    found = [_Encoder(node) for node in consumers if _is_live_encoder(node)]
    return sorted(found, key=lambda encoder: encoder.node.get_friendly_name())


def _share(encoder: _Encoder) -> bool:
    """Give the consumers of an equal encoder of the same tensor to this one."""
    shared = False
    for other in _encoders(encoder.source):
        if other.node.get_name() == encoder.node.get_name() or other.kind != encoder.kind:
            continue
        pairs = zip(encoder.bounds, other.bounds, strict=True)
        if all(np.array_equal(mine, theirs) for mine, theirs in pairs):
            redirect(other.convert.output(0), encoder.convert.output(0))
            shared = True
    return shared


def _rise(encoder: _Encoder, apart: set[str]) -> bool:
    """Move an encoder past the operator that gives its input; those in ``apart`` do not merge."""
    tensor = encoder.source
    passed = tensor.get_node()
    if passed.get_output_size() != 1 or not passed.inputs() or encoder.is_bound_to_convolution:
        return False
    alone = _data_consumers(tensor) == 1
    if (factor := _positive_factor(passed)) is not None and alone:
        lower, upper, *integers = encoder.bounds
        risen = _encode(passed.input_value(0), [lower / factor, upper / factor, *integers], encoder)
        redirect(tensor, risen)
        redirect(encoder.convert.output(0), risen)
        return True
    if (selection := _selection(passed)) is not None:
        return _merge_selections(passed.input_value(0), selection.axis, apart)
    if _would_leave_transpose_at_product(passed, encoder) or _is_behind_attention(passed, encoder):
        return False
    bounds = _bounds_before(passed, encoder.bounds)
    varying = {axis for bound in encoder.bounds for axis, n in enumerate(bound.shape) if n > 1}
    # A second, float copy of an operator that moves data costs more than the bytes save.
    if bounds is None or not (alone or _is_view(passed) or len(varying) > 1):
        return False
    risen = _encode(passed.input_value(0), bounds, encoder)
    consumers = encoder.convert.output(0).get_target_inputs()
    if alone:
        passed.input(0).replace_source_output(risen)
    else:
        tensor = _copy(passed, risen)
    for port in consumers:
        port.replace_source_output(tensor)
    return True


def _would_leave_transpose_at_product(passed: ov.Node, encoder: _Encoder) -> bool:
    """A Transpose of bytes next to a product is made float; of a static shape it can be rewritten."""
    consumers = [port.get_node() for port in encoder.convert.output(0).get_target_inputs()]
    return (
        passed.get_type_name() == "Transpose"
        and passed.get_output_partial_shape(0).is_dynamic
        and any(node.get_type_name() == "Convert" for node in consumers)
    )


def _is_behind_attention(passed: ov.Node, encoder: _Encoder) -> bool:
    """Taken into the plugin's attention kernel, the first of two FakeQuantize in a row is lost."""
    product = passed.input_value(0).get_node()
    while product.get_type_name() == "Transpose":
        product = product.input_value(0).get_node()
    two = encoder.convert.input_value(0).get_node().get_name() != encoder.node.get_name()
    return two and product.get_type_name() == "MatMul" and not has_weight(product)


def _merge_selections(tensor: ov.Output, axis: int, apart: set[str]) -> bool:
    """Encode ``tensor`` once if everything taken from it along ``axis`` is encoded alike."""
    size = tensor.get_partial_shape()[axis]
    parts: list[tuple[ov.Node, _Selection, _Encoder]] = []
    for node in (port.get_node() for port in tensor.get_target_inputs()):
        if node.get_type_name() == "ShapeOf":
            continue
        selection = _selection(node)
        if selection is None or selection.axis != axis or _data_consumers(node.output(0)) != 1:
            return False
        encoders = _encoders(node.output(0))
        if not encoders or encoders[0].node.get_friendly_name() in apart:
            return False
        if encoders[0].is_bound_to_convolution:
            return False
        parts.append((node, selection, encoders[0]))
    if size.is_dynamic or len({encoder.kind for _, _, encoder in parts}) > 1:
        return False
    parts.sort(key=lambda part: str(part[2].node.get_friendly_name()))  # targets have no order
    merged = []
    for index in range(4):
        pieces = []
        for _, selection, encoder in parts:
            bound = encoder.bounds[index]
            pieces.append(bound if selection.keeps_axis else np.expand_dims(bound, axis))
        shape = list(np.broadcast_shapes(*(piece.take([0], axis).shape for piece in pieces)))
        shape[axis] = size.get_length()
        # Indices that nobody takes get any bounds: the first part's.
        whole = np.broadcast_to(pieces[0].take([0], axis), shape).copy()
        for (_, selection, _), piece in zip(parts, pieces, strict=True):
            taken = [slice(None)] * whole.ndim
            taken[axis] = slice(selection.start, selection.stop)
            whole[tuple(taken)] = piece
        merged.append(whole)
    markers = [encoder.marker for _, _, encoder in parts]
    marker = markers[0]
    if len({(m.refinement, m.zero) for m in markers}) > 1:
        marker = replace(marker, refinement=None, zero=())
    risen = _encode(tensor, merged, parts[0][2], marker)
    for node, _, encoder in parts:
        consumers = encoder.convert.output(0).get_target_inputs()
        node.input(0).replace_source_output(risen)
        for port in consumers:
            port.replace_source_output(node.output(0))
    return True


def _encode(
    source: ov.Output, bounds: Bounds, like: _Encoder, marker: Marker | None = None
) -> ov.Output:
    levels, _ = like.kind
    marker = like.marker if marker is None else marker
    byte = like.convert.get_output_element_type(0)
    return to_bytes(source, bounds, levels, byte, marker)


def _copy(node: ov.Node, source: ov.Output) -> ov.Output:
    if node.get_type_name() == "Reshape":
        zeros = node.get_attributes()["special_zero"]
        return ops.reshape(source, node.input_value(1), zeros).output(0)
    return ops.transpose(source, node.input_value(1)).output(0)


def _data_consumers(tensor: ov.Output) -> int:
    nodes = [port.get_node() for port in tensor.get_target_inputs()]
    return sum(
        _is_live_encoder(node) if is_encoder(node) else node.get_type_name() != "ShapeOf"
        for node in nodes
    )


def _is_live_encoder(node: ov.Node) -> bool:
    """Whether a node is an encoder in use: a replaced one stays while something refers to it."""
    return is_encoder(node) and bool(bytes_of(node).output(0).get_target_inputs())


def _is_view(node: ov.Node) -> bool:
    return bool(node.get_type_name() == "Reshape")


def _positive_factor(node: ov.Node) -> np.float32 | None:
    """The constant that all of the first input is multiplied with."""
    if node.get_type_name() not in {"Multiply", "Divide"}:
        return None
    values = constant_values(node.input_value(1))
    if values is None or values.size != 1 or not values.item() > 0:
        return None
    factor = np.float32(values.item())
    return factor if node.get_type_name() == "Multiply" else np.float32(1) / factor


def _selection(node: ov.Node) -> _Selection | None:
    values = [constant_values(value) for value in node.input_values()[1:]]
    if any(value is None or value.size != 1 for value in values):
        return None
    numbers = [int(value.item()) for value in values if value is not None]
    rank = len(node.get_input_partial_shape(0))
    if node.get_type_name() == "Gather" and len(node.get_output_partial_shape(0)) == rank - 1:
        index, axis = numbers
        return _Selection(axis % rank, index, index + 1, keeps_axis=False) if index >= 0 else None
    if node.get_type_name() == "Slice" and len(numbers) == 4:
        start, stop, step, axis = numbers
        size = node.get_input_partial_shape(0)[axis % rank]
        if step != 1 or start < 0 or stop < 0 or size.is_dynamic:
            return None
        return _Selection(axis % rank, start, min(stop, size.get_length()), keeps_axis=True)
    return None


def _bounds_before(node: ov.Node, bounds: Bounds) -> Bounds | None:
    """Bounds of the input that mean the same; None if there are none."""
    before, after = node.get_input_partial_shape(0), node.get_output_partial_shape(0)
    if before.rank.is_dynamic or after.rank.is_dynamic:
        return None
    kind = node.get_type_name()
    if kind == "Transpose":
        order = constant_values(node.input_value(1))
        return None if order is None else [b.transpose(np.argsort(order)) for b in bounds]
    if kind in {"Reshape", "Squeeze", "Unsqueeze"}:
        found = [_before_reshape(b, list(before), list(after)) for b in bounds]
        return None if any(b is None for b in found) else [b for b in found if b is not None]
    if kind == "Roll":
        axes = constant_values(node.input_value(2))
        if axes is not None and all(b.shape[int(a)] == 1 for b in bounds for a in axes.ravel()):
            return bounds
    return None


def _before_reshape(
    bound: NDArray[np.float32], before: Sequence[ov.Dimension], after: Sequence[ov.Dimension]
) -> NDArray[np.float32] | None:
    """A bound of the reshaped tensor as one of the tensor before; it varies on trailing axes only."""
    if bound.size == 1:
        return bound.reshape((1,) * len(before))
    first = next(axis for axis, size in enumerate(bound.shape) if size > 1)
    sizes_after = [d.get_length() if d.is_static else -1 for d in after]
    sizes_before = [d.get_length() if d.is_static else -1 for d in before]
    for start in range(first, -1, -1):
        tail = sizes_after[start:]
        for start_before in range(len(before)):
            tail_before = sizes_before[start_before:]
            if min(tail + tail_before) >= 0 and prod(tail) == prod(tail_before):
                full = np.broadcast_to(bound.reshape(bound.shape[start:]), tail)
                full = full.reshape((1,) * start_before + tuple(tail_before))
                return _narrow(full)
    return None


def _narrow(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Axes along which nothing varies, made of size 1."""
    for axis in range(values.ndim):
        first = values.take([0], axis)
        if (values == first).all():
            values = first
    return values
