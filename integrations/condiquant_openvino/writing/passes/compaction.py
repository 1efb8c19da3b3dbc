"""Smaller files, same values: constants are stored once, repetitive ones as a table and an index, and
those that are small integers times one factor as bytes.

A converted window-attention network holds its relative position biases and masks expanded, tens of
times the packed weights. The tables fold back into the same constants when the IR is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence

import numpy as np
import openvino as ov
import openvino.opset13 as ops
from numpy.typing import NDArray

from condiquant_openvino.markers import role_of
from condiquant_openvino.writing.quantizer_graphs import same

_FEWEST_ENTRIES = 16384
_FEWEST_HALVED = 16
"""Scalars, sizes and the mean of an image's channels stay exact: they save nothing."""
_HALF_BITS = 11
_FEWEST_BYTES, _LARGEST_BYTE = 256, 127
"""Below, the names of further operators take what bytes save."""
_INDEX_BITS = {2: ov.Type.u2, 4: ov.Type.u4, 8: ov.Type.u8, 16: ov.Type.u16}


def compact(model: ov.Model) -> None:
    """Share, tabulate and store as bytes in place."""
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Constant" and node.get_output_element_type(0) == ov.Type.f32:
            values = node.data
            if values.size < _FEWEST_ENTRIES:
                continue
            values = _without_repeats(values, node.output(0))
            table = _as_table(values)
            if table is None and values.size < node.data.size:
                table = ops.constant(values).output(0)
            if table is not None:
                table.get_node().set_friendly_name(node.get_friendly_name())
                for port in node.output(0).get_target_inputs():
                    port.replace_source_output(table)
    _store_bytes(model)
    _share_constants(model)


def halve(model: ov.Model) -> None:
    """Store float constants in half precision, in place; OpenVINO skips quantized models.

    What belongs to a quantizer stays exact (bounds, scales, codes and their lattice), and so does what
    shapes are computed from, has fewer than 16 entries, or is too large or too small for half precision.
    """
    for node, ports in _replaceable_constants(model, _FEWEST_HALVED):
        values = node.data
        with np.errstate(over="ignore", invalid="ignore"):
            halved = values.astype(np.float16)
            error = np.abs(halved.astype(np.float32) - values).max()
        if error <= np.abs(values).max() * 2.0**-_HALF_BITS:
            stored = ops.constant(halved)
            _store(node, ports, stored, ops.convert(stored, np.float32))


def _store_bytes(model: ov.Model) -> None:
    """Float constants that are integers of -127 to 127 times a power of two."""
    for node, ports in _replaceable_constants(model, _FEWEST_BYTES):
        values = node.data
        largest = np.abs(values).max()
        if not 0 < largest < np.inf:
            continue
        factor = np.float32(2.0 ** np.ceil(np.log2(largest / _LARGEST_BYTE)))
        integers = (values / factor).round()
        if np.array_equal(integers * factor, values):
            stored = ops.constant(integers.astype(np.int8))
            # Else a product takes them for a compressed weight, whose input it may round.
            exact = same(ops.convert(stored, np.float32).output(0))
            widened = ops.multiply(exact, ops.constant(factor))
            _store(node, ports, stored, widened)


def _replaceable_constants(
    model: ov.Model, fewest: int
) -> Iterator[tuple[ov.Node, list[ov.Input]]]:
    """Float constants of at least so many entries, and where another operator may stand for them."""
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Constant" or node.get_output_element_type(0) != ov.Type.f32:
            continue
        ports = [port for port in node.output(0).get_target_inputs() if not _must_be_exact(port)]
        if ports and node.data.size >= fewest:
            yield node, ports


def _store(node: ov.Node, ports: Sequence[ov.Input], stored: ov.Node, widened: ov.Node) -> None:
    stored.set_friendly_name(node.get_friendly_name())
    widened.set_friendly_name(f"{node.get_friendly_name()}/widened")
    for port in ports:
        port.replace_source_output(widened.output(0))


def _must_be_exact(port: ov.Input) -> bool:
    """Whether a constant is a quantizer's there, or something that shapes are computed from."""
    node = port.get_node()
    if role_of(node) is not None:
        return True
    if node.get_type_name() == "FakeQuantize":
        return bool(port.get_index() > 0)
    rank = node.get_output_partial_shape(0).rank
    return node.get_type_name() == "Interpolate" or (rank.is_static and rank.get_length() < 2)


def _share_constants(model: ov.Model) -> None:
    first: dict[Hashable, ov.Output] = {}
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Constant":
            continue
        output = node.output(0)
        element_type, shape = output.get_element_type(), tuple(output.get_shape())
        shared = first.setdefault((element_type.get_type_name(), shape, _bytes(node)), output)
        if shared.get_node().get_name() != node.get_name():
            for port in output.get_target_inputs():
                port.replace_source_output(shared)


def _bytes(node: ov.Node) -> bytes:
    data: bytes = node.data.tobytes()
    return data


def _without_repeats(values: NDArray[np.float32], output: ov.Output) -> NDArray[np.float32]:
    """Without the axes along which nothing varies, where every use broadcasts them again."""
    for axis in range(values.ndim):
        first = values.take([0], axis)
        if (values == first).all() and all(
            _broadcasts(port, axis - values.ndim) for port in output.get_target_inputs()
        ):
            values = first
    return np.ascontiguousarray(values)


def _broadcasts(port: ov.Input, axis: int) -> bool:
    """Whether the other operand has the whole of ``axis``, counted from the end."""
    node = port.get_node()
    if node.get_type_name() not in {"Add", "Multiply", "Subtract"}:
        return False
    other, this = (
        node.get_input_partial_shape(i) for i in (1 - port.get_index(), port.get_index())
    )
    return len(other) >= -axis and bool(other[axis] == this[axis])


def _as_table(values: NDArray[np.float32]) -> ov.Output | None:
    """``values`` from what is distinct in them, if that takes less than half the space."""
    candidates = [_by_columns(values), _by_axes(values)]
    size, build = min(candidates, key=lambda candidate: candidate[0])
    return build() if size <= values.nbytes // 2 else None


def _by_axes(values: NDArray[np.float32]) -> tuple[int, Callable[[], ov.Output]]:
    """Bytes, and a builder: distinct slices along each axis, and an index per axis.

    Masks of shifted windows repeat whole rows and columns.
    """
    indices: dict[int, NDArray[np.int32]] = {}
    for axis in range(values.ndim):
        slices = np.moveaxis(values, axis, -1).reshape(-1, values.shape[axis])
        distinct, index = _distinct_columns(slices)
        if len(distinct) < values.shape[axis]:
            shape = [n for i, n in enumerate(values.shape) if i != axis]
            values = np.moveaxis(distinct.T.reshape(*shape, len(distinct)), -1, axis)
            indices[axis] = index
    values = np.ascontiguousarray(values)

    def build() -> ov.Output:
        result = ops.constant(values).output(0)
        for axis, index in indices.items():
            result = _gather(result, index, axis)
        return result

    return values.nbytes + sum(_packed_bytes(index) for index in indices.values()), build


def _by_columns(values: NDArray[np.float32]) -> tuple[int, Callable[[], ov.Output]]:
    """Bytes, and a builder: distinct columns of ``values`` and the index of each.

    A column runs along the leading axes: ``(1, heads, n, n)`` biases are ``n * n`` columns of
    ``heads`` values, and all blocks of a network share their index.
    """
    best = None
    for leading in range(values.ndim):
        rows = int(np.prod(values.shape[:leading]))
        table, index = _distinct_columns(values.reshape(rows, -1))
        size = table.nbytes + _packed_bytes(index)
        if best is None or size < best[0]:
            best = size, leading, table, index
    assert best is not None  # a large constant has axes
    size, leading, table, index = best

    def build() -> ov.Output:
        shaped = np.ascontiguousarray(table.T).reshape(*values.shape[:leading], -1)
        return _gather(
            ops.constant(shaped).output(0), index.reshape(values.shape[leading:]), leading
        )

    return size, build


def _index_type(index: NDArray[np.int32]) -> ov.Type:
    last = int(index.max())
    return next((t for bits, t in _INDEX_BITS.items() if last < 2**bits), ov.Type.i32)


def _packed_bytes(index: NDArray[np.int32]) -> int:
    return int(index.size * _index_type(index).bitwidth // 8)


def _gather(table: ov.Output, index: NDArray[np.int32], axis: int) -> ov.Output:
    packed = ops.convert(ops.constant(index, dtype=_index_type(index)), np.int32)
    return ops.gather(table, packed, ops.constant(np.int64(axis))).output(0)


def _distinct_columns(
    columns: NDArray[np.float32],
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Distinct columns as rows, in order of appearance: equal patterns get equal indices."""
    rows = columns.shape[0]
    keys = np.ascontiguousarray(columns.T).view("u4" if rows == 1 else f"V{4 * rows}").ravel()
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return columns.T[first[order]], rank[inverse].astype(np.int32)
