"""Image files as arrays; needs OpenCV, which is imported with this module alone."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from condiquant_plugin.errors import InputError
from condiquant_plugin.files import write_atomic

_SHOWN_FILES = 3
_UPRIGHT = cv2.IMREAD_ANYDEPTH | cv2.IMREAD_ANYCOLOR  # IMREAD_UNCHANGED ignores EXIF orientation
_told: set[tuple[object, ...]] = set()
_logger = logging.getLogger(__name__)


def read_picture(path: Path) -> NDArray[np.float32]:
    """RGB image, shape ``(3, H, W)``, range 0 to 1; other kinds are converted and a line is logged.

    It is upright: turned and mirrored as the file's EXIF orientation says.

    Raises:
        InputError: missing, unreadable, or neither 8 nor 16 bits a channel.
    """
    try:
        data = np.fromfile(path, np.uint8)
    except OSError as error:
        raise InputError(f"cannot read image {path}: {error.strerror}") from error
    image = _decoded(data, _UPRIGHT)
    if image is None:
        raise InputError(f"{path} is no readable image")
    if image.dtype not in (np.uint8, np.uint16):
        raise InputError(f"{path}: {image.dtype} pixels; convert it to 8 or 16 bits a channel")
    if image.dtype == np.uint16:
        _logger.warning("%s: 16-bit image scaled to 0..1", path)
    pixels = image.astype(np.float32) / np.float32(np.iinfo(image.dtype).max)
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    if pixels.shape[2] < 3:
        _logger.warning("%s: grayscale image repeated to RGB", path)
        pixels = pixels[:, :, :1].repeat(3, axis=2)
    elif _has_alpha(data):
        _logger.warning("%s: alpha channel dropped", path)
    rgb = pixels[:, :, 2::-1]
    return np.ascontiguousarray(rgb.transpose(2, 0, 1))


def _decoded(data: NDArray[np.uint8], flags: int) -> NDArray[Any] | None:
    return cv2.imdecode(data, flags) if data.size else None


def _has_alpha(data: NDArray[np.uint8]) -> bool:
    stored = _decoded(data, cv2.IMREAD_UNCHANGED)
    return stored is not None and stored.shape[2:] == (4,)


def pictures(files: Iterable[Path]) -> list[Path]:
    """The files that begin as a picture does, sorted; a line is logged once of a folder with others."""
    found: list[Path] = []
    others: dict[Path, list[str]] = {}
    for file in sorted(files):
        if is_picture(file):
            found.append(file)
        else:
            others.setdefault(file.parent, []).append(file.name)
    for folder, names in others.items():
        if (told := (folder, *names)) not in _told:
            _told.add(told)
            more = ", ..." if len(names) > _SHOWN_FILES else ""
            shown = ", ".join(names[:_SHOWN_FILES]) + more
            _logger.warning("%s: skipped, as no pictures (%d): %s", folder, len(names), shown)
    return found


def is_picture(file: Path) -> bool:
    """Whether a file begins as a picture does, or cannot be read, which reading it explains."""
    if not os.access(file, os.R_OK):
        return True
    status = file.stat()
    return _has_reader(str(file), status.st_mtime_ns, status.st_size)


@cache  # BasicSR's dataset of a whole folder is opened for each of its images
def _has_reader(file: str, _modified: int, _size: int) -> bool:
    return cv2.haveImageReader(file)


def write_picture(path: Path, image: NDArray[np.float32]) -> None:
    """Writes an 8-bit RGB PNG; ``image`` has shape ``(3, H, W)``, range 0 to 1, and is clamped.

    Raises:
        InputError: another suffix than .png, or a place that cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise InputError(f"{path}: images are written as PNG; end the name in .png")
    encoded = cv2.imencode(".png", to_levels(image)[:, :, ::-1])[1]
    try:
        write_atomic(path, encoded.tobytes())
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error


def to_levels(image: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Shape ``(3, H, W)`` in 0 to 1 becomes ``(H, W, 3)`` in 0 to 255, clamped and rounded."""
    levels = np.rint(np.asarray(image, np.float32).clip(0, 1) * 255).astype(np.uint8)
    return np.ascontiguousarray(levels.transpose(1, 2, 0))
