import os
from pathlib import Path

import pytest
import skimage
import torch
from skimage.util import img_as_ubyte

import condiquant_basicsr
from condiquant_basicsr.data import images

torch.set_num_threads(2)

DAT_LIGHT = {
    "type": "DAT",
    "upscale": 4,
    "in_chans": 3,
    "img_size": 64,
    "img_range": 1.0,
    "depth": [18],
    "embed_dim": 60,
    "num_heads": [6],
    "expansion_factor": 2,
    "resi_connection": "3conv",
    "split_size": [8, 32],
    "upsampler": "pixelshuffledirect",
}
SMALL_SWINIR = {
    "type": "SwinIR",
    "upscale": 2,
    "in_chans": 3,
    "img_size": 16,
    "window_size": 8,
    "img_range": 1.0,
    "depths": [2],
    "embed_dim": 12,
    "num_heads": [2],
    "mlp_ratio": 2,
    "upsampler": "pixelshuffledirect",
    "resi_connection": "1conv",
}


@pytest.fixture
def data() -> Path:
    """Folder of test sets that a user has; nothing of it is part of the project."""
    folder = os.environ.get("CONDIQUANT_DATA")
    if not folder:
        pytest.skip("set CONDIQUANT_DATA to a folder with Set5, Set14, B100")
    return Path(folder)


@pytest.fixture
def swinir_section() -> dict:
    return dict(SMALL_SWINIR)


@pytest.fixture
def dat_section() -> dict:
    return dict(DAT_LIGHT)


@pytest.fixture
def swinir(swinir_section):
    torch.manual_seed(0)
    return condiquant_basicsr.build_network(swinir_section)


@pytest.fixture(scope="session")
def photograph():
    """Real photograph, uint8, shape (512, 512, 3), RGB."""
    return img_as_ubyte(skimage.data.astronaut())


@pytest.fixture
def photographs(tmp_path, photograph) -> Path:
    """Folder of three photographs of different sizes."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    for name, image in (
        ("astronaut", photograph[:200, :180]),
        ("chelsea", skimage.data.chelsea()),
        ("coffee", skimage.data.coffee()[:150, :220]),
    ):
        images.write_image(folder / f"{name}.png", images.to_tensor(image))
    return folder
