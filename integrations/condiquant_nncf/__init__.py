"""CondiQuant as an algorithm of NNCF, for PyTorch models and for ``ov.Model``."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from condiquant_plugin.errors import MissingExtraError

try:
    import nncf  # noqa: F401
except ModuleNotFoundError as error:
    raise MissingExtraError("condiquant_nncf", "NNCF", "nncf") from error

from condiquant_nncf.algorithms.condiquant import CondiQuant
from condiquant_nncf.algorithms.input_bounds import InputBounds
from condiquant_nncf.algorithms.learned_bounds import LearnedBoundsQuantization
from condiquant_nncf.algorithms.moments import InputMoments
from condiquant_nncf.algorithms.statistics import collect_moments
from condiquant_nncf.backends.torch import wrap
from condiquant_nncf.compress import CompressWeightsMode, compress_weights
from condiquant_nncf.configuration import QuantizationConfig
from condiquant_nncf.fake_quantizer import HookFakeQuantizer
from condiquant_nncf.layer import Layer
from condiquant_nncf.layers import feature_blocks, find_layers
from condiquant_nncf.network import (
    QuantizedNetwork,
    insert_quantizers,
    quantize_network,
    study_precision,
    trainable_weights,
)
from condiquant_nncf.quantize import (
    AdvancedCondiQuantParameters,
    create_condiquant_pipeline,
    quantize,
)
from condiquant_plugin.layerwise.scope import Scope
from condiquant_plugin.methods.compression.form import CompressedWeight
from condiquant_plugin.moved import forward

if TYPE_CHECKING:
    from condiquant_nncf.backends.openvino_weights import Signs


def write_compressed(
    model: Any, forms: Mapping[str, CompressedWeight], *, signs: "Signs" = "u2"
) -> dict[str, str]:
    """See :func:`condiquant_nncf.backends.openvino_weights.write_compressed`; OpenVINO is loaded here."""
    from condiquant_nncf.backends import openvino_weights

    return openvino_weights.write_compressed(model, forms, signs=signs)


def packed_products(model: Any) -> int:
    """See :func:`condiquant_nncf.backends.openvino_weights.packed_products`."""
    from condiquant_nncf.backends import openvino_weights

    return openvino_weights.packed_products(model)


def product_errors(
    forms: Mapping[str, CompressedWeight], *, signs: "Signs" = "u2"
) -> dict[str, float]:
    """See :func:`condiquant_nncf.backends.openvino_weights.product_errors`."""
    from condiquant_nncf.backends import openvino_weights

    return openvino_weights.product_errors(forms, signs=signs)


forward(
    __name__,
    {
        "attention": "backends.openvino_attention",
        "backend": "backends.choose",
        "calibration": "algorithms.pipeline",
        "condiquant": "algorithms.condiquant",
        "learned_bounds": "algorithms.learned_bounds",
        "openvino_backend": "backends.openvino",
        "quantization": "network",
        "quantize_model": "quantize",
        "statistics": "algorithms.statistics",
        "torch_backend": "backends.torch",
    },
)

__all__ = [
    "AdvancedCondiQuantParameters",
    "CompressWeightsMode",
    "CondiQuant",
    "HookFakeQuantizer",
    "InputBounds",
    "InputMoments",
    "Layer",
    "LearnedBoundsQuantization",
    "QuantizationConfig",
    "QuantizedNetwork",
    "Scope",
    "collect_moments",
    "compress_weights",
    "create_condiquant_pipeline",
    "feature_blocks",
    "find_layers",
    "insert_quantizers",
    "packed_products",
    "product_errors",
    "quantize",
    "quantize_network",
    "study_precision",
    "trainable_weights",
    "wrap",
    "write_compressed",
]
