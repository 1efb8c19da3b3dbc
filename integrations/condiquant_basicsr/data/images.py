"""Images as tensors, and MATLAB's bicubic reduction, by which SR test sets are made."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from condiquant_plugin.pictures import read_picture, to_levels, write_picture


def read_image(path: Path) -> Tensor:
    """:func:`condiquant_plugin.pictures.read_picture` as a tensor."""
    return torch.from_numpy(read_picture(path))


def write_image(path: Path, image: Tensor) -> None:
    """:func:`condiquant_plugin.pictures.write_picture` of a tensor."""
    write_picture(path, image.detach().float().cpu().numpy())


def to_uint8(image: Tensor) -> NDArray[np.uint8]:
    """:func:`condiquant_plugin.pictures.to_levels` of a tensor."""
    return to_levels(image.detach().float().cpu().numpy())


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
