"""CondiQuant for Brevitas: a mode that reconditions weights, and quantizers with learned bounds."""

from condiquant_plugin.errors import MissingExtraError

try:
    import brevitas  # noqa: F401
except ModuleNotFoundError as error:
    raise MissingExtraError("condiquant_brevitas", "Brevitas", "brevitas") from error

import condiquant_brevitas.pickling  # noqa: F401
from condiquant_brevitas.compression_mode import weight_compression_mode
from condiquant_brevitas.fake_quantizers import to_fake_quantizers
from condiquant_brevitas.mode import condiquant_mode
from condiquant_brevitas.moments_hook import LayerReconditioner
from condiquant_brevitas.network import feature_blocks, quantize_sr, trainable_weights
from condiquant_brevitas.onnx_export import export_qcdq, export_qonnx
from condiquant_brevitas.quantizers import (
    LearnedBoundsActPerTensor,
    LearnedBoundsActPerTensorOneSided,
    LearnedBoundsWeightPerChannel,
    LearnedBoundsWeightPerTensor,
)
from condiquant_brevitas.tensor_quant import LearnedBoundsQuant
from condiquant_plugin.moved import forward, renamed

forward(
    __name__,
    {
        "condiquant": "mode",
        "layer": "moments_hook",
        "super_resolution": "network",
    },
)

__getattr__ = renamed(__name__, {"CondiQuant": "LayerReconditioner"})

__all__ = [
    "LayerReconditioner",
    "LearnedBoundsActPerTensor",
    "LearnedBoundsActPerTensorOneSided",
    "LearnedBoundsQuant",
    "LearnedBoundsWeightPerChannel",
    "LearnedBoundsWeightPerTensor",
    "condiquant_mode",
    "export_qcdq",
    "export_qonnx",
    "feature_blocks",
    "quantize_sr",
    "to_fake_quantizers",
    "trainable_weights",
    "weight_compression_mode",
]
