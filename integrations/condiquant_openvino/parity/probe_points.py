"""Where the activation quantizers of a network ended up in its IR.

One FakeQuantize may serve several of them, far from their products: what it rounds is permuted and split
afterwards. An index map says which of its entries each quantizer of the network got.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import torch
from numpy.typing import NDArray

from condiquant_openvino.markers import (
    EXITS,
    bytes_of,
    decoded_integers,
    encoder_of,
    is_encoder,
    main_nodes,
    marker_of,
)
from condiquant_openvino.running.upscaling import compile_ir
from condiquant_plugin import InputError
from condiquant_plugin.uniform.grid import Grid
from condiquant_plugin.uniform.marking import Role

Array = NDArray[np.float32]
Arrays = Mapping[str, Array]
_TIE_MARGIN = 1e-3
_SUM_ERROR = 2.0**-20
"""Of the value range: 16 units in the last place."""
_MOST_INDICES = 2**24
"""Integers up to here are exact in float32."""


def value_range(values: Array) -> float:
    """Maximum minus minimum of the values and 0, never 0."""
    extent = max(float(values.max()), 0.0) - min(float(values.min()), 0.0)
    return max(extent, float(np.finfo(np.float32).tiny))


def mean_error(values: Array, expected: Array) -> float:
    """Mean absolute difference over the value range of ``expected``."""
    return float(np.abs(values - expected).mean()) / value_range(expected)


@dataclass(frozen=True)
class ArrayGrid:
    """A grid of arrays: the formula is torch's, as in the simulation."""

    lower: Array
    step: Array
    bits: int

    def _of_tensors(self) -> Grid:
        return Grid(_tensor(self.lower), _tensor(self.step), self.bits)

    def codes(self, x: Array) -> Array:
        """Codes of values."""
        return self._of_tensors().codes(_tensor(x)).numpy()

    def clipped_positions(self, x: Array) -> Array:
        """Codes before rounding."""
        of_tensors = self._of_tensors()
        return of_tensors.positions(_tensor(x)).clamp_(0, of_tensors.last_code).numpy()


def _tensor(values: Array) -> torch.Tensor:
    return torch.from_numpy(np.require(values, np.float32, "W"))


@dataclass(frozen=True)
class ProbePoint:
    """One activation quantizer of the network, for inputs of one shape."""

    label: str
    entry: str
    """Friendly name of the node that rounds."""
    exit: str
    """Friendly name of the node that gives the quantized values."""
    transposed: bool
    """Whether the last two axes are swapped against the network."""
    grid: ArrayGrid
    entry_grid: ArrayGrid
    """Bounds at the entry, in the order of the exit; they differ by a factor moved past the rounding."""
    entry_shape: tuple[int, ...]
    index: NDArray[np.int64] | None
    """Flat index in the entry's tensor of every value at the exit; None if the order is the same."""

    def codes(self, x: Array) -> Array:
        """Codes of values in the scale of the exit."""
        return self.grid.codes(x)

    def codes_at_entry(self, tensor: Array) -> Array:
        """Codes that this quantizer gets of the entry's input, in the order of the exit."""
        return self.entry_grid.codes(tensor if self.index is None else tensor.ravel()[self.index])

    def input_error(self, tensor: Array, raw: Array) -> float:
        """Mean difference of the entry's input from what torch saw, over the value range of that."""
        arrived = (tensor if self.index is None else tensor.ravel()[self.index]).ravel()
        if not np.array_equal(self.entry_grid.step, self.grid.step):
            arrived = arrived * np.float32(self.grid.step / self.entry_grid.step)
        return mean_error(arrived, raw.ravel())

    def from_network(self, x: Array) -> Array:
        """A tensor of the network in the order of the exit."""
        return np.swapaxes(x, -1, -2) if self.transposed else x

    def away_from_ties(self, raw: Array, quantized: Array) -> Array:
        """``raw`` with what lies on a rounding tie moved to the value that torch chose for it."""
        distance = np.subtract(raw, quantized)
        np.divide(np.abs(distance, out=distance), self.grid.step, out=distance)
        on_tie = np.abs(np.subtract(distance, 0.5, out=distance), out=distance) < _TIE_MARGIN
        return np.where(on_tie, quantized, raw)

    def with_other_ties(self, raw: Array, quantized: Array) -> Array:
        """``quantized`` where sums in another order decide for the other neighbour of ``raw``."""
        position = self.grid.clipped_positions(raw)
        below, code = np.floor(position), np.rint(position)
        margin = _SUM_ERROR * value_range(raw) / self.grid.step
        other = self.grid.lower + (2 * below + 1 - code) * self.grid.step
        return np.where(np.abs(position - below - 0.5) < margin, other, quantized)

    def put(self, raw: Array, tensor: Array) -> None:
        """Write what the network's quantizer saw into the entry's input."""
        if not np.array_equal(self.entry_grid.step, self.grid.step):
            factor = self.entry_grid.step.astype(np.float64) / self.grid.step
            raw = (raw * factor).astype(np.float32)
        tensor.ravel()[slice(None) if self.index is None else self.index] = (
            raw.ravel() if self.index is None else raw
        )


def locate(ir: ov.Model, image: Array, device: str) -> list[ProbePoint]:
    """All probe points, in the order of the graph, for inputs of the shape of ``image``."""
    nodes = {node.get_friendly_name(): node for node in ir.get_ordered_ops()}
    marked = {name: found for name, n in nodes.items() if (found := marker_of(n)) is not None}
    exits = {name: nodes[name] for name, found in marked.items() if found.role in EXITS}
    main = {label: node.get_friendly_name() for label, node in main_nodes(nodes.values()).items()}
    encoders = {n.get_friendly_name(): n for n in nodes.values() if is_encoder(n)}
    above = {name: encoder_of(node) for name, node in exits.items()}
    rounded = {name: node and node.get_friendly_name() for name, node in above.items()}
    entries = [main[marked[name].label] for name in exits if rounded[name] is None]
    shapes = _input_shapes(ir, [*encoders, *entries], image)
    indices = _indices(
        ir, {n: e for n, e in rounded.items() if e is not None}, shapes, image, device
    )
    probe_points = []
    for name, node in exits.items():
        label = marked[name].label
        transposed = marked[name].role is Role.TRANSPOSED_EXIT
        encoder = rounded[name]
        if encoder is None:
            entry = main[label]
            grid = _elementwise_grid(nodes[entry])
            probe_points.append(
                ProbePoint(label, entry, name, transposed, grid, grid, shapes[entry], None)
            )
        else:
            index = indices.get(name)
            grids = _grids(node, encoders[encoder], shapes[encoder], index)
            shape = shapes[encoder]
            probe_points.append(ProbePoint(label, encoder, name, transposed, *grids, shape, index))
    return probe_points


def _input_shapes(ir: ov.Model, names: Sequence[str], image: Array) -> dict[str, tuple[int, ...]]:
    static = ir.clone()
    # Model.reshape would merge quantizers that compute the same.
    static.get_parameters()[0].set_partial_shape(ov.PartialShape(list(image.shape)))
    static.validate_nodes_and_infer_types()
    nodes = {node.get_friendly_name(): node for node in static.get_ops()}
    return {name: tuple(nodes[name].get_input_shape(0)) for name in names}


def _indices(
    ir: ov.Model,
    rounded: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    image: Array,
    device: str,
) -> dict[str, NDArray[np.int64]]:
    """Index maps by exit, where something lies between rounding and decoding."""
    clone = ir.clone()
    nodes = {node.get_friendly_name(): node for node in clone.get_ordered_ops()}
    parameters: dict[str, ov.Node] = {}
    outputs: dict[str, ov.Output] = {}
    for exit_name, encoder in rounded.items():
        if nodes[exit_name].get_type_name() == "FakeQuantize":
            continue
        codes = bytes_of(nodes[encoder]).output(0)
        if encoder not in parameters:
            if decoded_integers(nodes[exit_name]) == codes:
                continue
            if np.prod(shapes[encoder]) > _MOST_INDICES:
                raise ValueError(f"{encoder}: too large for a parity check, give a smaller input")
            parameters[encoder] = ops.parameter(codes.get_partial_shape(), np.float32)
            for target in codes.get_target_inputs():
                target.replace_source_output(parameters[encoder].output(0))
        outputs[exit_name] = decoded_integers(nodes[exit_name])
    if not outputs:
        return {}
    model = ov.Model(list(outputs.values()), [*clone.get_parameters(), *parameters.values()])
    order = [np.arange(np.prod(shapes[e]), dtype=np.float32).reshape(shapes[e]) for e in parameters]
    request = compile_ir(model, device).create_infer_request()
    request.infer([image, *order])
    found = zip(outputs, request.output_tensors, strict=True)
    return {name: tensor.data.astype(np.int64) for name, tensor in found}


def _grids(
    exit_node: ov.Node, encoder: ov.Node, shape: tuple[int, ...], index: NDArray[np.int64] | None
) -> tuple[ArrayGrid, ArrayGrid]:
    """Grid at the exit and at the entry; every value of an exit has the same."""
    bits = bits_of(encoder)
    last_code = 2**bits - 1
    bounds = [encoder.input_value(i).get_node().data for i in (1, 2, 3, 4)]
    first = 0 if index is None else int(index.flat[0])
    low, high, out_low, out_high = (np.broadcast_to(b, shape).flat[first] for b in bounds)
    if exit_node.get_type_name() == "Multiply":
        fine = exit_node.input_value(1).get_node().data
    else:
        integer, value = (exit_node.input_value(i).get_node().data for i in (2, 4))
        fine = value / integer
    step = np.asarray((out_high - out_low) / last_code * fine, np.float32)
    lower = np.asarray(out_low * fine, np.float32)
    entry_step = np.asarray((high - low) / np.float32(last_code), np.float32)
    if np.allclose(entry_step, step, rtol=1e-6):
        entry_step, low = step, lower
    return ArrayGrid(lower, step, bits), ArrayGrid(np.asarray(low), entry_step, bits)


def bits_of(encoder: ov.Node) -> int:
    """Of the codes that a node makes that rounds."""
    marker = marker_of(encoder)
    if marker is None or marker.bits is None:
        raise InputError(
            f"{encoder.get_friendly_name()} does not say its bits: export the IR again"
        )
    return marker.bits


def _elementwise_grid(entry: ov.Node) -> ArrayGrid:
    (divide,) = (port.get_node() for port in entry.output(0).get_target_inputs())
    lower, step = (node.input_value(1).get_node().data for node in (entry, divide))
    return ArrayGrid(lower, step, bits_of(entry))
