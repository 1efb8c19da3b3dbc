"""Each quantized product alone: as in the IR, against float arithmetic on torch's tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import openvino as ov

from condiquant_openvino.markers import PRODUCTS, constant_values, label_of, origin
from condiquant_openvino.parity.cutting import FloatOperands, Pieces, Runner
from condiquant_openvino.parity.example import Example
from condiquant_openvino.parity.probe_points import Array, value_range

F32 = {"INFERENCE_PRECISION_HINT": "f32"}
_AT_ONCE, _SUSPICIOUS = 16, 1e-6


@dataclass(frozen=True)
class LayerParity:
    """One quantized convolution or matrix product on the tensors torch saw."""

    name: str
    """Labels of the quantizers of its two operands, joined by " x "."""
    operator: str
    """OpenVINO type, as ``MatMul``."""
    error: float
    """Largest absolute difference over the value range of the layer's output."""


@dataclass(frozen=True)
class QuantizedProduct:
    """A quantized product of an IR."""

    node: str
    operator: str
    operands: tuple[str | None, str | None]
    """Quantizer label of each operand; None for a float operand."""

    @property
    def name(self) -> str:
        return " x ".join(label or "float" for label in self.operands)


def check_layers(
    ir: ov.Model, example: Example, runner: Runner, max_layers: int | None
) -> list[LayerParity]:
    """Run every quantized product cut out at its inputs before quantization.

    The reference multiplies the quantized tensors of torch in float32, with no quantizer left in the
    graph for a compiler to rewrite.
    """
    layers = quantized_products(ir.get_ordered_ops())
    if max_layers is not None and len(layers) > max_layers:
        chosen = np.linspace(0, len(layers) - 1, max_layers).round().astype(int)
        layers = [layers[i] for i in chosen]
    image, in_float = example.image, Runner(runner.device, F32)
    floats = _float_operands(ir, image, layers, in_float)
    exits = {point.exit: example.quantized[point.label] for point in example.probe_points}
    written = set(filter(None, map(label_of, ir.get_ops()))) - set(example.quantized)
    weights = {label: example.expected.quantized[label] for label in written}
    exported = Pieces(ir, example.entries, floats=floats)
    reference = Pieces(ir, exits, weights=weights, floats=floats)
    results = []
    for first in range(0, len(layers), _AT_ONCE):
        some = layers[first : first + _AT_ONCE]
        ports, float_ports = (
            [pieces.nodes[layer.node].output(0) for layer in some]
            for pieces in (exported, reference)
        )
        outputs = exported.run(ports, image, runner)
        references = reference.run(float_ports, image, in_float)
        for index, layer in enumerate(some):
            error = largest_error(outputs[index], references[index])
            if error > _SUSPICIOUS:  # with several outputs the plugin may overwrite one
                (output,) = exported.run([ports[index]], image, runner)
                (expected,) = reference.run([float_ports[index]], image, in_float)
                error = largest_error(output, expected)
            results.append(LayerParity(layer.name, layer.operator, error))
    return results


def largest_error(output: Array, expected: Array) -> float:
    """Absolute, over the value range of ``expected``."""
    return float(np.abs(output - expected).max()) / value_range(expected)


def quantized_products(nodes: Iterable[ov.Node]) -> list[QuantizedProduct]:
    """The products among ``nodes`` that have a quantized operand."""
    layers = []
    for node in nodes:
        if node.get_type_name() in PRODUCTS:
            first, second = (label_of(origin(node.input_value(operand))) for operand in (0, 1))
            if (first, second) != (None, None):
                name, operator = node.get_friendly_name(), node.get_type_name()
                layers.append(QuantizedProduct(name, operator, (first, second)))
    return layers


def _float_operands(
    ir: ov.Model, image: Array, layers: list[QuantizedProduct], runner: Runner
) -> FloatOperands:
    """Values of the operands without quantizer, from the IR itself."""
    nodes = {node.get_friendly_name(): node for node in ir.get_ops()}
    sources = {}
    for layer in layers:
        for operand, label in enumerate(layer.operands):
            source = nodes[layer.node].input_value(operand)
            if label is None and constant_values(source) is None:
                sources[layer.node, operand] = source
    if not sources:
        return {}
    found = runner.infer(ov.Model(list(sources.values()), ir.get_parameters()), [image])
    return dict(zip(sources, found, strict=True))
