"""Cutting an IR at its quantizers, to run stretches of it on the tensors that torch saw."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops

from condiquant_openvino.markers import EXITS, arriving, is_encoder, main_nodes, role_of
from condiquant_openvino.parity.probe_points import Array, ArrayGrid, Arrays, ProbePoint, bits_of
from condiquant_openvino.running.reading import core_of_process

FloatOperands = Mapping[tuple[str, int], Array]
OUTPUT = "the output"
_LEAST_SKIPPED, _MOST_IN_A_ROW = 4, 4


@dataclass(frozen=True)
class Runner:
    """A device with exactly these properties, all others at their defaults."""

    device: str
    properties: Mapping[str, Any]
    kept: dict[Hashable, ov.CompiledModel] | None = field(default=None, repr=False, compare=False)
    """Compiled networks by key; None to keep none."""

    def keeping(self) -> Runner:
        """One that compiles once what is run for several images."""
        return replace(self, kept={})

    def compile(self, model: ov.Model, key: Hashable = None) -> ov.CompiledModel:
        """Compile, or give what was compiled for the same key; none is kept without key."""
        kept = {} if self.kept is None or key is None else self.kept
        if key not in kept:
            core, properties = core_of_process(), dict(self.properties)
            kept[key] = core.compile_model(model, self.device, properties)
        return kept[key]

    def infer(self, model: ov.Model, inputs: list[Array], key: Hashable = None) -> list[Array]:
        """Every result of one run, in order, also where two results are the same tensor.

        They are the request's own tensors, which it is not used for again: copies would double the peak.
        """
        request = self.compile(model, key).create_infer_request()
        request.infer(inputs, share_inputs=True)
        return [tensor.data for tensor in request.output_tensors]


def quantized_tensors(
    ir: ov.Model, probe_points: Sequence[ProbePoint], image: Array, runner: Runner
) -> dict[str, Array]:
    """What every activation quantizer gives, by label."""
    clone = ir.clone()
    nodes = {node.get_friendly_name(): node for node in clone.get_ordered_ops()}
    results = [port.get_node().input_value(0) for port in clone.outputs]
    exits = [nodes[point.exit].output(0) for point in probe_points]
    key = tuple(point.exit for point in probe_points)
    found = runner.infer(ov.Model([*results, *exits], clone.get_parameters()), [image], key)
    return {point.label: v for point, v in zip(probe_points, found[len(results) :], strict=True)}


def entry_tensors(probe_points: Sequence[ProbePoint], raw: Arrays) -> Arrays:
    """The inputs of the nodes that round, by name, put together from what the quantizers saw."""
    tensors = {point.entry: np.zeros(point.entry_shape, np.float32) for point in probe_points}
    for point in probe_points:
        point.put(raw[point.label], tensors[point.entry])
    return tensors


def cut_sets(ir: ov.Model, probe_points: Sequence[ProbePoint]) -> list[list[str]]:
    """Two sets of the nodes that round, in order, to cut an IR at the one and at the other.

    A value on a tie rounds either way, and what follows goes astray: cuts keep it near. The more that
    stays whole between them, the more of what the plugin fuses is as without. The first set has what a
    residual path leads to past four levels of quantizers or more, so attention stays whole; and of
    a chain of quantizers every fifth. The second has all others: with them cut, nothing that goes
    astray gets back to a residual path.
    """
    entry_of = {point.exit: point.entry for point in probe_points}
    entries = set(entry_of.values())
    image = ""
    level, in_a_row = {image: 0}, {image: 0}
    first: list[str] = []
    second: list[str] = []
    reached: dict[str, frozenset[str]] = {}
    for node in ir.get_ordered_ops():
        name = node.get_friendly_name()
        above = frozenset[str]().union(
            *(reached[value.get_node().get_friendly_name()] for value in node.input_values())
        )
        if name in entries:
            level[name] = 1 + max((level[n] for n in above), default=0)
            in_a_row[name] = 1 + max((in_a_row[n] for n in above), default=0)
            skipped = level[name] - min((level[n] for n in above), default=0)
            if skipped >= _LEAST_SKIPPED or in_a_row[name] > _MOST_IN_A_ROW:
                in_a_row[name] = 0
                first.append(name)
            else:
                second.append(name)
        if node.get_type_name() == "Parameter":
            above = frozenset({image})
        elif node.get_type_name() == "ShapeOf":
            above = frozenset()
        reached[name] = frozenset({entry_of[name]}) if name in entry_of else above
    return [chosen for chosen in (first, second) if chosen] or [[]]


def _bounds(encoder: ov.Node) -> list[Array]:
    return [encoder.input_value(i).get_node().data for i in (1, 2, 3, 4)]


def _integers(encoder: ov.Node, x: Array) -> Array:
    """What an encoder makes of ``x``."""
    lower, upper, lowest, highest = _bounds(encoder)
    bits = bits_of(encoder)
    last_code = np.float32(2**bits - 1)
    codes = ArrayGrid(lower, (upper - lower) / last_code, bits).codes(x)
    return np.asarray(codes * ((highest - lowest) / last_code) + lowest, np.float32)


class Pieces:
    """A copy of an IR that takes the tensors at its activation quantizers as inputs.

    ``nodes`` has its operators by name, in order.

    Args:
        values: tensors by name of the node to cut: the input of a node that rounds, or the output of
            an exit.
        weights: what to put in the place of the packed weights, by label, so that nothing
            quantized is left; none for the IR as it is.
        floats: more inputs to cut, by node name and operand.
    """

    def __init__(
        self,
        ir: ov.Model,
        values: Arrays,
        *,
        weights: Arrays | None = None,
        floats: FloatOperands | None = None,
    ) -> None:
        self._model = ir.clone()
        self.nodes = {node.get_friendly_name(): node for node in self._model.get_ordered_ops()}
        self._values: dict[str, Array] = {}
        self._parameters: dict[str, ov.Node] = {}
        self._sources: dict[str, ov.Output] = {}
        for name, value in values.items():
            node = self.nodes[name]
            if role_of(node) in EXITS:
                self._cut(name, node.output(0), node.output(0).get_target_inputs(), value)
            elif is_encoder(node) and any(bound.size > 1 for bound in _bounds(node)):
                # Behind no kernel the plugin refuses bounds per channel: its integers are put in.
                targets = node.output(0).get_target_inputs()
                self._cut(name, arriving(node), targets, _integers(node, value))
            else:
                self._cut(name, arriving(node), {node.input(0)}, value)
        main = main_nodes(self.nodes.values())
        for label, value in (weights or {}).items():
            node = main[label]
            constant = ops.constant(value.reshape(list(node.get_output_shape(0))))
            for port in node.output(0).get_target_inputs():
                port.replace_source_output(constant.output(0))
        for (name, operand), value in (floats or {}).items():
            port = self.nodes[name].input(operand)
            self._cut(f"{name}:{operand}", port.get_source_output(), {port}, value)

    def _cut(self, key: str, source: ov.Output, targets: set[ov.Input], value: Array) -> None:
        parameter = ops.parameter(source.get_partial_shape(), np.float32)
        parameter.set_friendly_name("cut/" + key)
        self._parameters[key], self._values[key] = parameter, value
        self._sources[key] = source
        for port in targets:
            port.replace_source_output(parameter.output(0))

    def source(self, place: str) -> ov.Output:
        """What arrives at a node that rounds, or at ``OUTPUT``."""
        if place == OUTPUT:
            return self._model.get_results()[0].input_value(0)
        return self._sources.get(place, arriving(self.nodes[place]))

    def run(
        self, ports: Sequence[ov.Output], image: Array, runner: Runner, key: Hashable = None
    ) -> list[Array]:
        """Values of ``ports``, each computed from the cuts above it.

        Args:
            key: of these ports of an IR cut like this, to compile it once for all images.
        """
        cuts = self._cuts_above([port.get_node() for port in ports])
        inputs = [*self._model.get_parameters(), *(self._parameters[cut] for cut in cuts)]
        values = [image, *(self._values[cut] for cut in cuts)]
        return runner.infer(ov.Model(list(ports), inputs), values, key and (key, *cuts))

    def _cuts_above(self, nodes: Sequence[ov.Node]) -> list[str]:
        keys, seen, pending = [], {node.get_name() for node in nodes}, list(nodes)
        names = {parameter.get_name(): key for key, parameter in self._parameters.items()}
        while pending:
            current = pending.pop()
            if current.get_name() in names:
                keys.append(names[current.get_name()])
            for source in current.input_values():
                above = source.get_node()
                if above.get_name() not in seen:
                    seen.add(above.get_name())
                    pending.append(above)
        return keys
