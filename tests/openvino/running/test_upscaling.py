import numpy as np
import openvino as ov
import pytest
import skimage.data
import torch
from torch import nn

import realesrgan_ir
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


def test_a_size_that_an_ir_cannot_take_is_found_before_it_runs(tmp_path):
    class Halving(nn.Module):
        def forward(self, x):
            small = nn.functional.avg_pool2d(x, 2)
            return x + small.repeat_interleave(2, 2).repeat_interleave(2, 3)

    save(convert(Halving(), torch.rand(1, 3, 8, 8)), tmp_path / "model.xml")
    upscaler = Upscaler(tmp_path / "model.xml")
    assert upscaler(torch.rand(3, 6, 8)).shape == (3, 6, 8)
    with pytest.raises(InputError, match=r"model\.xml takes no images of 8x7: .*--static.*--tile"):
        upscaler(torch.rand(3, 7, 8))


@pytest.fixture(scope="module")
def photograph():
    picture = torch.from_numpy(skimage.data.chelsea()[80:170, 90:220].copy())
    return picture.permute(2, 0, 1) / 255


@pytest.fixture(scope="module")
def realesrgan(tmp_path_factory):
    """The folder of a dynamic IR, and that of a static one."""
    return [realesrgan_ir.export(tmp_path_factory.mktemp("ir"), side) for side in (None, 64)]


@pytest.fixture(scope="module")
def whole(realesrgan, photograph):
    return Upscaler(realesrgan[0] / "model.xml", tile=130)(photograph)


@pytest.mark.parametrize("is_static", [False, True])
def test_no_seam_shows(realesrgan, photograph, whole, is_static):
    tile = None if is_static else 64
    tiled = Upscaler(realesrgan[is_static] / "model.xml", tile=tile, overlap=32)(photograph)
    levels = ((tiled - whole).abs() * 255).amax(0)
    assert tiled.shape == whole.shape == (3, 4 * 90, 4 * 130)
    assert levels.max() > 0
    assert (levels <= 1).float().mean() >= 0.999


def test_tiles_fade_into_each_other(exported, photograph):
    """Where the network sees too little at a tile's edge, no step is left."""
    _, path = exported(static=(32, 32))
    faded, cut = (Upscaler(path, overlap=overlap)(photograph) for overlap in (8, 0))
    whole = expected_of(_, photograph)
    worst = [float((found - whole).diff(dim=2).abs().max()) for found in (faded, cut)]
    assert worst[0] < 0.5 * worst[1]


class Streamed:
    """A picture that is read in order and remembers how far."""

    def __init__(self, pixels):
        self.pixels, self.read = pixels.numpy(), 0
        self.channels, self.height, self.width = self.pixels.shape

    def rows(self, top, bottom):
        assert top == self.read
        self.read = bottom
        return self.pixels[:, top:bottom]


def test_bands_of_several_pictures(exported):
    model, path = exported()
    upscaler = Upscaler(path, tile=32, overlap=16)
    pictures = [Streamed(torch.rand(3, height, 40)) for height in (100, 8, 33)]
    bands = {}
    for picture, rows in upscaler.bands(iter(pictures)):
        bands.setdefault(picture, []).append(rows)
    assert list(bands) == pictures
    for picture, rows in bands.items():
        found = torch.from_numpy(np.concatenate(rows, axis=1))
        assert grey_levels(found, expected_of(model, torch.from_numpy(picture.pixels))) < 0.01
    assert len(bands[pictures[0]]) == 6


def test_a_band_comes_before_the_picture_is_read(exported):
    _, path = exported()
    picture = Streamed(torch.rand(3, 2000, 32))
    next(iter(Upscaler(path, tile=32, overlap=16).bands([picture])))
    assert picture.read < 500


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("colours", [1, 3])
def test_grey_and_alpha(exported, colours, constant):
    model, path = exported()
    pixels = torch.rand(colours + 1, 20, 50)
    if constant:
        pixels[-1] = 1
    (band,) = [rows for _, rows in Upscaler(path).bands([Streamed(pixels)])]
    colour = expected_of(model, pixels[:-1].repeat(3 // colours, 1, 1))
    around = pixels[-1:]
    most = nn.functional.max_pool2d(around, 3, stride=1, padding=1)
    least = -nn.functional.max_pool2d(-around, 3, stride=1, padding=1)
    alpha = expected_of(model, around.repeat(3, 1, 1)).mean(0)
    bounds = [b[0].repeat_interleave(2, 0).repeat_interleave(2, 1) for b in (least, most)]
    expected = colour if colours == 3 else colour.mean(0, keepdim=True)
    assert grey_levels(torch.from_numpy(band[:-1]), expected) < 0.01
    assert grey_levels(torch.from_numpy(band[-1]), alpha.clamp(*bounds)) < 0.01
    assert not constant or (band[-1] == 1).all()


def test_tile_follows_the_free_memory(exported, monkeypatch):
    model, path = exported()
    image, sizes = torch.rand(3, 600, 40), []
    monkeypatch.setattr("condiquant_openvino.running.memory.free_memory", lambda: 10_000_000)
    for upscaler in (Upscaler(path), Upscaler(path, overlap=40)):
        assert grey_levels(upscaler(image), expected_of(model, image)) < 0.01
        sizes.append(upscaler._tile)
    assert 64 <= sizes[0][0] < 256
    assert sizes[1][0] >= 80
    monkeypatch.undo()
    upscaler = Upscaler(path)
    upscaler(image)
    assert upscaler._tile == (512, 512)
