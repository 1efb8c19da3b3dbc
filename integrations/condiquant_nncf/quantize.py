"""``quantize()`` with NNCF's arguments, and the pipeline that it runs."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any, Literal

import nncf
import torch
from nncf.common.logging import nncf_logger
from nncf.common.utils.backend import BackendType
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters
from nncf.quantization.algorithms.pipeline import PipelineStep
from nncf.quantization.algorithms.post_training.pipeline import create_ptq_pipeline
from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import GraphModelWrapper
from torch import nn

from condiquant_nncf.algorithms.condiquant import CondiQuant
from condiquant_nncf.algorithms.input_bounds import InputBounds
from condiquant_nncf.algorithms.learned_bounds import LearnedBoundsQuantization
from condiquant_nncf.algorithms.moments import InputMoments
from condiquant_nncf.algorithms.pipeline import CalibrationPipeline, SingleImages
from condiquant_nncf.backends.choose import check_backend
from condiquant_nncf.backends.torch import as_float32
from condiquant_nncf.backends.torch import prepare as wrap_checked
from condiquant_nncf.configuration import QuantizationConfig
from condiquant_nncf.network import QuantizedNetwork, calibrate_wrapped
from condiquant_plugin.calibration import Calibration, candidates
from condiquant_plugin.configuration import (
    Equalize,
    Granularity,
    Rounding,
    SoftmaxScale,
    Transform,
)
from condiquant_plugin.errors import InputError, check_count
from condiquant_plugin.forward_pass import run
from condiquant_plugin.layerwise.precision import LayerRule
from condiquant_plugin.layerwise.problem import LayerReport
from condiquant_plugin.layerwise.scope import Scope
from condiquant_plugin.methods.condiquant.reconditioning import ReconditioningConfig
from condiquant_plugin.uniform.bounds import Side
from condiquant_plugin.uniform.grid import Overflow
from condiquant_plugin.uniform.sampling import BOUNDS_CROPS

Then = Literal["bounds", "minmax"]
_BEFORE_INT8 = ReconditioningConfig(objective="condition", strength=3e-5, steps=30)
"""Stronger settings and least squares cost fidelity at 8 bits (docs/nncf.md)."""
_EMPTY = "calibration_dataset yields nothing: give at least one item"


@dataclass(frozen=True)
class AdvancedCondiQuantParameters:
    """What :func:`quantize` takes beyond NNCF's own arguments; see :class:`QuantizationConfig`."""

    scope: Scope | None = None
    """``None`` is ``"transformer"`` for ``model_type=TRANSFORMER`` and ``"all"`` otherwise."""
    recondition: ReconditioningConfig | Literal["auto"] | None = QuantizationConfig.recondition
    """``"auto"`` is the default of the bit-width, and a gentle one for ``then="minmax"``."""
    other_bits: int | None = QuantizationConfig.other_bits
    layers: Mapping[str, LayerRule] = field(default_factory=dict)
    """Only ``then="bounds"``: bits of single layers; see :class:`QuantizationConfig`."""
    weight_granularity: Granularity = QuantizationConfig.weight_granularity
    activation_side: Side = QuantizationConfig.activation_side
    zero_on_grid: bool | None = None
    """``None`` is whether ``target_device`` is the NPU."""
    overflow: Overflow = QuantizationConfig.overflow
    """Only ``then="bounds"``: NNCF's int8 has ``overflow_fix``."""
    equalize: Equalize = QuantizationConfig.equalize
    transform: Transform = QuantizationConfig.transform
    """Only ``then="bounds"`` of a torch model."""
    softmax_scale: SoftmaxScale = QuantizationConfig.softmax_scale
    """As ``transform``."""
    rounding: Rounding = QuantizationConfig.rounding
    """Only ``then="bounds"``."""
    nncf: AdvancedQuantizationParameters | None = None
    """NNCF's own, for ``then="minmax"``."""
    bounds_crops: int = BOUNDS_CROPS
    """Images that bounds are searched on, at most ``subset_size``."""


def create_condiquant_pipeline(
    config: QuantizationConfig | None = None,
    *,
    subset_size: int = 300,
    bounds_crops: int = BOUNDS_CROPS,
    then: Then | None = "bounds",
    **ptq_arguments: Any,
) -> CalibrationPipeline:
    """Steps: :class:`InputBounds`, :class:`InputMoments`, :class:`CondiQuant`, and what follows.

    Batches of images in the dataset pass the network one image at a time in our steps, as in
    :func:`quantize_network`, which is what ``then="bounds"`` makes of a copy of a torch model. Of an
    ``ov.Model`` ``recondition="auto"`` tries the weights as trained and least squares, and keeps what is
    closer to the float model on every eighth image, held out from the rest; least squares in sequence and
    equalized channels need a torch model.

    Args:
        config: for all steps; ``recondition=None`` leaves out :class:`CondiQuant`.
        subset_size: calibration images to use; NNCF's steps count items.
        bounds_crops: how many of them the bounds are searched on.
        then: ``"bounds"`` ends with :class:`LearnedBoundsQuantization`, ``"minmax"`` with the steps of
            NNCF's ``create_ptq_pipeline``, ``None`` with reconditioned float weights.
        ptq_arguments: for ``create_ptq_pipeline``.

    Raises:
        InputError: ``subset_size`` or ``bounds_crops`` below 1; what steps cannot do, for torch models
            either: ``transform``, ``softmax_scale``, ``bounds_inputs="quantized"``, moments of
            ``inputs="compressed"``.
    """
    check_count("subset_size", subset_size)
    check_count("bounds_crops", bounds_crops)
    config = config or QuantizationConfig()
    following: list[PipelineStep] = []
    if then == "minmax":
        following = create_ptq_pipeline(subset_size=subset_size, **ptq_arguments).pipeline_steps
    bounds = InputBounds(config, subset_size=min(subset_size, bounds_crops))
    moments = InputMoments(config, subset_size=subset_size, input_bounds=bounds)
    collecting: list[PipelineStep] = [[bounds], [moments]]

    def reconditioning(settings: ReconditioningConfig | None) -> list[PipelineStep]:
        if settings is None:
            return []
        own = replace(config, recondition=settings)
        given = {"input_bounds": bounds, "moments": moments} if collecting else {}
        return [[CondiQuant(own, subset_size=subset_size, **given)]]

    ways: dict[str, list[PipelineStep]]
    if then == "bounds":
        tried = candidates(config, sequences=False)
        if config.rounding == "nearest" and not any(each.settings for each in tried):
            collecting.pop()
        quantization = partial(LearnedBoundsQuantization, config, input_bounds=bounds)
        ways = {
            each.name: [
                *reconditioning(each.settings),
                [quantization(moments=moments if len(collecting) > 1 else None)],
            ]
            for each in tried
        }
    else:
        settings = config.reconditioning()
        if settings is None or not settings.needs_quantized_inputs:
            collecting = []
        ways = {"": reconditioning(settings)}

    def of_torch(model: GraphModelWrapper, images: nncf.Dataset) -> tuple[nn.Module, Calibration]:
        done = _of_torch(model, images, config, subset_size, bounds_crops)
        return done.model, done.calibration

    return CalibrationPipeline(
        collecting,
        ways,
        following,
        subset_size=subset_size,
        of_torch=of_torch if then == "bounds" else None,
    )


@torch.inference_mode(False)
def quantize(
    model: Any,
    calibration_dataset: nncf.Dataset,
    *,
    mode: nncf.QuantizationMode | None = None,
    preset: nncf.QuantizationPreset | None = None,
    target_device: nncf.TargetDevice = nncf.TargetDevice.ANY,
    subset_size: int = 300,
    fast_bias_correction: bool = True,
    model_type: nncf.ModelType | None = None,
    ignored_scope: nncf.IgnoredScope | None = None,
    advanced_parameters: AdvancedCondiQuantParameters
    | AdvancedQuantizationParameters
    | None = None,
    weight_bits: int = QuantizationConfig.weight_bits,
    activation_bits: int = QuantizationConfig.activation_bits,
    then: Then = "bounds",
    reports: list[LayerReport] | None = None,
) -> Any:
    """``nncf.quantize`` with CondiQuant in front; arguments, order and defaults are NNCF's.

    Args:
        model: ``torch.nn.Module`` or ``ov.Model``, left untouched.
        calibration_dataset: read two to five times, so not a generator.
        mode: only ``then="minmax"``.
        preset: only ``then="minmax"``.
        target_device: ``NPU`` puts zero on every grid; else only ``then="minmax"``.
        subset_size: calibration images to use; NNCF's int8 counts items.
        fast_bias_correction: only ``then="minmax"``.
        model_type: ``TRANSFORMER`` quantizes linear layers and the products of attention; ``None``
            quantizes these and convolutions, all but the first and the last layer.
        ignored_scope: layers to leave alone.
        advanced_parameters: ours, or NNCF's for ``then="minmax"``.
        weight_bits: 2 to 8; only ``then="bounds"``, as ``then="minmax"`` is 8 bits always.
        activation_bits: likewise.
        then: ``"bounds"`` places quantizers with learned bounds; ``"minmax"`` calls ``nncf.quantize``.
        reports: a list that gets one report per reconditioned layer.

    Returns:
        A new model. An ``ov.Model`` with ``then="bounds"`` simulates: pack it, or compile it with
        ``LP_TRANSFORMS_MODE=NO`` and ``INFERENCE_PRECISION_HINT=f32``.

    Raises:
        InputError: arguments, items of the dataset or a model that cannot be used.
        nncf.ValidationError: an ``ignored_scope`` that matches nothing.
    """
    if then not in ("bounds", "minmax"):
        raise InputError(f'then={then!r} is not known: use "bounds" or "minmax"')
    check_count("subset_size", subset_size)
    if isinstance(advanced_parameters, AdvancedCondiQuantParameters):
        check_count("bounds_crops", advanced_parameters.bounds_crops)
    stock = {
        "mode": mode,
        "preset": preset,
        "target_device": target_device,
        "subset_size": subset_size,
        "fast_bias_correction": fast_bias_correction,
        "model_type": model_type,
        "ignored_scope": ignored_scope,
    }
    ours = advanced_parameters
    if isinstance(ours, AdvancedQuantizationParameters):
        ours = AdvancedCondiQuantParameters(nncf=ours)
    ours = ours or AdvancedCondiQuantParameters()
    _warn_of_unused(then, stock, ours, weight_bits, activation_bits)
    if then == "minmax" and ours.recondition == "auto":
        ours = replace(ours, recondition=_BEFORE_INT8)
    npu = target_device is nncf.TargetDevice.NPU
    transformer = model_type is nncf.ModelType.TRANSFORMER
    config = QuantizationConfig(
        weight_bits if then == "bounds" else 8,
        activation_bits if then == "bounds" else 8,
        scope=ours.scope or ("transformer" if transformer else "all"),
        ignored_scope=ignored_scope,
        other_bits=ours.other_bits,
        layers=ours.layers,
        weight_granularity=ours.weight_granularity,
        activation_side=ours.activation_side,
        zero_on_grid=npu if ours.zero_on_grid is None else ours.zero_on_grid,
        overflow=ours.overflow,
        equalize=ours.equalize,
        transform=ours.transform,
        softmax_scale=ours.softmax_scale,
        rounding=ours.rounding,
        recondition=ours.recondition,
    )
    result, found = _run(model, calibration_dataset, config, then, subset_size, ours.bounds_crops)
    if reports is not None:
        reports.extend(found)
    if then == "minmax":
        return nncf.quantize(result, calibration_dataset, **stock, advanced_parameters=ours.nncf)
    return result


def _warn_of_unused(
    then: Then,
    stock: dict[str, Any],
    ours: AdvancedCondiQuantParameters,
    weight_bits: int,
    activation_bits: int,
) -> None:
    default, plain = AdvancedCondiQuantParameters(), QuantizationConfig()
    if then == "bounds":
        given = {
            "mode": stock["mode"] is not None,
            "preset": stock["preset"] is not None,
            "fast_bias_correction": not stock["fast_bias_correction"],
            "advanced_parameters of NNCF": ours.nncf is not None,
        }
    else:
        given = {
            f"weight_bits={weight_bits}": weight_bits not in (plain.weight_bits, 8),
            f"activation_bits={activation_bits}": activation_bits not in (plain.activation_bits, 8),
            "other_bits": ours.other_bits is not None,
            "layers": bool(ours.layers),
            "weight_granularity": ours.weight_granularity != default.weight_granularity,
            "overflow": ours.overflow != default.overflow,
            "equalize": ours.equalize != default.equalize,
            "transform": ours.transform != default.transform,
            "softmax_scale": ours.softmax_scale != default.softmax_scale,
            "rounding": ours.rounding != default.rounding,
        }
    unused = [name for name, is_given in given.items() if is_given]
    if unused:
        what = "" if then == "bounds" else ", which is NNCF's int8"
        nncf_logger.warning(f'not used by then="{then}"{what}: {", ".join(unused)}')


def _run(
    model: Any,
    dataset: nncf.Dataset,
    config: QuantizationConfig,
    then: Then,
    subset_size: int,
    bounds_crops: int,
) -> tuple[Any, list[LayerReport]]:
    """Our part: a quantized model, or for ``"minmax"`` a reconditioned one."""
    kind = check_backend(model)
    example = _first_item(dataset)
    if kind is BackendType.TORCH and then == "bounds":
        wrapped = wrap_checked(model, example)
        with _readable_errors():
            done = _of_torch(wrapped, dataset, config, subset_size, bounds_crops)
        return done.model, done.reports
    pipeline = create_condiquant_pipeline(
        config,
        subset_size=subset_size,
        bounds_crops=bounds_crops,
        then="bounds" if then == "bounds" else None,
    )
    with _readable_errors():
        if kind is BackendType.OPENVINO:
            from condiquant_nncf.backends.openvino import finish, prepare

            prepared = prepare(model, split_attention=then == "bounds")
            result = finish(pipeline.run(prepared, dataset), _described(config))
        else:
            result = pipeline.run(wrap_checked(model, example), _in_float32(dataset)).model
    return result, pipeline.reports


@torch.inference_mode(False)
def _of_torch(
    wrapped: GraphModelWrapper,
    dataset: nncf.Dataset,
    config: QuantizationConfig,
    subset_size: int,
    bounds_crops: int,
) -> QuantizedNetwork:
    """A torch model quantized in place, on single images as it takes them."""
    images = SingleImages(_in_float32(dataset)).get_inference_data()
    few = list(islice(images, subset_size))
    if not few:
        raise InputError(_EMPTY)
    return calibrate_wrapped(wrapped, few, config, bounds_images=bounds_crops)


def _in_float32(dataset: nncf.Dataset) -> nncf.Dataset:
    transform = dataset._transform_func or (lambda item: item)
    return nncf.Dataset(dataset._data_source, lambda item: as_float32(transform(item)))


def _described(config: QuantizationConfig) -> dict[str, Any]:
    names = "weight_bits activation_bits scope ignored_scope zero_on_grid overflow"
    return {name: getattr(config, name) for name in names.split()}


def _first_item(dataset: nncf.Dataset) -> Any:
    if not isinstance(dataset, nncf.Dataset):
        raise InputError(
            f"calibration_dataset is a {type(dataset).__name__}: put the items into nncf.Dataset(items)"
        )
    if isinstance(dataset._data_source, Iterator):
        raise InputError(
            "calibration_dataset is an iterator, which can be read once: give nncf.Dataset a list"
        )
    nothing = object()
    item = next(iter(dataset.get_inference_data()), nothing)
    if item is nothing:
        raise InputError(_EMPTY)
    return item


@contextmanager
def _readable_errors() -> Iterator[None]:
    """One line for an item that the model does not take."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        if not any(frame.name in ("infer", run.__name__) for frame in frames):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
        raise InputError(
            f"the model does not take an item of calibration_dataset: {reason}"
        ) from error
