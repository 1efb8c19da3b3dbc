"""The whole Brevitas flow for super-resolution networks, before distillation."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from brevitas import nn as qnn
from brevitas.graph.quantize import layerwise_quantize
from brevitas.graph.utils import get_output_channel_dim
from brevitas.nn.mixin.base import QuantLayerMixin
from torch import Tensor, inference_mode, nn

from condiquant_brevitas.fake_quantizers import input_quantizer, watching_float_inputs
from condiquant_brevitas.layers import QUANT_LAYERS, Layer, find_layers
from condiquant_brevitas.moments_hook import has_weight_quantizer
from condiquant_brevitas.products import ProductOperand, insert_stubs, rule_name
from condiquant_brevitas.quantizers import (
    LearnedBoundsActPerTensor,
    LearnedBoundsWeightPerChannel,
    LearnedBoundsWeightPerTensor,
)
from condiquant_plugin import distillation
from condiquant_plugin.calibration import calibrate
from condiquant_plugin.configuration import QuantizationConfig, check_reconditioning
from condiquant_plugin.errors import InputError, check_count, check_finite
from condiquant_plugin.intake import (
    image_batch,
    plain_float_copy,
    rebuilt_parameters,
    refuse_rebuilt,
)
from condiquant_plugin.layerwise.blocks import module_geometry
from condiquant_plugin.layerwise.precision import check_rules_match
from condiquant_plugin.layerwise.problem import fused_blocks
from condiquant_plugin.layerwise.quantized import QuantizedLayer
from condiquant_plugin.uniform.bits import FLOAT_BITS
from condiquant_plugin.uniform.fake_quantizer import FakeQuantizer
from condiquant_plugin.uniform.sampling import BOUNDS_CROPS

_WEIGHT_QUANTIZERS = {
    "tensor": LearnedBoundsWeightPerTensor,
    "channel": LearnedBoundsWeightPerChannel,
}


@inference_mode(False)
def quantize_sr(
    model: nn.Module,
    calibration: Tensor,
    config: QuantizationConfig | None = None,
    *,
    bounds_crops: int = BOUNDS_CROPS,
    batch_size: int = 1,
    held_out: Tensor | None = None,
    name_blacklist: Collection[str] = (),
    **settings: Any,
) -> nn.Module:
    """CondiQuant before distillation: stubs at attention products, bounds, reconditioning, rounding.

    Layers become Brevitas' ``QuantLinear``, ``QuantConv2d`` and ``QuantConvTranspose2d``; the factors of a
    product pass ``QuantIdentity`` modules in ``product_stubs`` of the module that computes it; a fused
    attention is computed as its two products.

    Args:
        model (Module): Float network, left untouched; see
            :func:`condiquant_plugin.intake.plain_float_copy`.
        calibration (Tensor): Low-resolution crops, ``(count, channels, height, width)``, or what
            :func:`condiquant_plugin.intake.image_batch` makes them of.
        config (Optional, QuantizationConfig): What to quantize and how. Default: all defaults of
            :class:`condiquant_plugin.configuration.QuantizationConfig`
        bounds_crops (int): How many crops the bounds are searched on. Default: 32
        batch_size (int): Crops in one forward pass. More than one may be faster on a GPU, but takes another
            sample for the bounds. Default: 1
        held_out (Optional, Tensor): Crops on which ``recondition="auto"`` chooses. Default: every eighth
            of the calibration
        name_blacklist (Collection[str]): Layers, or modules with all they hold, to leave float.
        **settings: Keys of the config by name, such as ``weight_bits=3``; ``reconditioning`` is its
            ``recondition``.

    Returns:
        The quantized network, with ``report``: a :class:`LayerReport` by name for every layer in scope
        that has a weight, and ``calibration``: what was chosen, and why.

    Raises:
        InputError: no crops; bits outside 2-8; counts below 1; a scope without layers; NaN or Inf
            anywhere; a network that is quantized already, or does not return one image; a layer in scope
            that cannot be, such as nn.MultiheadAttention.

    Example:
        >>> model = quantize_sr(swinir, crops, weight_bits=3, activation_bits=3)
        >>> distill(model, swinir, crops, held_out, config, trainable_weights=trainable_weights(model))
    """
    if "reconditioning" in settings:
        settings["recondition"] = check_reconditioning(
            settings.pop("reconditioning"), "reconditioning"
        )
    config = (config or QuantizationConfig()).changed(settings)
    if getattr(config, "ignored_scope", None) is not None:
        raise InputError("ignored_scope is matched against NNCF's graph: use name_blacklist")
    if config.bounds_inputs != "float":
        raise InputError('bounds_inputs="quantized" is for NNCF\'s quantize_network(): use "float"')
    config.check_no_transform("is for NNCF's quantize_network()")
    check_count("bounds_crops", bounds_crops)
    check_count("batch_size", batch_size)
    calibration = image_batch(calibration)
    unseen = () if held_out is None else image_batch(held_out).split(1)
    model = plain_float_copy(model)
    _check_is_float(model)
    rebuilt = rebuilt_parameters(model, lambda network: network(calibration[:1]))
    others = config.other_bits is not None
    layers = find_layers(
        model, calibration[:1], config.scope, others=others, name_blacklist=name_blacklist
    )
    if config.layers:
        every = find_layers(
            model, calibration[:1], config.scope, others=True, name_blacklist=name_blacklist
        )
        inside, every_name = ([rule_name(layer.name) for layer in each] for each in (layers, every))
        check_rules_match(config.layers, inside, every_name, config.scope)
    layers = config.quantized_of(layers, lambda la: rule_name(la.name), lambda la: not la.product)
    for layer in layers:
        refuse_rebuilt(layer.name, f"{layer.name}.weight", rebuilt, "put it in name_blacklist")
    outside = {layer.name for layer in layers if not layer.in_scope}

    insert_stubs(model, [layer.product for layer in layers if layer.product])
    weights = {
        "bit_width": lambda _, name: config.bits(name, name not in outside).weight,
        "name": _label("weight"),
        "zero_on_grid": config.zero_on_grid,
        "overflow": config.overflow,
    }
    if config.weight_granularity == "tensor":
        weights["row_blocks"] = lambda layer, name: fused_blocks(name, _rows(layer))

    def input_bits(name: str) -> int:
        return config.bits(rule_name(name), name not in outside).activation

    inputs = {
        "bit_width": lambda _, name: input_bits(name),
        "quant": lambda _, name: (
            None if input_bits(name) == FLOAT_BITS else LearnedBoundsActPerTensor
        ),
        "name": _label("input"),
        "zero_on_grid": config.zero_on_grid,
        "overflow": config.overflow,
        "side": config.activation_side,
    }
    weight_quantizer = _WEIGHT_QUANTIZERS[config.weight_granularity]
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    model = _with_quantizers(model, layers, weight_quantizer, weights, inputs)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained.get(name, True))
    scoped = list(dict.fromkeys(la.name for la in layers if la.in_scope and not la.product))
    for layer in layers:  # before they spoil the inputs of others
        if not layer.product:
            check_finite(_layer(model, layer.name).weight, f"the weight of {layer.name}")
    with watching_float_inputs([_layer(model, name) for name in scoped]):
        found = calibrate(
            model,
            [_quantized_layer(model, name) for name in scoped],
            calibration.split(1),
            config,
            bounds_images=bounds_crops,
            batch_size=batch_size,
            unseen=unseen,
        )
    model.report = {report.name: report for report in found.reports}  # type: ignore[assignment]
    model.calibration = found  # type: ignore[assignment]
    return model


def trainable_weights(model: nn.Module) -> list[nn.Parameter]:
    """Weights and biases of the quantized layers, for :func:`condiquant_plugin.distillation.distill`."""
    layers = [module for module in model.modules() if has_weight_quantizer(module)]
    parameters = (p for layer in layers for p in layer.parameters(recurse=False))
    return list(dict.fromkeys(parameters))


def feature_blocks(model: nn.Module) -> list[str]:
    """Names of the blocks that hold the quantized layers; see the core's ``feature_blocks``."""
    names = [name for name, module in model.named_modules() if has_weight_quantizer(module)]
    return distillation.feature_blocks(model, names)


def _check_is_float(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, QuantLayerMixin | FakeQuantizer):
            place = name or type(module).__name__
            raise InputError(f"{place} is quantized already: give the float network")


def _rows(layer: Any) -> int:
    return int(layer.weight.shape[get_output_channel_dim(layer)])


def _label(suffix: str) -> Callable[[nn.Module, str], str]:
    return lambda _, name: f"{name}.{suffix}"


def _with_quantizers(
    model: nn.Module,
    layers: Sequence[Layer],
    weight_quantizer: type[LearnedBoundsWeightPerTensor],
    weights: Mapping[str, Any],
    inputs: Mapping[str, Any],
) -> nn.Module:
    """Brevitas' layers instead of ``layers`` and of all stubs; the settings are those of injectors."""
    settings = {
        "weight_quant": weight_quantizer,
        **{f"weight_{key}": value for key, value in weights.items()},
        **{f"input_{key}": value for key, value in inputs.items()},
    }
    layer_map = {plain: (quantized, settings) for plain, quantized in QUANT_LAYERS.items()}
    operand = {**inputs, "name": lambda _, name: name, "kind": "operand"}
    operand["act_quant"] = operand.pop("quant")
    layer_map[ProductOperand] = qnn.QuantIdentity, operand
    chosen = {layer.name for layer in layers}
    left = [
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if type(module) in QUANT_LAYERS and name not in chosen
    ]
    return layerwise_quantize(model, layer_map, name_blacklist=left)


def _layer(model: nn.Module, name: str) -> Any:
    """The layer of a name, whose attributes depend on its kind."""
    return model.get_submodule(name)


def _quantized_layer(model: nn.Module, name: str) -> QuantizedLayer:
    layer = _layer(model, name)
    return QuantizedLayer(
        name,
        layer.weight,
        layer.bias,
        layer.weight_quant.tensor_quant.quantizer,
        (input_quantizer(layer),),
        module_geometry(layer),
        fused_blocks(name, _rows(layer)) if isinstance(layer, nn.Linear) else 1,
    )
