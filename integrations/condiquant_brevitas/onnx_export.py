"""Export to ONNX: QONNX for every grid, QCDQ for those that standard operators can hold."""

from __future__ import annotations

import os
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from brevitas.proxy import ActQuantProxyFromInjector, WeightQuantProxyFromInjector
from torch import Tensor, nn

from condiquant_brevitas.moments_hook import has_weight_quantizer
from condiquant_brevitas.tensor_quant import LearnedBoundsQuant
from condiquant_plugin.errors import InputError, MissingExtraError
from condiquant_plugin.files import check_writable, replacing

_PROXIES = (ActQuantProxyFromInjector, WeightQuantProxyFromInjector)
_BITS = 8


def export_qonnx(
    model: nn.Module, example_input: Tensor, path: str | os.PathLike[str], **arguments: Any
) -> None:
    """Write a model as QONNX, which holds every grid: its zero points are floats.

    Args:
        model: calibrated model with Brevitas layers; it stays as it is.
        example_input: what the graph is traced with.
        path: the file to write.
        **arguments: of ``torch.onnx.export``, such as ``opset_version`` or ``dynamic_axes``.

    Raises:
        InputError: activations that no data has calibrated, or a folder that cannot be written.
        MissingExtraError: ``onnx`` or ``onnxoptimizer`` is missing.

    Example:
        >>> export_qonnx(model, torch.rand(1, 3, 64, 64), "model.onnx")
    """
    _export("export_qonnx", _calibrated_copy(model), example_input, path, arguments)


def export_qcdq(
    model: nn.Module, example_input: Tensor, path: str | os.PathLike[str], **arguments: Any
) -> None:
    """Write a model as ONNX with QuantizeLinear, Clip and DequantizeLinear.

    Their zero points are integers. Learned bounds have such at 8 bits, where activations begin at zero
    (ReLU, softmax), and with ``zero_on_grid=True``; upstream would round the others, so they are refused.

    Args:
        model, example_input, path, arguments: as in :func:`export_qonnx`.

    Raises:
        InputError: as in :func:`export_qonnx`, or naming the first quantizer that does not fit.
        MissingExtraError: ``onnx`` or ``onnxoptimizer`` is missing.
    """
    copied = _calibrated_copy(model)
    for name, proxy in copied.named_modules():
        if type(proxy) in _PROXIES and proxy.is_quant_enabled:
            _check_qcdq(name, proxy)
    _export("export_onnx_qcdq", copied, example_input, path, arguments)


def _calibrated_copy(model: nn.Module) -> nn.Module:
    """A copy, since a failed export leaves a model in export mode."""
    for name, module in model.named_modules():
        if not isinstance(module, LearnedBoundsQuant) or module.quantizer.kind == "weight":
            continue  # weights are their own data
        if not module.init_done:
            raise InputError(
                f"{_quantizer_name(name)} has no bounds yet: run data through the model in "
                "calibration_mode before the export"
            )
    return deepcopy(model)


def _quantizer_name(name: str) -> str:
    return name.removesuffix(".tensor_quant").removesuffix(".fused_activation_quant_proxy")


def _check_qcdq(name: str, proxy: Any) -> None:
    bits, zero_point = int(proxy.bit_width()), proxy.zero_point()
    if bits > _BITS:
        raise InputError(f"QCDQ holds at most {_BITS} bits, {name} has {bits}: use export_qonnx")
    lowest = -(2 ** (_BITS - 1)) if proxy.is_signed else 0
    fits = (zero_point == zero_point.round()).logical_and(
        zero_point.clamp(lowest, lowest + 2**_BITS - 1) == zero_point
    )
    if not fits.all():
        raise InputError(
            f"QCDQ holds integer zero points, {name} has {float(zero_point[~fits][0]):.4g}: use "
            "export_qonnx or OpenVINO, which keep it, or quantize with zero_on_grid=True"
        )


def _put_on_grid(layer: Any) -> None:
    """So that no reader's arithmetic moves a weight between two levels to the other one."""
    if isinstance(layer.weight_quant.tensor_quant, LearnedBoundsQuant):
        layer.weight.copy_(layer.quant_weight().value)


def _export(
    function: str,
    model: nn.Module,
    example_input: Tensor,
    path: str | os.PathLike[str],
    arguments: dict[str, Any],
) -> None:
    try:
        import onnx  # noqa: F401
        import onnxoptimizer  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtraError("the export", str(error.name), "brevitas-export") from error
    from brevitas import export  # imports onnx

    check_writable(Path(path).parent)
    with torch.no_grad():
        for layer in filter(has_weight_quantizer, model.modules()):
            _put_on_grid(layer)
    with replacing(Path(path)) as temporary:
        getattr(export, function)(model, example_input, str(temporary), dynamo=False, **arguments)
