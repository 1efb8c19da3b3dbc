"""Picture files by libvips: read and written in strips, with all that they say besides their pixels."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyvips
from numpy.typing import NDArray

from condiquant_openvino.running.memory import free_memory
from condiquant_plugin.errors import InputError
from condiquant_plugin.files import check_room, replacing, temporary_name

pyvips.cache_set_max(0)  # or a file that has changed is read as it was
_logger = logging.getLogger(__name__)

READABLE = frozenset(
    (".png", ".jpg", ".jpeg", ".jpe", ".webp", ".tif", ".tiff", ".gif", ".avif", ".heic", ".heif")
) | frozenset((".bmp",))
_FORMATS = {".jpeg": ".jpg", ".jpe": ".jpg", ".tif": ".tiff"}
_LONGEST_SIDE = {".jpg": 65535, ".webp": 16383}
_KEPT = ("icc-profile-data", "exif-", "xmp-data", "iptc-data", "photoshop-data", "png-comment-")
_DECODED_AHEAD = 2**26
"""Bytes of a picture, as floats, up to which it is read at once."""
_LARGE = 0.25
"""Share of the free memory beyond which an enlargement waits on the disk."""
_SMALL = 2**24
"""Bytes that are always free."""
_PNG = {"compression": 3, "filter": "sub"}
"""Of a photograph two thirds of the bytes of libvips' own choice, in less time."""
_BIG_TIFF = 2**31
_COLOURS = {
    (1, np.uint8): "b-w",
    (1, np.uint16): "grey16",
    (3, np.uint8): "srgb",
    (3, np.uint16): "rgb16",
}


class NoRoomError(InputError):
    """The disk is full: what comes after cannot be written either."""


@dataclass(frozen=True)
class Wanted:
    """What is made of a picture.

    Attributes:
        scale: of the file; where it is not the network's, the network's result is resampled.
        quality: 1 to 100, of jpg and webp.
        bicubic_alpha: enlarge an alpha channel without the network.
    """

    scale: float
    quality: int = 95
    bicubic_alpha: bool = False


class PictureFile:
    """A picture on the disk; see :class:`condiquant_openvino.running.tiling.Picture`.

    It is upright, as its EXIF orientation says. CMYK and Lab become sRGB, a palette its colours.

    Raises:
        InputError: unreadable, of floats, or of something else than grey or colours.
    """

    def __init__(self, path: Path, target: Path, wanted: Wanted) -> None:
        self.path, self.target, self.wanted = path, target, wanted
        with _naming(path):
            self.image = _upright(path)
        self.height, self.width = self.image.height, self.image.width
        if self.image.format not in ("uchar", "ushort"):
            raise InputError(
                f"{path} has {self.image.format} pixels: convert it to 8 or 16 bits a channel"
            )
        self.has_alpha = bool(self.image.hasalpha())
        self.colours = self.image.bands - self.has_alpha
        if self.colours not in (1, 3):
            raise InputError(f"{path} has {self.image.bands} channels: convert it to grey or RGB")
        if self.has_alpha and kind_of(target) == ".jpg":
            raise InputError(
                f"{path} has an alpha channel, which jpg cannot hold: use --format png, webp or tiff"
            )
        self._check_size()
        self.channels = self.colours + (self.has_alpha and not wanted.bicubic_alpha)
        self.deep = self.image.format == "ushort"
        self._region: pyvips.Region | None = None
        self._pixels: NDArray[np.float32] | None = None

    def _check_size(self) -> None:
        longest = round(self.wanted.scale * max(self.height, self.width))
        most = _LONGEST_SIDE.get(kind_of(self.target), longest)
        if longest > most:
            raise InputError(
                f"{self.target} would have {longest} pixels on a side, and {self.target.suffix[1:]} "
                f"holds {most}: use --format png or tiff"
            )

    def read_ahead(self) -> PictureFile:
        """Decode it if it is small; larger ones are decoded strip by strip."""
        if 4 * self.channels * self.height * self.width <= _DECODED_AHEAD:
            self._pixels = self._read(0, self.height)
        return self

    def rows(self, top: int, bottom: int) -> NDArray[np.float32]:
        """Pixels in [0, 1], shape ``(channels, bottom - top, width)``; strips in order."""
        if self._pixels is None:
            return self._read(top, bottom)
        return self._pixels[:, top:bottom]

    def _read(self, top: int, bottom: int) -> NDArray[np.float32]:
        kind = np.uint16 if self.deep else np.uint8
        with _naming(self.path):
            self._region = self._region or pyvips.Region.new(self.image)
            data = self._region.fetch(0, top, self.width, bottom - top)
        levels = np.frombuffer(data, kind).reshape(bottom - top, self.width, -1)
        planes = np.ascontiguousarray(levels[:, :, : self.channels].transpose(2, 0, 1))
        return planes.astype(np.float32) / np.float32(np.iinfo(kind).max)


class Enlargement:
    """Collects the rows of a picture's enlargement, in memory or on the disk, and writes the file.

    Args:
        scale: the network's.
    """

    def __init__(self, picture: PictureFile, scale: int) -> None:
        self._picture, self._scale = picture, scale
        self.target = picture.target
        self._height, self._width = scale * picture.height, scale * picture.width
        self._kind: Any = np.uint16 if picture.deep and _holds_16_bits(picture.target) else np.uint8
        self._filled = 0
        size = self._height * self._width * picture.channels * np.dtype(self._kind).itemsize
        self._size, self._raw, self._stream, self._levels = size, None, None, None
        if size <= _SMALL or size <= _LARGE * free_memory():
            shape = (self._height, self._width, picture.channels)
            self._levels = np.empty(shape, self._kind)
        else:
            check_room(picture.target.parent, size)
            temporary = temporary_name(picture.target)
            self._raw = temporary.with_name(f"{temporary.name}.raw")
            with _naming(picture.path, picture.target):
                self._stream = self._raw.open("wb")

    def add(self, rows: NDArray[np.float32]) -> bool:
        """Take the next rows, ``(channels, any, width)``; true if they were the last."""
        top, self._filled = self._filled, self._filled + rows.shape[1]
        highest = np.iinfo(self._kind).max
        levels = np.rint(rows.clip(0, 1) * np.float32(highest)).astype(self._kind)
        if self._levels is not None:
            self._levels[top : self._filled] = levels.transpose(1, 2, 0)
        elif self._stream is not None:
            with _naming(self._picture.path, self._picture.target):
                self._stream.write(np.ascontiguousarray(levels.transpose(1, 2, 0)).tobytes())
        return self._filled == self._height

    def write(self) -> None:
        """Write the file, whole or not at all.

        Raises:
            InputError: a place that cannot be written, or no room.
        """
        target = self._picture.target
        try:
            if self._stream is not None:
                self._stream.close()
            with replacing(target) as temporary, _naming(self._picture.path, target):
                self._save(self._finished(), temporary)
        finally:
            self.drop()

    def drop(self) -> None:
        """Leave nothing on the disk."""
        if self._stream is not None:
            self._stream.close()
        if self._raw is not None:
            self._raw.unlink(missing_ok=True)

    def _finished(self) -> pyvips.Image:
        picture, colours = self._picture, _COLOURS[self._picture.colours, self._kind]
        if self._levels is not None:
            image = pyvips.Image.new_from_array(self._levels, interpretation=colours)
        else:
            image = pyvips.Image.rawload(
                str(self._raw),
                self._width,
                self._height,
                picture.channels,
                format="ushort" if self._kind is np.uint16 else "uchar",
                interpretation=colours,
                access="sequential",
            )
        if picture.wanted.scale != self._scale:
            image = _resized(image, picture)
        if picture.has_alpha and picture.wanted.bicubic_alpha:
            image = image.bandjoin(self._bicubic_alpha(image))
        return _with_metadata(image, picture)

    def _bicubic_alpha(self, like: pyvips.Image) -> pyvips.Image:
        picture = self._picture
        alpha = _upright(picture.path)[-1]
        alpha = alpha.resize(
            like.width / picture.width, vscale=like.height / picture.height, kernel="cubic"
        )
        if picture.deep and self._kind is np.uint8:
            alpha = (alpha / 257).rint()
        return alpha.cast(like.format)

    def _save(self, image: pyvips.Image, path: Path) -> None:
        kind, quality = kind_of(self._picture.target), self._picture.wanted.quality
        if kind == ".png":
            image.pngsave(str(path), **_PNG)
        elif kind == ".jpg":
            image.jpegsave(str(path), Q=quality)
        elif kind == ".webp":
            image.webpsave(str(path), Q=quality)
        else:
            big = self._size > _BIG_TIFF
            image.tiffsave(str(path), compression="deflate", predictor="horizontal", bigtiff=big)
            if "exif-data" in image.get_fields():
                from condiquant_recipes.upscaling import by_pillow

                by_pillow.add_exif(path, image.get("exif-data"))


def pixels(path: Path) -> int:
    """How many a picture has, from its header.

    Raises:
        InputError: unreadable.
    """
    with _naming(path):
        image = _opened(path, access="sequential")
    return int(image.width * image.height)


def kind_of(path: Path) -> str:
    """The suffix of a format: ``.jpg`` for ``photo.JPEG``."""
    suffix = path.suffix.lower()
    return _FORMATS.get(suffix, suffix)


def _holds_16_bits(path: Path) -> bool:
    return kind_of(path) in (".png", ".tiff")


def _opened(path: Path, **options: Any) -> pyvips.Image:
    if kind_of(path) != ".bmp":
        return pyvips.Image.new_from_file(str(path), **options)
    from condiquant_recipes.upscaling import by_pillow

    return by_pillow.read(path)


def _upright(path: Path) -> pyvips.Image:
    image = _opened(path, access="sequential", fail_on="error")
    pages = image.get("n-pages") if "n-pages" in image.get_fields() else 1
    if pages > 1:
        _logger.warning("%s has %d pages: the first is enlarged", path, pages)
    if "orientation" in image.get_fields() and image.get("orientation") != 1:
        image = _opened(path, fail_on="error").autorot()
    if image.interpretation in ("cmyk", "lab", "labs"):
        profiled = "icc-profile-data" in image.get_fields()
        image = image.icc_transform("srgb") if profiled else image.colourspace("srgb")
    return image


def _resized(image: pyvips.Image, picture: PictureFile) -> pyvips.Image:
    """To the wanted size, by Lanczos, colours weighted by their alpha."""
    wanted = [
        max(round(picture.wanted.scale * size), 1) for size in (picture.width, picture.height)
    ]
    has_alpha, kind = image.hasalpha(), image.format
    if has_alpha:
        image = image.premultiply()
    image = image.resize(
        wanted[0] / image.width, vscale=wanted[1] / image.height, kernel="lanczos3"
    )
    if has_alpha:
        image = image.unpremultiply()
    return image.rint().cast(kind)


def _with_metadata(image: pyvips.Image, picture: PictureFile) -> pyvips.Image:
    sources = [picture.image]
    if kind_of(picture.path) == ".tiff":
        from condiquant_recipes.upscaling import by_pillow

        sources.append(by_pillow.with_exif(picture.path))
    image = image.copy(xres=picture.image.xres, yres=picture.image.yres)
    for source in sources:
        for field in source.get_fields():
            if field.startswith(_KEPT) and not field.endswith("-Orientation"):
                image.set_type(source.get_typeof(field), field, source.get(field))
    image.set_type(pyvips.GValue.gint_type, "orientation", 1)  # last, or EXIF says as before
    return image


@contextmanager
def _naming(source: Path, target: Path | None = None) -> Iterator[None]:
    """What libvips and the system say, in one line with the file."""
    try:
        yield
    except (pyvips.Error, OSError) as error:
        reason = " ".join(str(getattr(error, "detail", "") or error).split())
        if target is not None and "No space left" in reason:
            raise NoRoomError(
                f"no room left for {target}: free some and run again, which goes on from there"
            ) from error
        if target is not None and isinstance(error, OSError):
            raise InputError(f"cannot write {target}: {error.strerror}") from error
        if not source.is_file():
            raise InputError(f"{source} does not exist: give a picture") from error
        what = "is no readable picture" if target is None else f"could not become {target}"
        raise InputError(f"{source} {what} ({reason}): save it again as png") from error
