import numpy as np
import openvino as ov
import pytest
import torch
from torch import nn

from condiquant_openvino import Upscaler, convert, save, set_metadata
from condiquant_plugin import InputError


class Upsampling(nn.Module):
    """Receptive field of 4 pixels to each side."""

    def __init__(self, multiple=1):
        super().__init__()
        self.multiple = multiple
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 5, padding=2),
            nn.ReLU(),
            nn.Conv2d(8, 12, 5, padding=2),
            nn.PixelShuffle(2),
        )

    def forward(self, x):
        height, width = x.shape[-2] // self.multiple, x.shape[-1] // self.multiple
        blocks = x.reshape(1, 3, height, self.multiple, width, self.multiple)
        return self.body(blocks.reshape(x.shape))


@pytest.fixture
def exported(tmp_path):
    """Network and path of its IR."""

    def export(multiple=1, static=None):
        model = Upsampling(multiple).eval()
        size = static or (16, 24)
        ir = convert(model, torch.rand(1, 3, *size), static=static is not None)
        set_metadata(ir, {"scale": 2, "pad_multiple": multiple})
        save(ir, tmp_path / "model.xml")
        return model, tmp_path / "model.xml"

    return export


def expected_of(model, image):
    with torch.no_grad():
        return model(image[None])[0]


def grey_levels(first, second):
    return float((first - second).abs().max() * 255)


@pytest.mark.parametrize("size", [(37, 50), (32, 31), (300, 32)])  # 32: of the overlap too
def test_whole_image(exported, size):
    model, path = exported()
    image = torch.rand(3, *size)
    torch.testing.assert_close(Upscaler(path)(image), expected_of(model, image), rtol=0, atol=1e-5)


def test_tiles_equal_the_whole_image(exported):
    model, path = exported()
    image, seen = torch.rand(3, 61, 90), []
    upscaled = Upscaler(path, tile=32, overlap=16)(image, lambda *done: seen.append(done))
    assert grey_levels(upscaled, expected_of(model, image)) < 0.01
    assert seen == [(i + 1, 15) for i in range(15)]


@pytest.mark.parametrize("size", [(32, 40), (32, 65), (70, 41), (64, 120)])
def test_static_ir_takes_any_size(exported, size):
    model, path = exported(static=(32, 40))
    image = torch.rand(3, *size)
    upscaled = Upscaler(path, overlap=16)(image)
    assert upscaled.shape == (3, 2 * size[0], 2 * size[1])
    expected = expected_of(model, image)
    assert grey_levels(upscaled, expected) < 0.01


def test_smaller_than_a_static_ir(exported):
    model, path = exported(static=(24, 32))
    image = torch.rand(3, 10, 9)
    upscaled = Upscaler(path)(image)
    assert upscaled.shape == (3, 20, 18)
    assert grey_levels(upscaled[:, :12, :10], expected_of(model, image)[:, :12, :10]) < 0.01


@pytest.mark.parametrize("size", [(8, 8), (13, 21), (1, 1), (3, 40)])
def test_padding_to_the_multiple(exported, size):
    model, path = exported(multiple=8)
    image = torch.rand(3, *size)
    upscaled = Upscaler(path, tile=16)(image)
    assert upscaled.shape == (3, 2 * size[0], 2 * size[1])
    if size == (8, 8):
        assert grey_levels(upscaled, expected_of(model, image)) < 0.01
    assert torch.isfinite(upscaled).all()


def test_arrays_give_arrays(exported):
    _, path = exported()
    image = np.random.default_rng(0).random((3, 12, 12)).astype(np.float32)
    upscaled = Upscaler(path)(image)
    assert isinstance(upscaled, np.ndarray)
    assert upscaled.dtype == np.float32
    np.testing.assert_array_equal(upscaled, Upscaler(path)(torch.from_numpy(image)).numpy())


def test_unknown_device_names_the_known(exported):
    _, path = exported()
    with pytest.raises(InputError, match=ov.Core().available_devices[0]):
        Upscaler(path, device="ABACUS")
    assert Upscaler(path, device="AUTO")(torch.rand(3, 8, 8)).shape == (3, 16, 16)


@pytest.mark.parametrize("image", [torch.rand(1, 8, 8), torch.rand(8, 8), torch.rand(3, 0, 8)])
def test_image_of_another_shape(exported, image):
    _, path = exported()
    with pytest.raises(InputError, match="expected"):
        Upscaler(path)(image)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": 0}, "tile=0"),
        ({"tile": 16, "overlap": 16}, "overlap=16"),
        ({"overlap": -1}, "overlap"),
    ],
)
def test_impossible_tiles(exported, options, message):
    _, path = exported()
    with pytest.raises(InputError, match=message):
        Upscaler(path, **options)


def test_static_ir_has_its_own_tile(exported):
    _, path = exported(static=(24, 32))
    with pytest.raises(InputError, match="static"):
        Upscaler(path, tile=64)
