"""Cutting an IR at its quantizers, to run stretches of it on the tensors that torch saw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import numpy as np
import openvino as ov
import openvino.opset13 as ops

from condiquant_openvino.quantizer_graphs import EXIT, PREFIX, is_encoder
from condiquant_openvino.sites import Array, Arrays, Site
from condiquant_openvino.upscaling import infer

FloatOperands = Mapping[tuple[str, int], Array]


def quantized_tensors(
    ir: ov.Model, sites: Sequence[Site], image: Array, device: str
) -> dict[str, Array]:
    """What every activation quantizer gives, by label."""
    clone = ir.clone()
    nodes = {node.get_friendly_name(): node for node in clone.get_ordered_ops()}
    results = [port.get_node().input_value(0) for port in clone.outputs]
    exits = [nodes[site.exit].output(0) for site in sites]
    found = infer(ov.Model([*results, *exits], clone.get_parameters()), [image], device)
    return {site.label: v for site, v in zip(sites, found[len(results) :], strict=True)}


def entry_tensors(sites: Sequence[Site], raw: Arrays) -> Arrays:
    """The inputs of the nodes that round, by name, put together from what the quantizers saw."""
    tensors = {site.entry: np.zeros(site.entry_shape, np.float32) for site in sites}
    for site in sites:
        site.put(raw[site.label], tensors[site.entry])
    return tensors


def _spell_out(encoder: ov.Node) -> None:
    """Bounds per channel as elementwise operators: behind no kernel, the plugin refuses them."""
    lower, upper, lowest, highest = (encoder.input_value(i) for i in (1, 2, 3, 4))
    if all(prod(bound.get_shape()) == 1 for bound in (lower, upper, lowest, highest)):
        return
    last_code = ops.constant(np.float32(encoder.get_attributes()["levels"] - 1))
    step = ops.divide(ops.subtract(upper, lower), last_code)
    fine = ops.divide(ops.subtract(highest, lowest), last_code)
    position = ops.divide(ops.subtract(encoder.input_value(0), lower), step)
    codes = ops.round(ops.minimum(ops.relu(position), last_code), "half_to_even")
    integers = ops.add(ops.multiply(codes, fine), lowest)
    for port in encoder.output(0).get_target_inputs():
        port.replace_source_output(integers.output(0))


class Pieces:
    """A copy of an IR that takes the tensors at its activation quantizers as inputs.

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
        self._nodes = {node.get_friendly_name(): node for node in self._model.get_ordered_ops()}
        self._values: dict[str, Array] = {}
        self._parameters: dict[str, ov.Node] = {}
        self._sources: dict[str, ov.Output] = {}
        for name, value in values.items():
            node = self._nodes[name]
            if EXIT in name:
                source, targets = node.output(0), node.output(0).get_target_inputs()
                self._cut(name, source, targets, value)
            else:
                self._cut(name, node.input_value(0), {node.input(0)}, value)
            if is_encoder(node):
                _spell_out(node)
        for label, value in (weights or {}).items():
            node = self._nodes[PREFIX + label]
            constant = ops.constant(value.reshape(list(node.get_output_shape(0))))
            for port in node.output(0).get_target_inputs():
                port.replace_source_output(constant.output(0))
        for (name, operand), value in (floats or {}).items():
            port = self._nodes[name].input(operand)
            self._cut(f"{name}:{operand}", port.get_source_output(), {port}, value)

    def _cut(self, key: str, source: ov.Output, targets: set[ov.Input], value: Array) -> None:
        parameter = ops.parameter(source.get_partial_shape(), np.float32)
        parameter.set_friendly_name("cut/" + key)
        self._parameters[key], self._values[key] = parameter, value
        self._sources[key] = source
        for port in targets:
            port.replace_source_output(parameter.output(0))

    def run_node(self, name: str, image: Array, device: str) -> Array:
        """Output of one node, computed from the cuts above it; ``image`` gives shapes only."""
        node = self._nodes[name]
        keys = self._cuts_above(node)
        inputs = [*self._model.get_parameters(), *(self._parameters[key] for key in keys)]
        values = [image, *(self._values[key] for key in keys)]
        return infer(ov.Model([node.output(0)], inputs), values, device)[0]

    def run_stretches(self, image: Array, device: str) -> tuple[Array, dict[str, Array]]:
        """Output of the network, and what arrives at every cut, each from the cuts above it."""
        results = [port.get_node().input_value(0) for port in self._model.outputs]
        outputs = [*results[:1], *self._sources.values()]
        inputs = [*self._model.get_parameters(), *self._parameters.values()]
        output, *found = infer(ov.Model(outputs, inputs), [image, *self._values.values()], device)
        return output, dict(zip(self._sources, found, strict=True))

    def _cuts_above(self, node: ov.Node) -> list[str]:
        keys, seen, pending = [], {node.get_name()}, [node]
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
