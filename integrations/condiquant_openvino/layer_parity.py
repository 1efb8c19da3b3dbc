"""Each quantized product alone: as in the IR, against float arithmetic on torch's tensors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import openvino as ov

from condiquant_openvino.cutting import FloatOperands, Pieces
from condiquant_openvino.quantizer_graphs import EXIT, PREFIX, PRODUCTS, TRANSPOSED, origin
from condiquant_openvino.sites import Array, Arrays
from condiquant_openvino.upscaling import infer


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
class _Layer:
    node: str
    operator: str
    operands: tuple[str | None, str | None]
    """Quantizer label of each operand; None for a float operand."""


def check_layers(
    ir: ov.Model,
    image: Array,
    entries: Arrays,
    exits: Arrays,
    weights: Arrays,
    max_layers: int | None,
    device: str,
) -> list[LayerParity]:
    """Run every quantized product cut out at its inputs before quantization.

    The cut graph is compiled at default properties plus f32. The reference multiplies the quantized
    tensors of torch in float, with no quantizer left in the graph for a compiler to rewrite.

    Args:
        image: input of the network; gives the operands that are not quantized.
        entries, exits: what the activation quantizers saw and gave in torch, by the name of the node
            that rounds and of the node that gives the values.
        weights: what the weight quantizers gave, by label.
    """
    layers = _quantized_products(ir)
    if max_layers is not None and len(layers) > max_layers:
        chosen = np.linspace(0, len(layers) - 1, max_layers).round().astype(int)
        layers = [layers[i] for i in chosen]
    floats = _float_operands(ir, image, layers, device)
    exported = Pieces(ir, entries, floats=floats)
    reference = Pieces(ir, exits, weights=weights, floats=floats)
    results = []
    for layer in layers:
        expected = reference.run_node(layer.node, image, device)
        difference = np.abs(exported.run_node(layer.node, image, device) - expected).max()
        name = " x ".join(label or "float" for label in layer.operands)
        error = float(difference) / value_range(expected)
        results.append(LayerParity(name, layer.operator, error))
    return results


def value_range(values: Array) -> float:
    """Maximum minus minimum, never 0."""
    return max(float(np.ptp(values)), float(np.finfo(np.float32).tiny))


def _quantized_products(ir: ov.Model) -> list[_Layer]:
    layers = []
    for node in ir.get_ordered_ops():
        if node.get_type_name() in PRODUCTS:
            operands = _quantizer_label(node.input_value(0)), _quantizer_label(node.input_value(1))
            if operands != (None, None):
                layers.append(_Layer(node.get_friendly_name(), node.get_type_name(), operands))
    return layers


def _quantizer_label(source: ov.Output) -> str | None:
    """Label of the quantizer whose values ``source`` has."""
    name = origin(source).get_friendly_name()
    if not name.startswith(PREFIX):
        return None
    return str(name.removesuffix(TRANSPOSED).removesuffix(EXIT).removeprefix(PREFIX))


def _float_operands(ir: ov.Model, image: Array, layers: list[_Layer], device: str) -> FloatOperands:
    """Values of the operands without quantizer, from the IR itself."""
    nodes = {node.get_friendly_name(): node for node in ir.get_ops()}
    sources = {}
    for layer in layers:
        for operand, label in enumerate(layer.operands):
            source = nodes[layer.node].input_value(operand)
            if label is None and source.get_node().get_type_name() != "Constant":
                sources[layer.node, operand] = source
    if not sources:
        return {}
    found = infer(ov.Model(list(sources.values()), ir.get_parameters()), [image], device)
    return dict(zip(sources, found, strict=True))
