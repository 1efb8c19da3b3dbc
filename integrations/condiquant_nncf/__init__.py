"""CondiQuant for PyTorch models through NNCF's graph, statistics and hooks."""

try:
    import nncf  # noqa: F401
except ImportError as error:
    raise ImportError(
        'condiquant_nncf needs NNCF: pip install "condiquant-plugin[nncf]"'
    ) from error

from condiquant_nncf.layers import Layer, Scope, feature_blocks, find_layers, wrap
from condiquant_nncf.quantization import (
    QuantizationConfig,
    QuantizedNetwork,
    insert_quantizers,
    quantize_network,
    trainable_weights,
)
from condiquant_nncf.statistics import collect_moments

__all__ = [
    "Layer",
    "QuantizationConfig",
    "QuantizedNetwork",
    "Scope",
    "collect_moments",
    "feature_blocks",
    "find_layers",
    "insert_quantizers",
    "quantize_network",
    "trainable_weights",
    "wrap",
]
