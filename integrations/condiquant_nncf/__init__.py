"""CondiQuant as an algorithm of NNCF, for PyTorch models and for ``ov.Model``."""

try:
    import nncf  # noqa: F401
except ImportError as error:
    raise ImportError(
        'condiquant_nncf needs NNCF: pip install "condiquant-plugin[nncf]"'
    ) from error

from condiquant_nncf.condiquant import CondiQuant
from condiquant_nncf.configuration import QuantizationConfig
from condiquant_nncf.fake_quantizer import HookFakeQuantizer
from condiquant_nncf.layers import Layer, feature_blocks, find_layers
from condiquant_nncf.learned_bounds import InputBounds, LearnedBoundsQuantization
from condiquant_nncf.quantization import (
    QuantizedNetwork,
    insert_quantizers,
    quantize_network,
    trainable_weights,
)
from condiquant_nncf.quantize_model import (
    AdvancedCondiQuantParameters,
    create_condiquant_pipeline,
    quantize,
)
from condiquant_nncf.statistics import collect_moments
from condiquant_nncf.torch_backend import wrap
from condiquant_plugin.scope import Scope

__all__ = [
    "AdvancedCondiQuantParameters",
    "CondiQuant",
    "HookFakeQuantizer",
    "InputBounds",
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
    "trainable_weights",
    "wrap",
]
