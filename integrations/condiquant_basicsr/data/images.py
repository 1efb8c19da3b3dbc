"""Images as tensors, and MATLAB's bicubic reduction, by which SR test sets are made."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from condiquant_plugin.errors import InputError
from condiquant_plugin.files import write_atomic

_SHOWN_FILES = 3
_UPRIGHT = cv2.IMREAD_ANYDEPTH | cv2.IMREAD_ANYCOLOR  # IMREAD_UNCHANGED ignores EXIF orientation
_told: set[tuple[object, ...]] = set()
_logger = logging.getLogger(__name__)


def read_image(path: Path) -> Tensor:
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
    return torch.from_numpy(np.ascontiguousarray(rgb.transpose(2, 0, 1)))


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


def write_image(path: Path, image: Tensor) -> None:
    """Writes an 8-bit RGB PNG; ``image`` has shape ``(3, H, W)``, range 0 to 1, and is clamped.

    Raises:
        InputError: another suffix than .png, or a place that cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise InputError(f"{path}: images are written as PNG; end the name in .png")
    encoded = cv2.imencode(".png", to_uint8(image)[:, :, ::-1])[1]
    try:
        write_atomic(path, encoded.tobytes())
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error


def to_uint8(image: Tensor) -> NDArray[np.uint8]:
    """Shape ``(3, H, W)`` in 0 to 1 becomes ``(H, W, 3)`` in 0 to 255, clamped and rounded."""
    levels = image.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8)
    return levels.permute(1, 2, 0).contiguous().cpu().numpy()


def to_tensor(image: NDArray[np.uint8]) -> Tensor:
    """Shape ``(H, W, 3)`` in 0 to 255 becomes ``(3, H, W)`` in 0 to 1."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float() / 255


def matlab_downscale(image: NDArray[np.uint8], scale: int) -> NDArray[np.uint8]:
    """MATLAB's ``imresize(image, 1 / scale, 'bicubic')`` with antialiasing, bit for bit.

    Args:
        image: shape ``(H, W, 3)``; what ``scale`` leaves over, right and bottom, is cropped.

    Returns:
        Shape ``(H // scale, W // scale, 3)``.
    """
    height, width = (side // scale * scale for side in image.shape[:2])
    rows = _reduce_rows(image[:height, :width].astype(np.float64), scale)
    return _reduce_rows(rows.swapaxes(0, 1), scale).swapaxes(0, 1).astype(np.uint8)


def _reduce_rows(image: NDArray[np.float64], scale: int) -> NDArray[np.float64]:
    """One pass along the first axis; like MATLAB's, it ends with rounding to 8 bits."""
    indices, weights = _taps(image.shape[0], scale)
    output = np.zeros((indices.shape[0], *image.shape[1:]))
    for index, weight in zip(indices.T, weights.T, strict=True):  # the order of sums decides ties
        output += weight[:, None, None] * image[index]
    return np.floor(output.clip(0, 255) + 0.5)


def _taps(size: int, scale: int) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Source rows and weights of each output row, both of shape ``(size // scale, taps)``."""
    center = (np.arange(size // scale) + 0.5) * scale - 0.5
    first = np.floor(center - 2 * scale).astype(np.intp)
    source = first[:, None] + np.arange(4 * scale + 2)
    weights = _cubic((center[:, None] - source) / scale)
    weights /= weights.sum(1, keepdims=True)
    mirrored = np.concatenate([np.arange(size), np.arange(size)[::-1]])
    return mirrored[source % (2 * size)], weights


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' kernel with a = -1/2."""
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0.0))
