"""Recondition, place fake quantizers, search their bounds: one torch network in memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import GraphModelWrapper
from torch import Tensor, nn

from condiquant_nncf.algorithms.input_bounds import check_weights, create_quantizers
from condiquant_nncf.backends.choose import get_algo_backend
from condiquant_nncf.backends.torch import prepare
from condiquant_nncf.configuration import QuantizationConfig
from condiquant_nncf.layer import Layer
from condiquant_plugin.calibration import Calibration, calibrate
from condiquant_plugin.errors import InputError, check_count
from condiquant_plugin.intake import image_batch, plain_float_copy
from condiquant_plugin.layerwise import distributed
from condiquant_plugin.layerwise.problem import LayerReport
from condiquant_plugin.layerwise.quantized import QuantizedLayer
from condiquant_plugin.sensitivity import WIDTHS, PrecisionStudy
from condiquant_plugin.uniform.fake_quantizer import fake_quantizers
from condiquant_plugin.uniform.sampling import BOUNDS_CROPS


@dataclass(frozen=True)
class QuantizedNetwork:
    """A quantized network and how it came about."""

    model: nn.Module
    """The network with fake quantizers in NNCF's hooks; a normal module otherwise."""
    layers: list[Layer]
    calibration: Calibration

    @property
    def reports(self) -> list[LayerReport]:
        """What became of the weights of the layers in scope."""
        return self.calibration.reports

    @property
    def seconds(self) -> dict[str, float]:
        """By stage."""
        return self.calibration.seconds


def trainable_weights(model: nn.Module, layers: Sequence[Layer]) -> list[nn.Parameter]:
    """Weights and biases of ``layers``, buffers aside."""
    names = [n for layer in layers for n in (layer.weight_name, layer.bias_name)]
    parameters = dict(model.named_parameters())
    return [parameters[n] for n in dict.fromkeys(names) if n in parameters]


@torch.inference_mode(False)
def quantize_network(
    network: nn.Module,
    crops: Tensor,
    config: QuantizationConfig,
    *,
    bounds_crops: int = BOUNDS_CROPS,
    batch_size: int = 1,
    held_out: Tensor | None = None,
) -> QuantizedNetwork:
    """CondiQuant before distillation: search bounds, recondition the weights and round them.

    Under ``torch.distributed`` all processes call this with the same network, crops and config. They
    share the work, and each returns the same model, bit for bit.

    Args:
        network: float network, left untouched; see :func:`condiquant_plugin.intake.plain_float_copy`.
        crops: calibration inputs, ``(count, channels, height, width)``, or what
            :func:`condiquant_plugin.intake.image_batch` makes them of.
        bounds_crops: how many of them the bounds are searched on.
        batch_size: crops in one forward pass. More than one may be faster on a GPU, but takes another
            sample for the bounds.
        held_out: inputs on which ``recondition="auto"`` chooses; without them every eighth of ``crops``.

    Raises:
        InputError: no crops, or of a size that the network does not take; bits
            outside 2-8; counts below 1; a scope without layers; NaN or Inf anywhere; a network
            that is quantized already; raised in all processes if in one.
        DistributedError: another process ended or failed.
    """
    check_count("bounds_crops", bounds_crops)
    check_count("batch_size", batch_size)
    with distributed.failing_together("reading the network"):
        takes = partial(_takes, network)
        images = image_batch(crops, takes=takes).split(1)
        unseen = () if held_out is None else image_batch(held_out, takes=takes).split(1)
        _check_runs(plain_float_copy(network), images[0])
        wrapped = prepare(network, images[0])
    return calibrate_wrapped(
        wrapped,
        images,
        config,
        bounds_images=bounds_crops,
        batch_size=batch_size,
        unseen=unseen,
    )


def study_precision(
    network: nn.Module,
    crops: Tensor,
    config: QuantizationConfig,
    *,
    bounds_crops: int = BOUNDS_CROPS,
    widths: Sequence[int] = WIDTHS,
) -> PrecisionStudy:
    """The network calibrated at several widths, to find what each layer needs.

    Args:
        network: float network, left untouched.
        crops: as :func:`quantize_network` takes them.
        config: which layers, and how; its bits are not used.
        bounds_crops: how many of the crops bounds are searched on, at each width.
        widths: bits, each from 2 to 8.

    Raises:
        InputError: as :func:`quantize_network`.
    """
    check_count("bounds_crops", bounds_crops)
    images = image_batch(crops, takes=partial(_takes, network)).split(1)
    _check_runs(plain_float_copy(network), images[0])
    backend = get_algo_backend(prepare(network, images[0]))
    layers = config.find_layers(backend)
    check_weights(backend, layers)
    outside = [layer.name for layer in layers if not layer.in_scope]
    model = backend.insert_quantizers(list(create_quantizers(backend, layers, config))).model
    return PrecisionStudy(
        model,
        quantized_layers(model, layers),
        images,
        config,
        bounds_images=bounds_crops,
        widths=widths,
        fixed={name: config.bits(name, in_scope=False) for name in outside},
    )


def calibrate_wrapped(
    wrapped: GraphModelWrapper,
    images: Sequence[Any],
    config: QuantizationConfig,
    **arguments: Any,
) -> QuantizedNetwork:
    """:func:`condiquant_plugin.calibration.calibrate` of the network inside ``wrapped``, in place."""
    with distributed.failing_together("reading the network"):
        backend = get_algo_backend(wrapped)
        backend.check_is_float()
        layers = config.find_layers(backend)
        check_weights(backend, layers)
    model: nn.Module = backend.insert_quantizers(
        list(create_quantizers(backend, layers, config, transforms=True))
    ).model
    found = calibrate(model, quantized_layers(model, layers), images, config, **arguments)
    return QuantizedNetwork(model, layers, found)


def quantized_layers(model: nn.Module, layers: Sequence[Layer]) -> list[QuantizedLayer]:
    """Layers in scope with a weight as the core sees them, those that share one as one."""
    tensors = dict(chain(model.named_parameters(), model.named_buffers()))
    quantizers = {q.name: q for q in fake_quantizers(model).values()}
    uses: dict[str, list[Layer]] = defaultdict(list)
    for layer in layers:
        if layer.in_scope and layer.weight_name is not None:
            uses[layer.weight_name].append(layer)
    return [
        QuantizedLayer(
            first.name,
            tensors[weight],
            tensors[first.bias_name] if first.bias_name else None,
            quantizers[f"{first.name}.weight"],
            tuple(
                quantizers[layer.input_name(layer.activation_ports[0])]
                for layer in (first, *others)
            ),
            first.geometry,
            first.row_blocks,
            first.weight_transposed,
            bool(first.transposed_inputs),
        )
        for weight, (first, *others) in uses.items()
    ]


@torch.no_grad()
def _takes(network: nn.Module, x: Tensor) -> bool:
    """Whether the network gives for ``x`` something of as many axes: means of colours add one."""
    try:
        output = plain_float_copy(network)(x)
    except Exception:
        return False
    return isinstance(output, Tensor) and output.ndim == x.ndim


@torch.no_grad()
def _check_runs(network: nn.Module, crop: Tensor) -> None:
    try:
        network(crop)
    except RuntimeError as error:
        height, width = crop.shape[-2:]
        raise InputError(
            f"{type(network).__name__} cannot run on crops of {width}x{height}"
            f" ({' '.join(str(error).split())}): give crops of a size that it takes"
        ) from error


def insert_quantizers(
    wrapped: GraphModelWrapper, layers: Sequence[Layer], config: QuantizationConfig
) -> nn.Module:
    """Put a fake quantizer on every weight, layer input and product operand; bounds are yet to come.

    Returns:
        The model inside ``wrapped``. A quantizer's ``name`` is the layer's with ``.weight``, ``.input``
        or, for a product, ``.input0`` and ``.input1``.
    """
    backend = get_algo_backend(wrapped)
    placed = list(create_quantizers(backend, list(layers), config, transforms=True))
    model: nn.Module = backend.insert_quantizers(placed).model
    return model
