import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from condiquant_basicsr import matlab_downscale, read_image, write_image
from condiquant_basicsr.data.images import to_tensor, to_uint8
from condiquant_plugin.errors import InputError


@pytest.mark.parametrize("set_name", ["Set5", "Set14"])
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_downscale_equals_matlab_bit_for_bit(data, set_name, scale):
    for path in sorted((data / set_name / "HR").glob("*.png")):
        lr = data / set_name / "LR_bicubic" / f"X{scale}" / f"{path.stem}x{scale}.png"
        made = matlab_downscale(to_uint8(read_image(path)), scale)
        assert np.array_equal(made, to_uint8(read_image(lr))), path.name


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_downscale_keeps_constants_and_crops_the_rest(scale):
    image = np.full((25, 31, 3), 137, np.uint8)
    reduced = matlab_downscale(image, scale)
    assert reduced.shape == (25 // scale, 31 // scale, 3)
    assert (reduced == 137).all()


def test_downscale_by_one_is_the_image(photograph):
    assert np.array_equal(matlab_downscale(photograph, 1), photograph)


def test_downscale_is_antialiased(photograph):
    """Close to area averaging, the ideal for a photograph; far from plain decimation."""
    area = cv2.resize(photograph, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA)
    reduced = matlab_downscale(photograph, 4)
    difference = np.abs(reduced.astype(float) - area).mean()
    decimated = np.abs(photograph[2::4, 2::4].astype(float) - area).mean()
    assert difference < 4 < decimated


def test_png_round_trip(tmp_path, photograph):
    image = to_tensor(photograph)
    write_image(tmp_path / "image.png", image)
    assert torch.equal(read_image(tmp_path / "image.png"), image)
    assert [file.name for file in tmp_path.iterdir()] == ["image.png"]


def test_written_values_are_clamped_and_rounded(tmp_path):
    image = torch.tensor([-1.0, 0.4 / 255, 0.6 / 255, 254.6 / 255, 2.0]).expand(3, 1, 5)
    write_image(tmp_path / "image.png", image)
    levels = read_image(tmp_path / "image.png") * 255
    assert levels[0, 0].tolist() == [0, 0, 1, 255, 255]


def test_grayscale_alpha_and_16_bit_are_converted_and_said(tmp_path, photograph, caplog):
    bgr = photograph[:40, :30, ::-1]
    wide = bgr.astype(np.uint16) * 257
    wide[0, 0] = 12345
    cases = {
        "gray": (bgr[:, :, 0], "grayscale"),
        "alpha": (np.dstack([bgr, np.full(bgr.shape[:2], 9, np.uint8)]), "alpha"),
        "wide": (wide, "16-bit"),
        "wide_gray": (wide[:, :, 0], "grayscale"),
    }
    for name, (pixels, word) in cases.items():
        path = tmp_path / f"{name}.png"
        cv2.imwrite(str(path), pixels)
        caplog.clear()
        image = read_image(path)
        assert image.shape == (3, 40, 30)
        assert any(word in message and str(path) in message for message in caplog.messages)
    rgb = to_tensor(photograph[:40, :30])
    torch.testing.assert_close(read_image(tmp_path / "alpha.png"), rgb)
    assert read_image(tmp_path / "wide.png")[0, 0, 0].item() == pytest.approx(12345 / 65535)
    gray = read_image(tmp_path / "gray.png")
    assert torch.equal(gray[0], gray[2])


TURNED_BY_CAMERAS = {
    1: lambda image: image,
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: np.rot90(image, 1),
    7: lambda image: np.rot90(image, 2).swapaxes(0, 1),
    8: lambda image: np.rot90(image, -1),
}
"""EXIF orientation to what the file then holds of an upright image."""


def save_turned(path, image, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.ascontiguousarray(TURNED_BY_CAMERAS[orientation](image))
    Image.fromarray(pixels).save(path, exif=exif, quality=95)


@pytest.mark.parametrize("orientation", TURNED_BY_CAMERAS)
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
@pytest.mark.parametrize("channels", [3, 4, 1])
def test_photographs_are_read_upright(tmp_path, photograph, suffix, channels, orientation):
    if (suffix, channels) == ("jpg", 4):
        pytest.skip("JPEG has no alpha")
    upright = photograph[:60, :96]
    stored = {
        3: upright,
        4: np.dstack([upright, np.full(upright.shape[:2], 255, np.uint8)]),
        1: upright[:, :, 0],
    }[channels]
    path = tmp_path / f"image.{suffix}"
    save_turned(path, stored, orientation)
    expected = to_tensor(upright if channels > 1 else upright[:, :, :1].repeat(3, axis=2))
    image = read_image(path)
    assert image.shape == (3, 60, 96)
    assert (image - expected).abs().mean() < 0.03


def test_an_upright_16_bit_image_keeps_its_levels(tmp_path, photograph):
    wide = photograph[:20, :30, ::-1].astype(np.uint16) * 256 + 7
    encoded = cv2.imencodeWithMetadata(
        ".png", np.rot90(wide).copy(), [cv2.IMAGE_METADATA_EXIF], [_exif(6)]
    )[1]
    (tmp_path / "wide.png").write_bytes(encoded.tobytes())
    expected = wide[:, :, ::-1].astype(np.float32) / 65535
    assert torch.equal(read_image(tmp_path / "wide.png"), torch.tensor(expected).permute(2, 0, 1))


def _exif(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return np.frombuffer(exif.tobytes().removeprefix(b"Exif\0\0"), np.uint8)


@pytest.mark.parametrize("content", [None, b"", b"no image"])
def test_unreadable_image(tmp_path, content):
    path = tmp_path / "image.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"image\.png"):
        read_image(path)


def test_float_image_is_refused(tmp_path):
    cv2.imwrite(str(tmp_path / "image.tiff"), np.ones((4, 4, 3), np.float32))
    with pytest.raises(InputError, match="float32"):
        read_image(tmp_path / "image.tiff")


def test_unwritable_places(tmp_path):
    image = torch.zeros(3, 2, 2)
    with pytest.raises(InputError, match="cannot write"):
        write_image(tmp_path / "absent" / "image.png", image)
    with pytest.raises(InputError, match=r"\.png"):
        write_image(tmp_path / "image.jpg", image)
    assert not list(tmp_path.iterdir())
