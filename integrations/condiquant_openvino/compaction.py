"""Smaller files, same values: constants are stored once, repetitive ones as a table and an index.

A converted window-attention network holds its relative position biases and masks expanded, tens of
times the packed weights. The tables fold back into the same constants when the IR is compiled.
"""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np
import openvino as ov
import openvino.opset13 as ops
from numpy.typing import NDArray

_FEWEST_ENTRIES, _FEWEST_HALVED = 16384, 1024
_INDEX_BITS = {2: ov.Type.u2, 4: ov.Type.u4, 8: ov.Type.u8, 16: ov.Type.u16}


def compact(model: ov.Model) -> None:
    """Share and tabulate in place."""
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Constant" and node.get_output_element_type(0) == ov.Type.f32:
            values = node.data
            if values.size >= _FEWEST_ENTRIES and (table := _as_table(values)) is not None:
                table.get_node().set_friendly_name(node.get_friendly_name())
                for port in node.output(0).get_target_inputs():
                    port.replace_source_output(table)
    _share_constants(model)


def halve(model: ov.Model) -> None:
    """Store large float constants in half precision, in place; OpenVINO skips quantized models.

    Bounds and scales are small constants and stay exact, and so do codes and their lattice.
    """
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Constant" or node.get_output_element_type(0) != ov.Type.f32:
            continue
        if node.data.size < _FEWEST_HALVED or np.abs(node.data).max() > np.finfo(np.float16).max:
            continue
        widened = ops.convert(ops.constant(node.data.astype(np.float16)), np.float32)
        for port in node.output(0).get_target_inputs():
            port.replace_source_output(widened.output(0))


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


def _as_table(values: NDArray[np.float32]) -> ov.Output | None:
    """Distinct columns of ``values`` and the index of each, if that takes less than half the space.

    A column runs along the leading axes: ``(1, heads, n, n)`` biases are ``n * n`` columns of
    ``heads`` values, and all blocks of a network share their index.
    """
    best = None
    for leading in range(values.ndim):
        rows = int(np.prod(values.shape[:leading]))
        columns = values.reshape(rows, -1)
        table, index = _distinct_columns(columns)
        bits = next((b for b in _INDEX_BITS if len(table) <= 2**b), 32)
        size = table.nbytes + index.size * bits // 8
        if best is None or size < best[0]:
            best = size, leading, table, index, bits
    if best is None or best[0] > values.nbytes // 2 or best[4] not in _INDEX_BITS:
        return None
    _, leading, table, index, bits = best
    packed = ops.constant(index.reshape(values.shape[leading:]), dtype=_INDEX_BITS[bits])
    shaped = ops.constant(np.ascontiguousarray(table.T).reshape(*values.shape[:leading], -1))
    looked_up = ops.gather(shaped, ops.convert(packed, np.int32), ops.constant(np.int64(leading)))
    return looked_up.output(0)


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
