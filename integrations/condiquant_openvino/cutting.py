"""Cutting an IR at its quantizers, to run stretches of it on the tensors that torch saw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import openvino as ov
import openvino.opset13 as ops
from numpy.typing import NDArray

from condiquant_openvino.quantizer_graphs import EXIT, PREFIX
from condiquant_openvino.upscaling import infer

Array = NDArray[np.float32]
Arrays = Mapping[str, Array]
FloatOperands = Mapping[tuple[str, int], Array]
_TIE_MARGIN = 1e-3


@dataclass(frozen=True)
class ActivationGrid:
    """Grid of an activation quantizer as the IR holds it."""

    lower: Array
    step: Array
    last_code: int

    def codes(self, x: Array) -> Array:
        """Codes of ``x``."""
        return np.rint(((x - self.lower) / self.step).clip(0, self.last_code))

    def away_from_ties(self, raw: Array, quantized: Array) -> Array:
        """``raw`` with what lies on a rounding tie moved to the value that torch chose for it."""
        distance = np.abs(raw - quantized) / self.step
        return np.where(np.abs(distance - 0.5) < _TIE_MARGIN, quantized, raw)


def activation_grids(ir: ov.Model) -> dict[str, ActivationGrid]:
    """Grids by label, in the order of the graph."""
    grids = {}
    for node in filter(_is_entry, ir.get_ordered_ops()):
        label = node.get_friendly_name().removeprefix(PREFIX)
        if node.get_type_name() == "FakeQuantize":
            lower, upper = (node.input_value(i).get_node().data for i in (1, 2))
            last_code = node.get_attributes()["levels"] - 1
            grids[label] = ActivationGrid(lower, (upper - lower) / np.float32(last_code), last_code)
        else:
            (divide,) = (port.get_node() for port in node.output(0).get_target_inputs())
            (clamp,) = (port.get_node() for port in divide.output(0).get_target_inputs())
            lower, step = (n.input_value(1).get_node().data for n in (node, divide))
            grids[label] = ActivationGrid(lower, step, int(clamp.get_attributes()["max"]))
    return grids


def quantized_tensors(ir: ov.Model, image: Array, device: str) -> dict[str, Array]:
    """What every activation quantizer gives, by label."""
    clone = ir.clone()
    nodes = {node.get_friendly_name(): node for node in clone.get_ordered_ops()}
    exits = {
        name.removeprefix(PREFIX): nodes.get(name + EXIT, node).output(0)
        for name, node in nodes.items()
        if _is_entry(node)
    }
    results = [port.get_node().input_value(0) for port in clone.outputs]
    model = ov.Model([*results, *exits.values()], clone.get_parameters())
    found = infer(model, [image], device)[len(results) :]
    return dict(zip(exits, found, strict=True))


def _is_entry(node: ov.Node) -> bool:
    """Whether a node is the first of an activation quantizer."""
    name = node.get_friendly_name()
    return (
        node.get_type_name() in {"FakeQuantize", "Subtract"}
        and name.startswith(PREFIX)
        and not name.endswith(EXIT)
    )


class Pieces:
    """A copy of an IR that takes the tensors at its activation quantizers as inputs.

    Args:
        values: what to feed at each quantizer, by label.
        before_quantizers: cut in front of the quantizers; else behind them, with the weights of
            ``values`` in the place of the packed ones, so that nothing quantized is left.
        floats: more inputs to cut, by node name and operand.
    """

    def __init__(
        self,
        ir: ov.Model,
        values: Arrays,
        *,
        before_quantizers: bool,
        floats: FloatOperands | None = None,
    ) -> None:
        self._model = ir.clone()
        self._nodes = {node.get_friendly_name(): node for node in self._model.get_ordered_ops()}
        self._values: dict[str, Array] = {}
        self._parameters: dict[str, ov.Node] = {}
        self._sources: dict[str, ov.Output] = {}
        for name, node in self._nodes.items():
            if _is_entry(node):
                label = name.removeprefix(PREFIX)
                source, targets = node.input_value(0), {node.input(0)}
                if not before_quantizers:
                    source = self._nodes.get(name + EXIT, node).output(0)
                    targets = source.get_target_inputs()
                self._cut(label, source, targets, values[label])
            elif not before_quantizers and name.startswith(PREFIX) and not name.endswith(EXIT):
                weight = values[name.removeprefix(PREFIX)].reshape(list(node.get_output_shape(0)))
                for port in node.output(0).get_target_inputs():
                    port.replace_source_output(ops.constant(weight).output(0))
        for (name, operand), value in (floats or {}).items():
            port = self._nodes[name].input(operand)
            self._cut(f"{name}:{operand}", port.get_source_output(), {port}, value)

    def _cut(self, key: str, source: ov.Output, targets: set[ov.Input], value: Array) -> None:
        parameter = ops.parameter(source.get_partial_shape(), np.float32)
        parameter.set_friendly_name(key)
        self._parameters[key], self._values[key] = parameter, value
        self._sources[key] = source
        for port in targets:
            port.replace_source_output(parameter.output(0))

    def run_node(self, name: str, device: str) -> Array:
        """Output of one node, computed from the cuts above it."""
        node = self._nodes[name]
        keys = self._cuts_above(node)
        piece = ov.Model([node.output(0)], [self._parameters[key] for key in keys])
        return infer(piece, [self._values[key] for key in keys], device)[0]

    def run_stretches(self, image: Array, device: str) -> tuple[Array, dict[str, Array]]:
        """Output of the network, and what arrives at every cut, each from the cuts above it."""
        results = [port.get_node().input_value(0) for port in self._model.outputs]
        outputs = [*results[:1], *self._sources.values()]
        inputs = [*self._model.get_parameters(), *self._parameters.values()]
        output, *found = infer(ov.Model(outputs, inputs), [image, *self._values.values()], device)
        return output, dict(zip(self._sources, found, strict=True))

    def _cuts_above(self, node: ov.Node) -> list[str]:
        keys, seen, pending = [], {node.get_name()}, [node]
        while pending:
            current = pending.pop()
            if current.get_friendly_name() in self._parameters:
                keys.append(current.get_friendly_name())
            for source in current.input_values():
                above = source.get_node()
                if above.get_name() not in seen:
                    seen.add(above.get_name())
                    pending.append(above)
        return keys
