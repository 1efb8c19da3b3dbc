"""Recondition, place fake quantizers, search their bounds: one torch network in memory."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import nncf
import torch
from nncf.quantization.algorithms.pipeline import Pipeline
from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import GraphModelWrapper
from torch import Tensor, nn

from condiquant_nncf.algorithms.condiquant import recondition
from condiquant_nncf.algorithms.learned_bounds import (
    InputBounds,
    LearnedBoundsQuantization,
    create_quantizers,
)
from condiquant_nncf.algorithms.statistics import collect_moments
from condiquant_nncf.backends.base import CondiQuantAlgoBackend
from condiquant_nncf.backends.choose import get_algo_backend
from condiquant_nncf.backends.torch import prepare, wrap
from condiquant_nncf.configuration import QuantizationConfig
from condiquant_nncf.layer import Layer
from condiquant_plugin.errors import InputError, check_count
from condiquant_plugin.intake import image_batch, plain_float_copy
from condiquant_plugin.layerwise import distributed
from condiquant_plugin.layerwise.problem import LayerReport
from condiquant_plugin.methods.condiquant import reconditioning
from condiquant_plugin.methods.condiquant.reconditioning import ReconditioningConfig
from condiquant_plugin.uniform.fake_quantizer import FakeQuantizer, fake_quantizers, search_bounds
from condiquant_plugin.uniform.sampling import BOUNDS_CROPS


@dataclass(frozen=True)
class QuantizedNetwork:
    """A quantized network and how it came about."""

    model: nn.Module
    """The network with fake quantizers in NNCF's hooks; a normal module otherwise."""
    layers: list[Layer]
    reports: list[LayerReport]
    seconds: dict[str, float]


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
) -> QuantizedNetwork:
    """CondiQuant before distillation: recondition the weights, then search bounds.

    Under ``torch.distributed`` all processes call this with the same network, crops and config. They
    share the work, and each returns the same model, bit for bit.

    Args:
        network: float network, left untouched; see :func:`condiquant_plugin.intake.plain_float_copy`.
        crops: calibration inputs, ``(count, channels, height, width)``, or what
            :func:`condiquant_plugin.intake.image_batch` makes them of.
        bounds_crops: how many of them the bounds are searched on.
        batch_size: crops in one forward pass. More than one may be faster on a GPU, but takes another
            sample for the bounds and rounds otherwise than :func:`create_condiquant_pipeline`.

    Raises:
        InputError: no crops, or of a size that the network does not take; bits
            outside 2-8; counts below 1; a scope without layers; NaN or Inf anywhere; a network
            that is quantized already; raised in all processes if in one.
        DistributedError: another process ended or failed.
    """
    check_count("bounds_crops", bounds_crops)
    check_count("batch_size", batch_size)
    seconds = {"gram": 0.0, "recondition": 0.0, "bounds": 0.0}
    with distributed.failing_together("reading the network"):
        crops = image_batch(crops, takes=partial(_takes, network))
        _check_runs(plain_float_copy(network), crops[:1])
        wrapped = prepare(network, crops[:1])
        layers = config.find_layers(wrapped)
    bounds_batches = crops[:bounds_crops].split(batch_size)
    scoped = [layer for layer in layers if layer.in_scope]
    settings = config.reconditioning()
    if settings is None:
        with distributed.failing_together("reading the weights"):
            reports = _condition_numbers(get_algo_backend(wrapped), scoped)
    else:
        quantizers: Mapping[str, FakeQuantizer] | None = None
        if settings.needs_quantized_inputs:
            quantizers = _input_bounds(wrapped, scoped, config, bounds_batches, seconds)
        reports = _recondition(
            wrapped, scoped, crops.split(batch_size), settings, quantizers, seconds
        )
    model = _with_bounds(wrapped, layers, config, bounds_batches, seconds)
    return QuantizedNetwork(model, layers, reports, seconds)


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


def _with_bounds(
    wrapped: GraphModelWrapper,
    layers: Sequence[Layer],
    config: QuantizationConfig,
    batches: Sequence[Tensor],
    seconds: dict[str, float],
) -> nn.Module:
    """Put quantizers into ``wrapped``, with bounds that are the same in all processes."""
    started = time.perf_counter()
    with distributed.failing_together("searching bounds"):
        if config.bounds_inputs == "quantized":
            model = insert_quantizers(wrapped, layers, config)
            search_bounds(model, torch.cat(list(batches)), quantized_inputs=True)
        else:
            algorithm = LearnedBoundsQuantization(config, subset_size=len(batches))
            model = Pipeline([[algorithm]]).run(wrapped, nncf.Dataset(batches)).model
    distributed.broadcast_bounds(model)
    seconds["bounds"] += time.perf_counter() - started
    return model


def _input_bounds(
    wrapped: GraphModelWrapper,
    layers: Sequence[Layer],
    config: QuantizationConfig,
    batches: Sequence[Tensor],
    seconds: dict[str, float],
) -> dict[str, FakeQuantizer]:
    """Input quantizer of every layer with a weight, by layer name; ``wrapped`` stays as it is."""
    if config.bounds_inputs == "quantized":
        as_trained = wrap(wrapped.model, wrapped.example_input)
        return input_quantizers(_with_bounds(as_trained, layers, config, batches, seconds))
    started = time.perf_counter()
    with distributed.failing_together("searching bounds"):
        algorithm = InputBounds(config, subset_size=len(batches))
        Pipeline([[algorithm]]).run(wrapped, nncf.Dataset(batches))
    distributed.broadcast_bounds(nn.ModuleList(algorithm.quantizers.values()))
    seconds["bounds"] += time.perf_counter() - started
    return algorithm.quantizers


def _recondition(
    wrapped: GraphModelWrapper,
    layers: Sequence[Layer],
    batches: Sequence[Tensor],
    settings: ReconditioningConfig,
    quantizers: Mapping[str, FakeQuantizer] | None,
    seconds: dict[str, float],
) -> list[LayerReport]:
    """Replace the weights inside ``wrapped``."""
    started = time.perf_counter()
    moments = collect_moments(wrapped, layers, batches, quantizers, settings.moments_dtype)
    seconds["gram"] += time.perf_counter() - started
    started = time.perf_counter()
    _, reports = recondition(get_algo_backend(wrapped), layers, moments, settings, shared=True)
    seconds["recondition"] += time.perf_counter() - started
    return reports


def _condition_numbers(
    backend: CondiQuantAlgoBackend, layers: Sequence[Layer]
) -> list[LayerReport]:
    reports: list[LayerReport] = []
    for layer in layers:
        if layer.weight_name is not None and not layer.reuses_weight:
            weight = layer.rows_first(backend.weight(layer))
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
    backend = get_algo_backend(wrapped)
    placed = list(create_quantizers(backend, list(layers), config))
    model: nn.Module = backend.insert_quantizers(placed).model
    return model


def input_quantizers(model: nn.Module) -> dict[str, FakeQuantizer]:
    """Input quantizer of every layer with a weight, by layer name."""
    named = {q.name: q for q in fake_quantizers(model).values()}
    return {n.removesuffix(".input"): q for n, q in named.items() if n.endswith(".input")}
