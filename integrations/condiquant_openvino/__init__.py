"""OpenVINO: packed 2-8 bit IR from a fake-quantized torch network, parity, latency, upscaling."""

try:
    import openvino as _openvino  # noqa: F401
except ImportError as error:
    raise ImportError(
        'condiquant_openvino needs OpenVINO: pip install "condiquant-plugin[openvino]"'
    ) from error

from condiquant_openvino.compaction import halve
from condiquant_openvino.conversion import convert
from condiquant_openvino.execution import LayerExecution, layer_executions
from condiquant_openvino.inspection import inspect
from condiquant_openvino.latency import compare_latency
from condiquant_openvino.packing import pack
from condiquant_openvino.parity import LayerParity, Parity, check_parity
from condiquant_openvino.preprocessing import U8Parity, check_u8_parity, take_u8_nhwc
from condiquant_openvino.saving import read_ir, read_metadata, save, set_metadata
from condiquant_openvino.upscaling import Upscaler

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
