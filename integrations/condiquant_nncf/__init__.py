"""CondiQuant as an algorithm of NNCF, for PyTorch models and for ``ov.Model``."""

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
from condiquant_plugin.moved import forward

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
    "create_condiquant_pipeline",
    "feature_blocks",
    "find_layers",
    "insert_quantizers",
    "quantize",
    "quantize_network",
    "study_precision",
    "trainable_weights",
    "wrap",
]
