import numpy as np
import pytest
import pyvips
from PIL import ExifTags, Image
from PIL.TiffImagePlugin import IFDRational

from condiquant_openvino import read_ir, read_metadata, save, set_metadata, take_u8_nhwc
from condiquant_recipes.upscaling import picture_file


def saved(image, path):
    image.write_to_file(str(path))
    return path


def loaded(path):
    """As stored, not turned."""
    return pyvips.Image.new_from_file(str(path))


def distance(found, expected):
    """Mean, in levels."""
    return np.abs(found.numpy().astype(float) - expected).mean()


@pytest.fixture
def deep(photograph):
    """Levels of 16 bits that 8 cannot tell apart."""
    noise = pyvips.Image.gaussnoise(photograph.width, photograph.height, mean=0, sigma=40, seed=1)
    return (photograph.gaussblur(2) * 257 + noise).cast("ushort").copy(interpretation="rgb16")


@pytest.fixture
def profile(photograph):
    """Of a wide gamut."""
    image = photograph.copy(interpretation="srgb")
    return image.icc_transform("p3", input_profile="srgb").get("icc-profile-data")


def with_metadata(image, profile, orientation=1):
    image = image.copy(xres=11.8, yres=11.8)
    image.set_type(pyvips.GValue.blob_type, "icc-profile-data", profile)
    image.set_type(pyvips.GValue.gint_type, "orientation", orientation)
    image.set_type(pyvips.GValue.blob_type, "xmp-data", b"<x:xmpmeta xmlns:x='adobe:ns:meta/'/>")
    artist = "Ada (Ada, ASCII, 4 components, 4 bytes)"
    image.set_type(pyvips.GValue.gstr_type, "exif-ifd0-Artist", artist)
    return image


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tiff"])
def test_a_photograph_is_enlarged_and_keeps_what_it_says(
    tmp_path, upscale, network, photograph, profile, ending
):
    source = saved(with_metadata(photograph, profile), tmp_path / f"photo[1].{ending}")
    target = tmp_path / f"large.{ending}"
    assert upscale(source, target) == f"{target}\n"
    found = loaded(target)
    assert (found.width, found.height, found.bands) == (4 * 44, 4 * 30, 3)
    assert found.format == "uchar"
    assert distance(found, network(loaded(source).numpy())) <= {"jpg": 2, "webp": 3}.get(ending, 0)
    assert found.get("icc-profile-data") == profile
    assert b"adobe:ns:meta" in found.get("xmp-data")
    if ending != "tiff":  # libvips reads none there
        assert found.get("exif-ifd0-Artist").startswith("Ada ")
    if ending != "webp":
        assert found.xres == pytest.approx(11.8, rel=1e-2)
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


@pytest.fixture
def from_a_camera(tmp_path, photograph):
    exif = Image.Exif()
    exif[ExifTags.Base.Artist] = "Ada"
    exif[ExifTags.IFD.Exif] = {ExifTags.Base.ExposureTime: IFDRational(1, 60)}
    exif[ExifTags.IFD.GPSInfo] = {ExifTags.GPS.GPSLatitudeRef: "N"}
    Image.fromarray(photograph.numpy()).save(tmp_path / "camera.jpg", exif=exif)
    return tmp_path / "camera.jpg"


@pytest.mark.parametrize("big", [False, True])
def test_exif_goes_into_tiff_and_out_of_it(
    tmp_path, upscale, network, from_a_camera, big, monkeypatch
):
    monkeypatch.setattr(picture_file, "_BIG_TIFF", 0 if big else 2**31)
    upscale(from_a_camera, tmp_path / "large.tiff")
    with Image.open(tmp_path / "large.tiff") as found:
        exif, pixels = found.getexif(), np.asarray(found)
    assert exif[ExifTags.Base.Artist] == "Ada"
    assert exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ExposureTime] == IFDRational(1, 60)
    assert exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitudeRef] == "N"
    np.testing.assert_array_equal(pixels, network(loaded(from_a_camera).numpy()))
    np.testing.assert_array_equal(loaded(tmp_path / "large.tiff").numpy(), pixels)
    upscale(tmp_path / "large.tiff", tmp_path / "larger.jpg")
    with Image.open(tmp_path / "larger.jpg") as found:
        exif = found.getexif()
    assert exif[ExifTags.Base.Artist] == "Ada"
    assert exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ExposureTime] == IFDRational(1, 60)


def test_exif_is_kept_as_far_as_it_can_be_read(tmp_path, upscale, from_a_camera):
    upscale(from_a_camera, tmp_path / "camera.tiff")
    content = (tmp_path / "camera.tiff").read_bytes()
    with Image.open(tmp_path / "camera.tiff") as found:
        at = found.getexif()[ExifTags.IFD.Exif]
    pointer = content.rindex(at.to_bytes(4, "little"))
    beyond = len(content).to_bytes(4, "little")
    (tmp_path / "camera.tiff").write_bytes(content[:pointer] + beyond + content[pointer + 4 :])
    upscale(tmp_path / "camera.tiff", tmp_path / "large.jpg")
    with Image.open(tmp_path / "large.jpg") as found:
        exif = found.getexif()
    assert exif[ExifTags.Base.Artist] == "Ada"
    assert not exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.ExposureTime)


@pytest.mark.parametrize(
    ("mode", "decoded"), [("RGB", "RGB"), ("L", "L"), ("P", "RGB"), ("1", "L")]
)
def test_bmp_is_read(tmp_path, upscale, photograph, mode, decoded):
    source = Image.fromarray(photograph.numpy()).convert(mode)
    source.save(tmp_path / "photo.bmp", dpi=(300, 300))
    source.convert(decoded).save(tmp_path / "photo.png")
    for name in ("bmp", "png"):
        (tmp_path / name).mkdir()
        upscale(tmp_path / f"photo.{name}", tmp_path / name)
    found, expected = (loaded(tmp_path / name / "photo.png") for name in ("bmp", "png"))
    assert found.bands == (3 if decoded == "RGB" else 1)
    np.testing.assert_array_equal(found.numpy(), expected.numpy())
    assert found.xres == pytest.approx(300 / 25.4, rel=1e-2)


def test_half_a_bmp_is_no_readable_picture(tmp_path, upscale, photograph):
    Image.fromarray(photograph.numpy()).save(tmp_path / "photo.bmp")
    content = (tmp_path / "photo.bmp").read_bytes()
    (tmp_path / "photo.bmp").write_bytes(content[: len(content) // 2])
    error = upscale(tmp_path / "photo.bmp", tmp_path / "large.png", code=2)
    assert "photo.bmp is no readable picture" in error
    assert not (tmp_path / "large.png").exists()


@pytest.mark.parametrize("ending", ["png", "tiff"])
def test_16_bits_stay(tmp_path, upscale, network, deep, ending):
    source = saved(deep, tmp_path / f"deep.{ending}")
    upscale(source, tmp_path / f"large.{ending}")
    found = loaded(tmp_path / f"large.{ending}")
    assert (found.format, found.interpretation) == ("ushort", "rgb16")
    assert len(np.unique(found.numpy() % 257)) > 200
    np.testing.assert_array_equal(found.numpy(), network(deep.numpy()))


def test_16_bits_into_an_ir_of_8_bits_are_said(tmp_path, condiquant, model, deep, caplog):
    ir = read_ir(model / "model.xml")
    u8 = take_u8_nhwc(ir)
    set_metadata(u8, read_metadata(ir))
    save(u8, tmp_path / "model.xml")
    source = saved(deep, tmp_path / "deep.png")
    condiquant("upscale", tmp_path, source, tmp_path / "large.png", "-q")
    assert "deep.png: its 16 bits enter an IR of 8-bit images" in caplog.text
    assert len(np.unique(loaded(tmp_path / "large.png").numpy())) <= 256


def test_16_bits_become_8_where_the_format_has_no_more(tmp_path, upscale, network, deep):
    source = saved(deep, tmp_path / "deep.tiff")
    upscale(source, tmp_path / "large.jpg")
    found = loaded(tmp_path / "large.jpg")
    assert found.format == "uchar"
    assert distance(found, network(deep.numpy()) / 257) < 2


@pytest.mark.parametrize("orientation", [2, 3, 6, 8])
def test_a_rotated_photograph_comes_upright(
    tmp_path, upscale, network, photograph, profile, orientation
):
    rotated = with_metadata(photograph, profile, orientation)
    source = saved(rotated, tmp_path / "phone.jpg")
    upscale(source, tmp_path / "large.jpg")
    found, upright = loaded(tmp_path / "large.jpg"), loaded(source).autorot()
    assert distance(found, network(upright.numpy())) < 2
    assert found.get("orientation") == 1
    assert found.get("exif-ifd0-Orientation").startswith("1 ")


@pytest.fixture
def icon(photograph):
    """Round, with a soft edge."""
    across = pyvips.Image.xyz(photograph.width, photograph.height) - [22, 15]
    distance = (across[0] ** 2 + across[1] ** 2) ** 0.5
    alpha = ((14 - distance) * 100).cast("uchar")
    return photograph.bandjoin(alpha).copy(interpretation="srgb")


@pytest.mark.parametrize("alpha", ["network", "bicubic"])
@pytest.mark.parametrize("ending", ["png", "webp", "tiff"])
def test_alpha_of_an_icon_is_enlarged(tmp_path, upscale, network, icon, alpha, ending):
    source = saved(icon, tmp_path / "icon.png")
    upscale(source, tmp_path / f"large.{ending}", "--alpha", alpha)
    found = loaded(tmp_path / f"large.{ending}")
    assert found.hasalpha()
    assert (found.width, found.height, found.bands) == (4 * 44, 4 * 30, 4)
    levels = icon.numpy()
    if alpha == "bicubic":
        expected = icon[3].resize(4, kernel="cubic").numpy()
    else:
        expected = network(levels[..., 3:].repeat(3, 2)).mean(2)
    assert distance(found[3], expected) < 2
    assert found(0, 0)[3] == 0
    assert found(88, 60)[3] == 255
    if ending != "webp":
        np.testing.assert_array_equal(found.numpy()[..., :3], network(levels[..., :3]))


def test_both_ways_to_enlarge_alpha_differ(tmp_path, upscale, icon):
    source, found = saved(icon, tmp_path / "icon.png"), []
    for alpha in ("network", "bicubic"):
        upscale(source, tmp_path / f"{alpha}.png", "--alpha", alpha)
        found.append(loaded(tmp_path / f"{alpha}.png").numpy().astype(int))
    assert (found[0][..., :3] == found[1][..., :3]).all()
    assert np.abs(found[0][..., 3] - found[1][..., 3]).max() > 10


def test_jpg_has_no_alpha(tmp_path, upscale, icon):
    source = saved(icon, tmp_path / "icon.png")
    error = upscale(source, tmp_path / "large.jpg", code=2)
    assert "icon.png has an alpha channel, which jpg cannot hold: use --format png" in error
    assert not (tmp_path / "large.jpg").exists()


@pytest.mark.parametrize("deep", [False, True])
def test_grey_stays_grey(tmp_path, upscale, network, photograph, deep):
    grey = photograph[1] * 257 if deep else photograph[1]
    kind, colours = ("ushort", "grey16") if deep else ("uchar", "b-w")
    grey = grey.cast(kind).copy(interpretation=colours)
    upscale(saved(grey, tmp_path / "grey.png"), tmp_path / "large.png")
    found = loaded(tmp_path / "large.png")
    assert (found.bands, found.format, found.interpretation) == (1, kind, colours)
    expected = network(grey.numpy()[..., None].repeat(3, 2)).mean(2)
    assert distance(found, expected) < (0.5 * 257 if deep else 0.5)


@pytest.mark.parametrize(("scale", "size"), [(2.5, (110, 75)), (1, (44, 30)), (5, (220, 150))])
def test_another_scale_than_the_networks(tmp_path, upscale, icon, scale, size):
    source = saved(icon, tmp_path / "icon.png")
    upscale(source, tmp_path / "large.png", "--scale", scale)
    found = loaded(tmp_path / "large.png")
    assert (found.width, found.height, found.bands) == (*size, 4)
    expected = icon.premultiply().resize(scale).unpremultiply()
    inside = (expected[3] > 250).numpy() > 0
    apart = np.abs(found.numpy().astype(float) - expected.numpy())[inside]
    assert apart.mean() < 6


def test_cmyk_becomes_rgb(tmp_path, upscale, photograph):
    cmyk = photograph.copy(interpretation="srgb").icc_transform("cmyk", input_profile="srgb")
    source = saved(cmyk, tmp_path / "print.jpg")
    assert loaded(source).interpretation == "cmyk"
    upscale(source, tmp_path / "large.png")
    found = loaded(tmp_path / "large.png")
    assert (found.bands, found.interpretation) == (3, "srgb")
    assert "icc-profile-data" not in found.get_fields() or len(
        found.get("icc-profile-data")
    ) != len(loaded(source).get("icc-profile-data"))
    assert distance(found.shrink(4, 4), photograph.numpy()) < 12


def test_quality_of_jpg(tmp_path, upscale, photograph):
    source, sizes = saved(photograph, tmp_path / "photo.png"), []
    for quality in (20, 95):
        upscale(source, tmp_path / f"{quality}.jpg", "--quality", quality)
        sizes.append((tmp_path / f"{quality}.jpg").stat().st_size)
    upscale(source, tmp_path / "default.jpg")
    assert sizes[0] < sizes[1] == (tmp_path / "default.jpg").stat().st_size


def test_of_several_pages_the_first(tmp_path, upscale, network, photograph, caplog):
    pages = pyvips.Image.arrayjoin([photograph, photograph.invert()], across=1)
    pages = pages.copy()
    pages.set_type(pyvips.GValue.gint_type, "page-height", photograph.height)
    source = saved(pages, tmp_path / "pages.tiff")
    upscale(source, tmp_path / "large.png")
    assert "pages.tiff has 2 pages: the first is enlarged" in caplog.text
    assert distance(loaded(tmp_path / "large.png"), network(photograph.numpy())) == 0


def test_what_exists_is_skipped(tmp_path, upscale, photograph):
    source, target = saved(photograph, tmp_path / "photo.png"), tmp_path / "large.png"
    target.write_text("old")
    out = upscale(source, target)
    assert out == f"{target} is there: skipped; --overwrite replaces it\n"
    assert target.read_text() == "old"
    upscale(source, target, "--overwrite")
    assert loaded(target).width == 4 * 44


def test_into_a_folder(tmp_path, upscale, photograph):
    source, folder = saved(photograph, tmp_path / "photo.png"), tmp_path / "out"
    folder.mkdir()
    upscale(source, folder)
    upscale(source, folder, "--suffix", "_x4", "--format", "webp")
    assert {file.name for file in folder.iterdir()} == {"photo.png", "photo_x4.webp"}


def test_a_picture_larger_than_memory_streams(tmp_path, upscale, photograph, monkeypatch):
    """It waits on the disk, strip by strip, and comes out the same."""
    source = saved(photograph, tmp_path / "photo.png")
    options = ("--tile", 16, "--scale", 3)
    upscale(source, tmp_path / "in_memory.png", *options)
    seen = []
    write = picture_file.Enlargement.write

    def watched(enlargement):
        seen.extend(file.stat().st_size for file in tmp_path.glob(".large.png.*.raw"))
        write(enlargement)

    monkeypatch.setattr(picture_file.Enlargement, "write", watched)
    monkeypatch.setattr(picture_file, "_SMALL", 1000)
    monkeypatch.setattr(picture_file, "free_memory", lambda: 1000)
    monkeypatch.setattr(picture_file, "_DECODED_AHEAD", 0)
    upscale(source, tmp_path / "large.png", *options)
    assert (
        loaded(tmp_path / "large.png").numpy() == loaded(tmp_path / "in_memory.png").numpy()
    ).all()
    assert len(seen) == 1
    assert not list(tmp_path.glob(".*"))
