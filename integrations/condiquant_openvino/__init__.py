"""OpenVINO: packed 2-8 bit IR from a fake-quantized torch network, parity, latency, upscaling.

What needs torch is loaded when it is asked for: running an IR needs none.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from condiquant_plugin.errors import MissingExtraError

try:
    import openvino as _openvino  # noqa: F401
except ModuleNotFoundError as error:
    raise MissingExtraError("condiquant_openvino", "OpenVINO", "openvino") from error

from condiquant_plugin.moved import forward

forward(
    __name__,
    {
        "bisection": "parity.bisection",
        "compaction": "writing.passes.compaction",
        "comparison": "parity.example",
        "conversion": "writing.conversion",
        "cutting": "parity.cutting",
        "execution": "running.execution",
        "hoisting": "writing.passes.propagation",
        "inspection": "running.inspection",
        "instruction_sets": "running.instruction_sets",
        "joining": "writing.passes.joining",
        "latency": "running.latency",
        "layer_parity": "parity.layers",
        "overflow": "writing.overflow",
        "packing": "writing.packing",
        "preprocessing": "writing.preprocessing",
        "quantizer_graphs": "writing.quantizer_graphs",
        "rearranging": "writing.passes.rearranging",
        "saving": "running.reading",
        "separating": "writing.passes.separating",
        "simplification": "writing.passes.simplification",
        "simulation": "parity.simulation",
        "sites": "parity.probe_points",
        "upscaling": "running.upscaling",
    },
)

if TYPE_CHECKING:
    from condiquant_openvino.parity.check import check_parity
    from condiquant_openvino.parity.layers import LayerParity
    from condiquant_openvino.parity.outcome import Parity
    from condiquant_openvino.running.execution import LayerExecution, layer_executions
    from condiquant_openvino.running.inspection import inspect
    from condiquant_openvino.running.latency import compare_latency
    from condiquant_openvino.running.reading import read_ir, read_metadata, set_metadata
    from condiquant_openvino.running.upscaling import Upscaler
    from condiquant_openvino.writing.conversion import convert, convert_beside_float
    from condiquant_openvino.writing.packing import pack
    from condiquant_openvino.writing.passes.compaction import halve
    from condiquant_openvino.writing.preprocessing import U8Parity, check_u8_parity, take_u8_nhwc
    from condiquant_openvino.writing.saving import save

_PLACES = {
    "LayerExecution": "running.execution",
    "LayerParity": "parity.layers",
    "Parity": "parity.outcome",
    "U8Parity": "writing.preprocessing",
    "Upscaler": "running.upscaling",
    "check_parity": "parity.check",
    "check_u8_parity": "writing.preprocessing",
    "compare_latency": "running.latency",
    "convert": "writing.conversion",
    "convert_beside_float": "writing.conversion",
    "halve": "writing.passes.compaction",
    "inspect": "running.inspection",
    "layer_executions": "running.execution",
    "pack": "writing.packing",
    "read_ir": "running.reading",
    "read_metadata": "running.reading",
    "save": "writing.saving",
    "set_metadata": "running.reading",
    "take_u8_nhwc": "writing.preprocessing",
}

__all__ = [
    "LayerExecution",
    "LayerParity",
    "Parity",
    "U8Parity",
    "Upscaler",
    "check_parity",
    "check_u8_parity",
    "compare_latency",
    "convert",
    "convert_beside_float",
    "halve",
    "inspect",
    "layer_executions",
    "pack",
    "read_ir",
    "read_metadata",
    "save",
    "set_metadata",
    "take_u8_nhwc",
]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
