"""BasicSR as a host: networks, weights, images, data sets and metrics of super-resolution."""

from condiquant_plugin.errors import MissingExtraError

try:
    from condiquant_basicsr import compatibility

    compatibility.heal()
    import basicsr  # noqa: F401
    import spandrel  # noqa: F401
except ModuleNotFoundError as error:
    raise MissingExtraError("condiquant_basicsr", "BasicSR", "basicsr") from error

from condiquant_basicsr.binarized import BiDRNSR
from condiquant_basicsr.checkpoints import load_state_dict, read_checkpoint
from condiquant_basicsr.data.datasets import (
    Pair,
    TestImage,
    calibration_crops,
    calibration_pairs,
    test_pairs,
)
from condiquant_basicsr.data.images import matlab_downscale, read_image, write_image
from condiquant_basicsr.data.metrics import evaluate, evaluate_pair, psnr
from condiquant_basicsr.data.training_data import check_dataset, training_crops, validation_pairs
from condiquant_basicsr.models.condiquant import CondiQuantModel
from condiquant_basicsr.models.distilled import DistilledSRModel
from condiquant_basicsr.models.quantized_base import QuantizedModel
from condiquant_basicsr.networks import (
    build_network,
    folded,
    input_channels,
    upscale,
)
from condiquant_basicsr.own_networks import code_file, is_own
from condiquant_basicsr.sizes import check_crop_size, network_scale, pad_multiple
from condiquant_basicsr.value_range import bare, in_range
from condiquant_basicsr.weights import load_network, resolve
from condiquant_plugin.moved import forward

forward(
    __name__,
    {
        "condiquant_model": "models.condiquant",
        "datasets": "data.datasets",
        "images": "data.images",
        "metrics": "data.metrics",
        "training_data": "data.training_data",
    },
)

__all__ = [
    "BiDRNSR",
    "CondiQuantModel",
    "DistilledSRModel",
    "Pair",
    "QuantizedModel",
    "TestImage",
    "bare",
    "build_network",
    "calibration_crops",
    "calibration_pairs",
    "check_crop_size",
    "check_dataset",
    "code_file",
    "evaluate",
    "evaluate_pair",
    "folded",
    "in_range",
    "input_channels",
    "is_own",
    "load_network",
    "load_state_dict",
    "matlab_downscale",
    "network_scale",
    "pad_multiple",
    "psnr",
    "read_checkpoint",
    "read_image",
    "resolve",
    "test_pairs",
    "training_crops",
    "upscale",
    "validation_pairs",
    "write_image",
]
