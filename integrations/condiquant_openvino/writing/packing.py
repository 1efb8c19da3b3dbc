"""``ov.Model`` with low-bit FakeQuantize to ``ov.Model`` with packed weights and int8 kernels."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import get_args

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from condiquant_openvino.markers import PRODUCTS, any_marker_of, only_rearranges, origin
from condiquant_openvino.writing.conversion import InstructionSet, write_quantizers
from condiquant_openvino.writing.quantizer_graphs import Quantizer, redirect
from condiquant_openvino.writing.tracing import Placeholder
from condiquant_plugin import InputError
from condiquant_plugin.uniform import grid
from condiquant_plugin.uniform.marking import Marker

_BITS_OF_LEVELS = {2**bits: bits for bits in range(grid.MIN_BITS, grid.MAX_BITS + 1)}
_LATTICE_TOLERANCE = 1e-3


def pack(model: ov.Model, *, isa: InstructionSet = "vnni") -> ov.Model:
    """Write the FakeQuantize nodes of a model as :func:`condiquant_openvino.convert` writes quantizers.

    Taken are those on the lattice of :mod:`condiquant_plugin.uniform.grid`, as
    ``condiquant_nncf.LearnedBoundsQuantization`` places them, where all factors of a product are
    quantized so, or the weight alone; any other stays as it is. The result computes what the FakeQuantize
    nodes stand for.

    Args:
        model: left untouched; its input must have batch 1 for the same graph as from PyTorch.
        isa: see :func:`condiquant_openvino.convert`.

    Raises:
        InputError: if there is no such node.
    """
    model = model.clone()
    found = _on_lattice(model)
    quantizers: dict[str, Quantizer] = {}
    overflow: grid.Overflow = "safe"
    for node, (quantizer, of_grid) in found:
        label = quantizer.label
        overflow = "vnni" if "vnni" in (overflow, of_grid) else overflow
        quantizers[label] = quantizer
        redirect(node.output(0), Placeholder([node.input_value(0)], label).output(0))
    if not quantizers:
        raise InputError(
            f"{model.get_friendly_name()} has no low-bit FakeQuantize to pack: quantize it with "
            'condiquant_nncf.quantize(..., then="bounds")'
        )
    return write_quantizers(model, quantizers, overflow, isa)


_Array = NDArray[np.float32]
_Grid = tuple[Quantizer, grid.Overflow]


def _on_lattice(model: ov.Model) -> list[tuple[ov.Node, _Grid]]:
    """The FakeQuantize nodes to take, in graph order."""
    nodes = [node for node in model.get_ordered_ops() if node.get_type_name() == "FakeQuantize"]
    taken = {n.get_friendly_name(): (n, g) for n in nodes if (g := _grid(n)) is not None}
    while others := [n for n, _ in taken.values() if not _feeds_quantized_products(n, taken)]:
        for node in others:
            del taken[node.get_friendly_name()]
    return list(taken.values())


def _grid(node: ov.Node) -> _Grid | None:
    """A quantizer and what its integers fit; None if the kernels' lattice does not hold its levels."""
    bits = _BITS_OF_LEVELS.get(node.get_attributes()["levels"])
    constants = [value.get_node() for value in node.input_values()[1:]]
    if bits is None or any(constant.get_type_name() != "Constant" for constant in constants):
        return None
    lower, upper, *output = (constant.data.astype(np.float32) for constant in constants)
    if not (np.array_equal(output[0], lower) and np.array_equal(output[1], upper)):
        return None
    if not (upper > lower).all():
        return None
    marker = any_marker_of(node)
    kind = _kind(node) if marker is None or marker.kind is None else marker.kind
    step = np.asarray((upper.astype(np.float64) - lower) / (2**bits - 1), np.float32)
    if lower.size == 1:
        lower, step = lower.reshape(()), step.reshape(())
    for overflow in get_args(grid.Overflow):
        if bits > grid.fitting_bits(bits, kind, overflow):
            continue
        cells = grid.lattice(bits, kind, overflow=overflow)
        if marker is None or (zero := _marked_zero(marker, cells, lower, step)) is None:
            zero = _zero_on(cells, lower, step)
        if zero is not None:
            label = node.get_friendly_name()
            return Quantizer(label, lower, step, zero, bits, kind, cells.refinement), overflow
    return None


def _marked_zero(
    marker: Marker, cells: grid.Lattice, lower: _Array, step: _Array
) -> NDArray[np.int32] | None:
    """The zero that a quantizer says it has, in steps of a lattice that holds it.

    None if this lattice does not, or the bounds were changed since.
    """
    if marker.refinement is None or not marker.zero or lower.size % len(marker.zero):
        return None
    by_block = np.array(marker.zero) * cells.refinement
    zero, rest = np.divmod(by_block, marker.refinement)
    if rest.any() or ((zero - cells.lowest_zero) % cells.zero_spacing).any():
        return None
    if (zero < cells.lowest_zero).any() or (zero > cells.highest_zero).any():
        return None
    by_row = zero.repeat(lower.size // zero.size).reshape(lower.shape)
    moved = np.abs(lower.astype(np.float64) / step * cells.refinement + by_row)
    return by_row.astype(np.int32) if (moved < _LATTICE_TOLERANCE).all() else None


def _zero_on(cells: grid.Lattice, lower: _Array, step: _Array) -> NDArray[np.int32] | None:
    """Position of zero where a lattice holds bounds of unknown origin; None if it does not."""
    position = -lower.astype(np.float64) / step * cells.refinement
    zero = np.rint(position)
    places = (position - cells.lowest_zero) / cells.zero_spacing
    is_on_lattice = (
        (np.abs(places - np.rint(places)) < _LATTICE_TOLERANCE)
        & (zero >= cells.lowest_zero)
        & (zero <= cells.highest_zero)
    )
    return np.asarray(zero, np.int32) if is_on_lattice.all() else None


def _feeds_quantized_products(node: ov.Node, taken: Collection[str]) -> bool:
    """Whether all uses are products whose other factor is taken too, or of a weight is not quantized."""
    others = [None if f is None else origin(f) for f in _other_factors(node.output(0))]
    is_weight = _kind(node) == "weight"
    return all(
        other is not None
        and (
            other.get_friendly_name() in taken
            or (is_weight and other.get_type_name() != "FakeQuantize")
        )
        for other in others
    )


def _kind(node: ov.Node) -> grid.Kind:
    if _is_constant(node.input_value(0)):
        return "weight"
    factors = list(_other_factors(node.output(0)))
    of_products = factors and not any(f is None or _is_constant(_unquantized(f)) for f in factors)
    return "operand" if of_products else "activation"


def _other_factors(values: ov.Output) -> Iterator[ov.Output | None]:
    """Of every product that uses values, rearranged or not; None for another use."""
    for port in values.get_target_inputs():
        node = port.get_node()
        if only_rearranges(node):
            yield from _other_factors(node.output(0))
        elif node.get_type_name() in PRODUCTS:
            yield node.input_value(1 - port.get_index())
        else:
            yield None


def _unquantized(values: ov.Output) -> ov.Output:
    node = origin(values)
    return node.input_value(0) if node.get_type_name() == "FakeQuantize" else values


def _is_constant(values: ov.Output) -> bool:
    node = origin(values)
    if node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "Constant")
