"""Upscaling an image of any size with an IR."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from condiquant_openvino.running.instruction_sets import warn_of_overflow
from condiquant_openvino.running.reading import core_of_process, read_ir, read_metadata
from condiquant_plugin import InputError

if TYPE_CHECKING:
    from torch import Tensor

Image = TypeVar("Image", "Tensor", NDArray[np.float32])
_TILE, _OVERLAP = 256, 32


def compile_ir(
    model: ov.Model, device: str = "CPU", properties: Mapping[str, str] | None = None
) -> ov.CompiledModel:
    """Compile with float operators in f32, every other property at its default.

    Args:
        properties: OpenVINO properties to set otherwise.

    Raises:
        InputError: if there is no such device.
    """
    core = core_of_process()
    warn_of_overflow(model)
    if device.split(".")[0].split(":")[0] not in {"AUTO", "MULTI", "HETERO"} | {
        name.split(".")[0] for name in core.available_devices
    }:
        devices = ", ".join(core.available_devices)
        raise InputError(f"device {device!r} is not available: use one of {devices}")
    try:
        return core.compile_model(
            model, device, {"INFERENCE_PRECISION_HINT": "f32", **(properties or {})}
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise InputError(f"device {device!r} cannot run this IR: {reason}") from error


def _takes_u8_nhwc(model: ov.Model) -> bool:
    """Whether a model takes 8-bit images of shape ``(1, height, width, 3)``."""
    port = model.input()
    return bool(
        port.get_element_type() == ov.Type.u8
        and port.get_partial_shape().compatible(ov.PartialShape([1, -1, -1, 3]))
    )


class Upscaler:
    """Runs an IR on images of any size, in overlapping tiles where they are large or it is static.

    Every output pixel is taken from the tile in which it lies farthest from the border, so a
    network whose receptive field reaches no farther than half the overlap gives the untiled result.
    An IR of 8-bit images (:func:`condiquant_openvino.take_u8_nhwc`) gets the image rounded to 256 levels.

    Args:
        path: IR (.xml); the metadata entry ``pad_multiple`` is the multiple that height and width
            of the network's input must have (1 if absent).
        tile: height and width of a tile in input pixels, for an IR of dynamic size; 256 by default.
            A static IR has tiles of its own shape.
        overlap: pixels that neighbouring tiles share; by default 32, or a quarter of a small tile.

    Attributes:
        channels: of the images that the IR takes.

    Raises:
        InputError: on a file that is no IR, an unknown device, or an impossible tile or overlap.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        device: str = "CPU",
        tile: int | None = None,
        overlap: int | None = None,
    ) -> None:
        model = read_ir(path)
        self._multiple = int(read_metadata(model).get("pad_multiple", 1))
        shape = model.input().get_partial_shape()
        self._u8_nhwc = _takes_u8_nhwc(model)
        if self._u8_nhwc:
            shape = ov.PartialShape([shape[0], shape[3], shape[1], shape[2]])
        if shape.rank.is_dynamic or shape.rank.get_length() != 4:
            raise InputError(f"{path} takes no image: its input has shape {shape}")
        self.channels = shape[1].get_length() if shape[1].is_static else 3
        self._static = shape[2].is_static and shape[3].is_static
        if self._static:
            self._tile = (shape[2].get_length(), shape[3].get_length())
            if tile is not None and (tile, tile) != self._tile:
                raise InputError(f"tile={tile} does not fit a static IR: leave it out")
        else:
            size = _TILE if tile is None else tile
            if size < 1:
                raise InputError(f"tile={size} is not supported: use at least 1")
            size = next_multiple(size, self._multiple)
            self._tile = (size, size)
        smallest = min(self._tile)
        self._overlap = min(_OVERLAP, smallest // 4) if overlap is None else overlap
        if not 0 <= self._overlap < smallest:
            raise InputError(f"overlap={overlap} is not supported: use 0 to {smallest - 1}")
        self._network = compile_ir(model, device)

    def __call__(self, image: Image, progress: Callable[[int, int], object] | None = None) -> Image:
        """Upscale one image.

        Args:
            image: RGB in [0, 1], shape ``(3, height, width)``; of an IR for Y alone ``(1, height, width)``.
            progress: called with the number of finished tiles and of all tiles.

        Returns:
            Float32, as many channels, shape ``(3, scale * height, scale * width)``, not clipped unless
            the IR gives 8-bit images; a tensor for a tensor.

        Raises:
            InputError: if the image has another shape.
        """
        pixels = np.asarray(image, dtype=np.float32)
        if pixels.ndim != 3 or pixels.shape[0] != self.channels or 0 in pixels.shape:
            raise InputError(
                f"image has shape {pixels.shape}: expected ({self.channels}, height, width)"
            )
        upscaled: Any = self._upscale(pixels, progress or (lambda done, total: None))
        torch: Any = sys.modules.get("torch")  # who has no tensor needs no torch
        is_tensor = torch is not None and isinstance(image, torch.Tensor)
        return torch.from_numpy(upscaled) if is_tensor else upscaled

    def _upscale(
        self, image: NDArray[np.float32], progress: Callable[[int, int], object]
    ) -> NDArray[np.float32]:
        height, width = image.shape[1:]
        padded = [next_multiple(size, self._multiple) for size in (height, width)]
        if self._static:
            padded = [max(size, tile) for size, tile in zip(padded, self._tile, strict=True)]
        image = np.pad(
            image, ((0, 0), (0, padded[0] - height), (0, padded[1] - width)), "symmetric"
        )
        tile = [min(size, tile) for size, tile in zip(padded, self._tile, strict=True)]
        rows, columns = (
            _spans(size, extent, self._overlap) for size, extent in zip(padded, tile, strict=True)
        )
        result, done = np.empty(0, np.float32), 0
        for top, first_row, last_row in rows:
            for left, first_column, last_column in columns:
                patch = image[None, :, top : top + tile[0], left : left + tile[1]]
                output = self._run(patch)
                scale = output.shape[1] // tile[0]
                if not done:
                    result = np.empty((output.shape[0], *(scale * p for p in padded)), np.float32)
                result[
                    :,
                    scale * first_row : scale * last_row,
                    scale * first_column : scale * last_column,
                ] = output[
                    :,
                    scale * (first_row - top) : scale * (last_row - top),
                    scale * (first_column - left) : scale * (last_column - left),
                ]
                done += 1
                progress(done, len(rows) * len(columns))
        return result[:, : scale * height, : scale * width].copy()

    def _run(self, patch: NDArray[np.float32]) -> NDArray[np.float32]:
        """One tile, ``(1, 3, height, width)``, to ``(3, scale * height, scale * width)``."""
        if not self._u8_nhwc:
            return self._network([np.ascontiguousarray(patch)])[0][0]
        levels = np.rint(patch.clip(0, 1) * 255).astype(np.uint8).transpose(0, 2, 3, 1)
        output = self._network([np.ascontiguousarray(levels)])[0][0]
        return output.transpose(2, 0, 1) / np.float32(255)


def next_multiple(size: int, multiple: int) -> int:
    """The smallest multiple that is not below ``size``."""
    return -(-size // multiple) * multiple


def _spans(size: int, tile: int, overlap: int) -> list[tuple[int, int, int]]:
    """Start of every tile and the range it writes; ranges join in the middle of the overlaps.

    >>> _spans(20, 10, 4)
    [(0, 0, 8), (6, 8, 13), (10, 13, 20)]
    """
    step = max(tile - overlap, 1)  # a tile that is the whole image may be as small as the overlap
    starts = [*range(0, size - tile, step), size - tile]
    seams = [(after + before + tile) // 2 for before, after in pairwise(starts)]
    return list(zip(starts, [0, *seams], [*seams, size], strict=True))
