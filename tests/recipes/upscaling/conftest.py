"""A real network, and a command line that keeps what it compiles to itself."""

import numpy as np
import pytest
import pyvips
import skimage.data

import realesrgan_ir
from condiquant_openvino import Upscaler


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Folder of Real-ESRGAN's compact network, four times larger, as a float IR."""
    return realesrgan_ir.export(tmp_path_factory.mktemp("realesrgan"))


@pytest.fixture(scope="session")
def _cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, _cache):
    monkeypatch.setenv("CONDIQUANT_CACHE", str(_cache))


@pytest.fixture(scope="session")
def photograph():
    """libvips' image of a cat's head, 44x30."""
    return pyvips.Image.new_from_array(skimage.data.chelsea()[60:210, 110:330].copy()).shrink(5, 5)


@pytest.fixture(scope="session")
def network(model):
    """``network(LEVELS)``: of shape (height, width, 3), 8 or 16 bits; their enlargement likewise."""
    upscaler = Upscaler(model / "model.xml")

    def enlarge(levels):
        highest = np.iinfo(levels.dtype).max
        pixels = levels.astype(np.float32).transpose(2, 0, 1) / np.float32(highest)
        output = np.rint(upscaler(pixels).clip(0, 1) * np.float32(highest))
        return output.astype(levels.dtype).transpose(1, 2, 0)

    return enlarge


@pytest.fixture
def upscale(condiquant, model):
    """``upscale(INPUT, OUTPUT, ...)`` with the real network; as ``condiquant``."""
    return lambda *arguments, **options: condiquant("upscale", model, *arguments, "-q", **options)
