"""Recondition, place fake quantizers, search their bounds: one network from float to quantized."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import nncf
import torch
from nncf.common.factory import ModelTransformerFactory
from nncf.common.graph.transformations.commands import TargetType
from nncf.common.graph.transformations.layout import TransformationLayout
from nncf.torch.function_hook.commands import PT2ConstUpdateCommand, PT2InsertionCommand
from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import GraphModelWrapper
from nncf.torch.graph.transformations.commands import PTTargetPoint
from torch import Tensor, nn

from condiquant_nncf.layers import Layer, Scope, find_layers, wrap
from condiquant_nncf.statistics import collect_moments
from condiquant_plugin import reconditioning
from condiquant_plugin.bounds import Side
from condiquant_plugin.errors import InputError
from condiquant_plugin.fake_quantizer import FakeQuantizer, fake_quantizers
from condiquant_plugin.grid import check_bits
from condiquant_plugin.reconditioning import (
    LayerProblem,
    LayerReport,
    ReconditioningConfig,
    default_config,
)

BoundsInputs = Literal["quantized", "float"]


@dataclass(frozen=True)
class QuantizationConfig:
    """What to quantize and how."""

    weight_bits: int = 4
    activation_bits: int = 4
    scope: Scope = "transformer"
    ignored_scope: nncf.IgnoredScope | None = None
    other_bits: int | None = None
    """Bits of weights and activations of the layers outside the scope; ``None`` leaves them float."""
    weight_granularity: Literal["tensor", "channel"] = "tensor"
    """Bounds per tensor (per row block of a fused qkv) as in 2DQuant, or per output channel."""
    activation_side: Side = "auto"
    zero_on_grid: bool = False
    """Zero is a level of every grid and weights are symmetric, as NPUs need it; costs accuracy."""
    bounds_inputs: BoundsInputs = "float"
    """Search activation bounds on the float network, or on one that is quantized up to that layer.

    ``"float"`` measured better at every bit-width, with and without reconditioning (docs/results.md).
    """
    recondition: ReconditioningConfig | Literal["auto"] | None = "auto"
    """``"auto"`` is the default of the activations' bit-width; ``None`` keeps the weights as trained."""

    def __post_init__(self) -> None:
        check_bits(self.weight_bits, "weight_bits")
        check_bits(self.activation_bits, "activation_bits")
        if self.other_bits is not None:
            check_bits(self.other_bits, "other_bits")

    def find_layers(self, wrapped: GraphModelWrapper) -> list[Layer]:
        """The layers to quantize; see :func:`condiquant_nncf.find_layers`."""
        others = self.other_bits is not None
        return find_layers(wrapped, self.scope, self.ignored_scope, others=others)

    def bits(self, layer: Layer) -> tuple[int, int]:
        """Bits of the weight and of the activations of a layer."""
        if layer.in_scope or self.other_bits is None:
            return self.weight_bits, self.activation_bits
        return self.other_bits, self.other_bits


@dataclass(frozen=True)
class QuantizedNetwork:
    """A quantized network and how it came about."""

    model: nn.Module
    """The network with fake quantizers in NNCF's hooks; a normal module otherwise."""
    layers: list[Layer]
    reports: list[LayerReport]
    seconds: dict[str, float]


def trainable_weights(model: nn.Module, layers: Sequence[Layer]) -> list[nn.Parameter]:
    """Weights and biases of ``layers``."""
    names = [n for layer in layers for n in (layer.weight_name, layer.bias_name)]
    return [model.get_parameter(n) for n in names if n is not None]


def quantize_network(
    network: nn.Module,
    crops: Tensor,
    config: QuantizationConfig,
    *,
    bounds_crops: int = 32,
    batch_size: int = 4,
) -> QuantizedNetwork:
    """CondiQuant before distillation: recondition the weights, then search bounds.

    Args:
        network: float network, left untouched.
        crops: calibration inputs, ``(count, channels, height, width)``.
        bounds_crops: how many of them the bounds are searched on, in one batch.
        batch_size: crops in one forward pass while moments are collected.

    Raises:
        InputError: no crops; bits outside 2-8; a scope without layers; NaN or Inf anywhere.
    """
    if not len(crops):
        raise InputError("no calibration images: give at least one")
    seconds = {"gram": 0.0, "recondition": 0.0, "bounds": 0.0}
    wrapped = wrap(network, crops[:1])
    layers = config.find_layers(wrapped)
    scoped = [layer for layer in layers if layer.in_scope]
    if config.recondition is None:
        reports = _condition_numbers(wrapped.model, scoped)
    else:
        reports = _recondition(wrapped, scoped, crops, config, seconds, bounds_crops, batch_size)
    started = time.perf_counter()
    model = insert_quantizers(wrapped, layers, config)
    search_bounds(model, crops[:bounds_crops], inputs=config.bounds_inputs)
    seconds["bounds"] += time.perf_counter() - started
    return QuantizedNetwork(model, layers, reports, seconds)


def _recondition(
    wrapped: GraphModelWrapper,
    layers: Sequence[Layer],
    crops: Tensor,
    config: QuantizationConfig,
    seconds: dict[str, float],
    bounds_crops: int,
    batch_size: int,
) -> list[LayerReport]:
    """Replace the weights inside ``wrapped``."""
    settings = config.recondition
    if not isinstance(settings, ReconditioningConfig):
        settings = default_config(config.activation_bits)
    started = time.perf_counter()
    quantizers: Mapping[str, FakeQuantizer] | None = None
    if settings.objective == "least_squares":
        as_trained = wrap(wrapped.model, wrapped.example_input)
        quantized = insert_quantizers(as_trained, layers, config)
        search_bounds(quantized, crops[:bounds_crops], inputs=config.bounds_inputs)
        quantizers = input_quantizers(quantized)
    seconds["bounds"] += time.perf_counter() - started

    started = time.perf_counter()
    moments = collect_moments(wrapped, layers, crops.split(batch_size), quantizers)
    seconds["gram"] += time.perf_counter() - started

    started = time.perf_counter()
    weighted = [layer for layer in layers if layer.weight_name is not None]
    problems = [
        LayerProblem(
            layer.name,
            wrapped.model.get_parameter(str(layer.weight_name)),
            None if layer.bias_name is None else wrapped.model.get_parameter(layer.bias_name),
            moments[layer.name],
            layer.geometry,
            layer.row_blocks,
        )
        for layer in weighted
    ]
    solutions = reconditioning.recondition(problems, settings)
    layout = TransformationLayout()
    for layer, solution in zip(weighted, solutions, strict=True):
        layout.register(PT2ConstUpdateCommand(layer.weight_node, solution.weight))
        if layer.bias_node is not None and solution.bias is not None:
            layout.register(PT2ConstUpdateCommand(layer.bias_node, solution.bias))
    ModelTransformerFactory.create(wrapped).transform(layout)
    seconds["recondition"] += time.perf_counter() - started
    return [solution.report for solution in solutions]


def _condition_numbers(model: nn.Module, layers: Sequence[Layer]) -> list[LayerReport]:
    reports = []
    for layer in layers:
        if layer.weight_name is not None:
            weight = model.get_parameter(layer.weight_name)
            reports.append(
                reconditioning.unchanged(layer.name, weight, layer.geometry, layer.row_blocks)
            )
    return reports


def insert_quantizers(
    wrapped: GraphModelWrapper, layers: Sequence[Layer], config: QuantizationConfig
) -> nn.Module:
    """Put a fake quantizer on every weight, layer input and product operand; bounds are yet to come.

    Returns:
        The model inside ``wrapped``. A quantizer's ``name`` is the layer's with ``.weight``, ``.input``
        or, for a product, ``.input0`` and ``.input1``.
    """
    layout = TransformationLayout()
    for layer in layers:
        weight_bits, activation_bits = config.bits(layer)
        for port in layer.activation_ports:
            suffix = "input" if layer.weight_node is not None else f"input{port}"
            quantizer = FakeQuantizer(
                activation_bits,
                "activation" if layer.weight_node is not None else "operand",
                side=config.activation_side,
                name=f"{layer.name}.{suffix}",
                zero_on_grid=config.zero_on_grid,
            )
            target = PTTargetPoint(
                TargetType.OPERATOR_PRE_HOOK, layer.node.node_name, input_port_id=port
            )
            layout.register(PT2InsertionCommand([target], quantizer))
        if layer.weight_node is not None:
            weight = wrapped.model.get_parameter(str(layer.weight_name))
            axis = 1 if layer.geometry.kind == "conv_transpose2d" else 0
            per_channel = config.weight_granularity == "channel"
            quantizer = FakeQuantizer(
                weight_bits,
                "weight",
                row_blocks=weight.shape[axis] if per_channel else layer.row_blocks,
                axis=axis,
                name=f"{layer.name}.weight",
                zero_on_grid=config.zero_on_grid,
            )
            target = PTTargetPoint(
                TargetType.OPERATOR_POST_HOOK, layer.weight_node.node_name, input_port_id=0
            )
            layout.register(PT2InsertionCommand([target], quantizer))
    model: nn.Module = ModelTransformerFactory.create(wrapped).transform(layout).model
    return model


@torch.no_grad()
def search_bounds(model: nn.Module, crops: Tensor, *, inputs: BoundsInputs = "float") -> None:
    """DOBI for every fake quantizer in one forward pass over ``crops``."""
    quantizers = list(fake_quantizers(model).values())
    for quantizer in quantizers:
        quantizer.search_on_next_input = True
        quantizer.enabled = inputs == "quantized"
    model(crops)
    for quantizer in quantizers:
        quantizer.enabled = True


def input_quantizers(model: nn.Module) -> dict[str, FakeQuantizer]:
    """Input quantizer of every layer with a weight, by layer name."""
    named = {q.name: q for q in fake_quantizers(model).values()}
    return {n.removesuffix(".input"): q for n, q in named.items() if n.endswith(".input")}
