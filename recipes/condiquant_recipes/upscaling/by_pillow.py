"""What libvips does not do and Pillow does: reading bmp, and EXIF in tiff."""

from __future__ import annotations

import logging
import struct
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyvips
from PIL import ExifTags, Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

Image.MAX_IMAGE_PIXELS = None  # libvips has no limit either
_logger = logging.getLogger(__name__)
_ABOUT = (270, 271, 272, 305, 306, 315, 316, 33432)
"""Tags beside the pixels: description, make, model, software, date, artist, host, copyright."""
_INSIDE = (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)
_MM_OF_INCH = 25.4
_BIG = 43
"""Version of tiff files with offsets of 64 bits."""


def read(path: Path) -> pyvips.Image:
    """A picture that libvips has no reader for, decoded as a whole.

    Raises:
        OSError: unreadable.
    """
    with Image.open(path) as opened:
        wide = opened.convert("L") if opened.mode == "1" else opened
        if wide.mode not in ("L", "RGB", "RGBA"):
            wide = wide.convert("RGB")
        colours = "b-w" if wide.mode == "L" else "srgb"
        found = pyvips.Image.new_from_array(np.asarray(wide), interpretation=colours)
        across, down = (float(dots) / _MM_OF_INCH for dots in opened.info.get("dpi", (0, 0)))
    return found.copy(xres=across, yres=down) if across > 0 < down else found


def with_exif(source: Path) -> pyvips.Image:
    """A pixel that has the EXIF of a tiff file in libvips' fields."""
    exif = Image.Exif()
    try:
        with source.open("rb") as stream:
            directory = ImageFileDirectory_v2(_header(stream))
            exif.bigtiff, exif.endian = directory._bigtiff, directory._endian
            exif.load_from_fp(stream, directory.next)
            found = _about(exif).tobytes()
    except (OSError, SyntaxError, ValueError, struct.error):
        _logger.warning("%s: its EXIF cannot be read and is left out", source)
        found = b""
    carrier = BytesIO()
    Image.new("L", (1, 1)).save(carrier, "png", exif=found)
    pixel = pyvips.Image.new_from_buffer(carrier.getvalue(), "").copy()
    for field in [name for name in pixel.get_fields() if "Resolution" in name]:
        pixel.remove(field)  # of the carrier
    return pixel


def add_exif(file: Path, exif: bytes) -> None:
    """Append EXIF to a tiff file in place: a directory with the old entries and the new ones.

    Args:
        exif: as jpg files hold it, with the header ``Exif``.
    """
    read_exif = Image.Exif()
    read_exif.load(exif)
    about = _about(read_exif)
    with file.open("r+b") as stream:
        added = ImageFileDirectory_v2(_header(stream))
        order, big = added._endian, added._bigtiff
        counted, offset, size = ("Q", "Q", 20) if big else ("H", "L", 12)
        first = struct.calcsize(f"={counted}")
        stream.seek(added.next)
        (count,) = struct.unpack(order + counted, stream.read(first))
        entries = [stream.read(size) for _ in range(count)]
        known = {_tag(entry, order) for entry in entries}
        for tag, value in about.items():
            if tag not in known:
                added[tag] = value
        start = stream.seek(0, 2)
        start += start % 2
        # What is too long for an entry comes behind all entries, the old ones, too.
        written = added.tobytes(start + size * count)
        last = first + size * len(added)
        entries += [written[i : i + size] for i in range(first, last, size)]
        entries.sort(key=lambda entry: _tag(entry, order))
        stream.seek(start)
        stream.write(struct.pack(order + counted, len(entries)) + b"".join(entries))
        stream.write(written[last:])
        stream.seek(struct.calcsize(f"={offset}"))
        stream.write(struct.pack(order + offset, start))


def _header(stream: BinaryIO) -> bytes:
    """Of a tiff file: 8 bytes, or 16 where offsets have 64 bits."""
    header = stream.read(16)
    return header if _BIG in header[2:4] else header[:8]


def _tag(entry: bytes, order: str) -> int:
    found: int = struct.unpack(f"{order}H", entry[:2])[0]
    return found


def _about(exif: Image.Exif) -> Image.Exif:
    """Without what is about the file that it comes from."""
    found = Image.Exif()
    for tag in _ABOUT:
        if tag in exif:
            found[tag] = exif[tag]
    for directory in _INSIDE:
        if inside := exif.get_ifd(directory):
            found[directory] = dict(inside)
    return found
