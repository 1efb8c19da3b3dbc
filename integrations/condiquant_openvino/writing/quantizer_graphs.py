"""Graph forms of a fake quantizer that OpenVINO's CPU plugin computes exactly.

Low-precision transforms are on by default and rewrite what looks quantized. Left to themselves
they round a zero point that is not an integer, silently. Every form here keeps all levels on an
8-bit lattice with an integer zero (:mod:`condiquant_plugin.uniform.grid`), so what they make is right too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import torch
from numpy.typing import NDArray

from condiquant_openvino.markers import constant_values, mark
from condiquant_plugin.uniform import grid
from condiquant_plugin.uniform.marking import Marker, Role

LEVELS_OF_TRANSFORMS = {128, 256}
"""What the low-precision transforms take for bytes, and take apart."""
_FEW_TABLES = 6
_ALL_TABLES_BITS = 4
_PACKED = {2: ov.Type.u2, 3: ov.Type.u3, 4: ov.Type.u4, 6: ov.Type.u6}


@dataclass(frozen=True)
class Quantizer:
    """A traced fake quantizer; ``lower``, ``step`` and ``zero`` broadcast against its input."""

    label: str
    """Unique in its model."""
    lower: NDArray[np.float32]
    step: NDArray[np.float32]
    zero: NDArray[np.int32]
    """Position of zero in lattice steps, shape of ``lower``."""
    bits: int
    kind: grid.Kind
    refinement: int
    """Lattice steps in one grid step."""
    transposed: bool = False
    """Whether its values have the last two axes swapped in the IR."""

    @property
    def is_signed(self) -> bool:
        """Whether its integers are i8; else u8. Zero is 0 in both."""
        return bool(self.zero > 0)

    def marker(self, role: Role = Role.MAIN) -> Marker:
        """Of one of its nodes."""
        zero = _one_per_block(self.zero)
        return Marker(role, self.label, self.kind, self.bits, self.refinement, zero)

    @property
    def exit_role(self) -> Role:
        return Role.TRANSPOSED_EXIT if self.transposed else Role.EXIT

    @property
    def snapped(self) -> grid.SnappedGrid:
        """The simulation's own formula, in its own float32 arithmetic."""
        lower, step, zero = map(torch.from_numpy, (self.lower, self.step, self.zero))
        return grid.SnappedGrid(lower, step, self.bits, zero, self.refinement)

    @property
    def lattice_step(self) -> NDArray[np.float32]:
        """Value of one lattice step."""
        found: NDArray[np.float32] = self.snapped.lattice_step.numpy()
        return found

    def extent(self) -> tuple[int, int]:
        """Lowest and highest of its integers."""
        span = self.snapped.last_code * self.refinement
        return int(-self.zero.max()), int(span - self.zero.min())

    def integers(self, x: NDArray[np.float32]) -> NDArray[np.int32]:
        """Lattice integers of ``x``."""
        found: NDArray[np.int32] = self.snapped.integers(self._codes(x)).int().numpy()
        return found

    def codes(self, x: NDArray[np.float32]) -> NDArray[np.int32]:
        """Codes of ``x``."""
        found: NDArray[np.int32] = self._codes(x).int().numpy()
        return found

    def _codes(self, x: NDArray[np.float32]) -> torch.Tensor:
        return self.snapped.codes(torch.tensor(x))


def redirect(old: ov.Output, new: ov.Output) -> None:
    """Give all consumers of ``old`` the values of ``new``."""
    for port in old.get_target_inputs():
        port.replace_source_output(new)


def without_last_swap(transpose: ov.Node) -> ov.Output | None:
    """The input of a Transpose that moves the innermost axis to the place before, but for that swap.

    None for any other node.
    """
    if transpose.get_type_name() != "Transpose":
        return None
    order = constant_values(transpose.input_value(1))
    if order is None or order.size < 2 or order[-2] != order.size - 1:
        return None
    order = np.array([*order[:-2], order[-1], order[-2]])
    if (order == np.arange(order.size)).all():
        return transpose.input_value(0)
    return ops.transpose(transpose.input_value(0), ops.constant(order)).output(0)


def encode(x: ov.Output, quantizer: Quantizer) -> ov.Output:
    """Integers of the lattice as bytes: FakeQuantize, which a kernel in front of it takes in.

    The low-precision transforms see bytes behind 256 levels, or behind 16 that start at zero; behind 16
    others they round the zero point, silently. There a second FakeQuantize, which changes nothing,
    has 256.

    Args:
        quantizer: one grid for all of ``x``; see :func:`is_exact_in_8_bits`.
    """
    integers, values = _ends(quantizer)
    bounds = [np.array(v, np.float32) for v in (*values, *integers)]
    byte = ov.Type.i8 if quantizer.is_signed else ov.Type.u8
    return to_bytes(x, bounds, 2**quantizer.bits, byte, quantizer.marker())


def _ends(quantizer: Quantizer) -> tuple[list[float], list[float]]:
    """Lowest and highest level of a grid for all of a tensor: their integers, and their values."""
    zero, span = float(quantizer.zero), (2**quantizer.bits - 1) * quantizer.refinement
    integers, fine = [-zero, span - zero], float(quantizer.step) / quantizer.refinement
    return integers, [i * fine for i in integers]


def apart(x: ov.Output, quantizer: Quantizer) -> ov.Output:
    """``x`` behind an operator that changes nothing of what :func:`encode` gives.

    A float product would take FakeQuantize in, give floats, and another, slow pass make bytes of them.
    """
    _, (lowest, _) = _ends(quantizer)
    result = ops.maximum(x, ops.constant(np.float32(lowest)))
    mark(result, quantizer.marker(Role.APART))
    return result.output(0)


def to_bytes(
    x: ov.Output, bounds: Sequence[NDArray[np.float32]], levels: int, byte: ov.Type, marker: Marker
) -> ov.Output:
    """FakeQuantize of ``x`` by its input and output bounds, as bytes."""
    integers = _fake_quantize(x, bounds, levels, marker)
    if levels != 256 and not (levels == 16 and byte == ov.Type.u8):
        lowest = np.float32(-128 if byte == ov.Type.i8 else 0)
        extent = [np.array(lowest), np.array(lowest + np.float32(255))]
        integers = _fake_quantize(integers, extent * 2, 256, replace(marker, role=Role.BYTES))
    return ops.convert(integers, byte).output(0)


def same(values: ov.Output) -> ov.Output:
    """The values, in an operator that the plugin neither removes nor moves a scale past."""
    return ops.power(values, ops.constant(np.float32(1))).output(0)


def decode(integers: ov.Output, quantizer: Quantizer, *, in_float: bool = False) -> ov.Output:
    """Values of the integers that :func:`encode` gives.

    Args:
        in_float: for a float kernel, though int8 could multiply them.
    """
    values = ops.convert(integers, np.float32)
    if in_float:
        values = same(values.output(0)).get_node()
    result = ops.multiply(values, ops.constant(quantizer.lattice_step))
    mark(result, quantizer.marker(quantizer.exit_role))
    return result.output(0)


def elementwise(x: ov.Output, quantizer: Quantizer) -> ov.Output:
    """For float kernels: the formula of the simulation, which no transform recognises."""
    lower, step = ops.constant(quantizer.lower), ops.constant(quantizer.step)
    shifted = ops.subtract(x, lower)
    mark(shifted, quantizer.marker())
    position = ops.divide(shifted, step)
    codes = ops.round(ops.clamp(position, 0.0, 2.0**quantizer.bits - 1), "half_to_even")
    scaled = ops.multiply(codes, step)
    mark(position, quantizer.marker(Role.POSITION))
    mark(scaled, quantizer.marker(Role.SCALED))
    result = ops.add(scaled, lower)
    mark(result, quantizer.marker(quantizer.exit_role))
    return result.output(0)


def weight(
    values: NDArray[np.float32],
    quantizer: Quantizer,
    shape: Sequence[int] | None = None,
    *,
    int8: bool,
) -> ov.Output:
    """Packed codes, looked up in a table of lattice integers, times a scale.

    Codes take 2, 3, 4, 6 or 8 bits each. Folds to a constant when compiled: to int8 for an int8
    kernel, else to float, which nothing takes for a compressed weight whose input it may round.

    Args:
        values: the float weight, any shape.
        shape: shape of the result if it differs (grouped convolutions).
    """
    shape = values.shape if shape is None else tuple(shape)
    scale = per_row(quantizer.lattice_step, values.shape, shape)
    if int8 and quantizer.bits not in _PACKED:
        integers = ops.constant(quantizer.integers(values).reshape(shape).astype(np.int8))
    else:
        codes = quantizer.codes(values).reshape(shape)
        zero = per_row(quantizer.zero, values.shape, shape)
        integers = _look_up(codes, zero, quantizer, in_float=not int8)
    if integers.get_element_type() != ov.Type.f32:
        integers = ops.convert(integers, np.float32)
    result = ops.multiply(integers, ops.constant(scale))
    mark(result, quantizer.marker())
    return result.output(0)


def stored_bytes(values: torch.Tensor, snapped: grid.SnappedGrid) -> tuple[int, int]:
    """What a weight takes in a .bin, as :func:`weight` packs it: codes, tables, scales.

    Args:
        values: the float weight.
        snapped: its levels, tensors that broadcast against it.

    Returns:
        What it takes alone, and the table that all weights of its width share.
    """
    lower, step, zero = (t.detach().cpu() for t in (snapped.lower, snapped.step, snapped.zero))
    arrays = lower.numpy(), step.numpy(), zero.int().numpy()
    quantizer = Quantizer("", *arrays, snapped.bits, "weight", snapped.refinement)
    pending = [weight(values.detach().cpu().numpy(), quantizer, int8=True).get_node()]
    constants: dict[str, int] = {}
    while pending:
        node = pending.pop()
        if node.get_type_name() == "Constant":
            constants[node.get_friendly_name()] = node.get_byte_size()
        pending += [value.get_node() for value in node.input_values()]
    shared = _shared_table(quantizer, quantizer.zero)
    common = 0 if shared is None else shared.size
    return sum(constants.values()) - common, common


def _look_up(
    codes: NDArray[np.int32], zero: NDArray[np.int32], quantizer: Quantizer, *, in_float: bool
) -> ov.Node:
    """Lattice integers from packed codes, looked up in tables of few positions of zero, of a row or of all.

    Args:
        in_float: tables become floats before they are read, or OpenVINO takes the weight for compressed.
    """

    def read(table: NDArray, index: ov.Node, axis: int = 0, **more: int) -> ov.Node:
        stored = ops.constant(table.astype(np.int8))
        entries = ops.convert(stored, np.float32) if in_float else stored
        return ops.gather(entries, index, ops.constant(np.int64(axis)), **more)

    packed = ops.constant(codes, dtype=_PACKED.get(quantizer.bits, ov.Type.u8))
    index, levels = ops.convert(packed, np.int32), _levels(quantizer)
    if (table := _shared_table(quantizer, zero)) is not None:
        if quantizer.bits > _ALL_TABLES_BITS:
            index = ops.multiply(index, ops.constant(np.int32(quantizer.refinement)))
            offset = levels[-1] - zero
        else:
            offset = zero * len(levels)
        return read(table, ops.add(index, ops.constant(offset.astype(np.int32))))
    zeros, table_of_row = np.unique(zero, return_inverse=True)
    if len(zeros) > _FEW_TABLES and zero.size == codes.shape[0] == zero.shape[0]:
        return read(levels - zero.reshape(-1, 1), index, 1, batch_dims=1)
    if len(zeros) > 1:
        offset = table_of_row.reshape(zero.shape) * len(levels)
        index = ops.add(index, ops.constant(offset.astype(np.int32)))
    return read((levels - zeros[:, None]).ravel(), index)


def _levels(quantizer: Quantizer) -> NDArray[np.int64]:
    return np.arange(2**quantizer.bits) * quantizer.refinement


def _shared_table(quantizer: Quantizer, zero: NDArray[np.int32]) -> NDArray[np.int64] | None:
    """What all weights of a width with many positions of zero read, the same in all layers.

    Up to 4 bits the integers of every position there is, one after the other; above, where these would be
    many, all integers, of which codes take every so many. At 2 bits none: a row's own table is no larger.
    """
    count, levels = len(np.unique(zero)), _levels(quantizer)
    if quantizer.bits > _ALL_TABLES_BITS:
        return np.arange(-levels[-1], levels[-1] + 1) if count > 1 else None
    if quantizer.bits == grid.MIN_BITS or count <= _FEW_TABLES:
        return None
    return (levels - np.arange(levels[-1] + 1)[:, None]).ravel()


def _fake_quantize(
    x: ov.Output, bounds: Sequence[NDArray[np.float32]], levels: int, marker: Marker
) -> ov.Output:
    node = ops.fake_quantize(x, *(ops.constant(bound) for bound in bounds), levels=levels)
    mark(node, marker)
    return node.output(0)


def _one_per_block(zero: NDArray[np.int32]) -> tuple[int, ...]:
    """Fewest positions, each of which stands for equally many rows in sequence."""
    rows = zero.ravel()
    sizes = (size for size in range(rows.size, 0, -1) if rows.size % size == 0)
    blocks = (rows.reshape(-1, size) for size in sizes)
    return next(tuple(b[:, 0].tolist()) for b in blocks if (b == b[:, :1]).all())


def per_row(values: NDArray, old: tuple[int, ...], new: tuple[int, ...]) -> NDArray:
    """A value per output channel, broadcastable to ``old``, made broadcastable to ``new``."""
    if values.size == 1:
        return values.reshape(())
    if old == new:
        return values
    full = np.broadcast_to(values, old).reshape(new)
    for axis in range(full.ndim):
        first = full.take([0], axis)
        if (full == first).all():
            full = first
    return full
