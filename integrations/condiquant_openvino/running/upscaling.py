"""Upscaling images of any size with an IR."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from condiquant_openvino.running.channels import Part, join, split
from condiquant_openvino.running.in_order import OrderedQueue
from condiquant_openvino.running.instruction_sets import warn_of_overflow
from condiquant_openvino.running.memory import largest_tile
from condiquant_openvino.running.reading import core_of_process, read_ir, read_metadata
from condiquant_openvino.running.tiling import Axis, Mosaic, Picture, strips
from condiquant_plugin import InputError

if TYPE_CHECKING:
    from torch import Tensor

Image = TypeVar("Image", "Tensor", NDArray[np.float32])
AnyPicture = TypeVar("AnyPicture", bound=Picture)
_OVERLAP = 32
_LEAST_TILE, _USUAL_TILE, _MOST_TILE = 64, 256, 512


def compile_ir(
    model: ov.Model, device: str = "CPU", properties: Mapping[str, Any] | None = None
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

    Tiles are joined by linear ramps over the middle half of their overlap, so a network whose
    receptive field reaches no farther than a quarter of it gives the untiled result. Inference of a
    tile, preparing the next and joining the last go on at the same time.
    An IR of 8-bit images (:func:`condiquant_openvino.take_u8_nhwc`) gets the image rounded to 256 levels.

    Args:
        path: IR (.xml); the metadata entry ``pad_multiple`` is the multiple that height and width
            of the network's input must have (1 if absent).
        tile: most of the height and width of a tile in input pixels, for an IR of dynamic size; by
            default 512, or what the free memory allows. A static IR has tiles of its own shape.
        overlap: pixels that neighbouring tiles share; by default 32, or a quarter of a small tile.
        properties: of OpenVINO, as for :func:`compile_ir`.
        model: what :func:`condiquant_openvino.read_ir` made of ``path``, if it was read already.

    Attributes:
        channels: of the images that the IR takes.
        takes_u8: whether it takes 8-bit images.

    Raises:
        InputError: on a file that is no IR, an unknown device, or an impossible tile or overlap.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        device: str = "CPU",
        tile: int | None = None,
        overlap: int | None = None,
        properties: Mapping[str, Any] | None = None,
        model: ov.Model | None = None,
    ) -> None:
        self._path, self._model = path, model or read_ir(path)
        self._multiple = int(read_metadata(self._model).get("pad_multiple", 1))
        shape = self._model.input().get_partial_shape()
        self.takes_u8 = _takes_u8_nhwc(self._model)
        if self.takes_u8:
            shape = ov.PartialShape([shape[0], shape[3], shape[1], shape[2]])
        if shape.rank.is_dynamic or shape.rank.get_length() != 4:
            raise InputError(f"{path} takes no image: its input has shape {shape}")
        self.channels = shape[1].get_length() if shape[1].is_static else 3
        self._static = shape[2].is_static and shape[3].is_static
        self._tile: tuple[int, int] | None = None
        if self._static:
            self._tile = (shape[2].get_length(), shape[3].get_length())
            if tile is not None and (tile, tile) != self._tile:
                raise InputError(f"tile={tile} does not fit a static IR: leave it out")
        elif tile is not None:
            if tile < 1:
                raise InputError(f"tile={tile} is not supported: use at least 1")
            self._tile = 2 * (next_multiple(tile, self._multiple),)
        self._given_overlap = overlap
        if overlap is not None and overlap < 0:
            raise InputError(f"overlap={overlap} is not supported: use at least 0")
        if self._tile is not None and 2 * (overlap or 0) > min(self._tile):
            raise InputError(
                f"overlap={overlap} is not supported: use 0 to {min(self._tile) // 2}, half a tile"
            )
        self._scales: dict[tuple[int, int], int] = {}
        self._network = compile_ir(self._model, device, properties)
        self._streams = self._network.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
        self._queue = OrderedQueue(self._network, self._streams)

    def __call__(self, image: Image, progress: Callable[[int, int], object] | None = None) -> Image:
        """Upscale one image.

        Args:
            image: RGB in [0, 1], shape ``(3, height, width)``; of an IR for Y alone ``(1, height, width)``.
            progress: called with the number of finished tiles and of all tiles.

        Returns:
            Float32, as many channels, shape ``(3, scale * height, scale * width)``, not clipped unless
            the IR gives 8-bit images; a tensor for a tensor.

        Raises:
            InputError: if the image has another shape, or a size that the IR cannot take.
        """
        pixels = np.asarray(image, dtype=np.float32)
        if pixels.ndim != 3 or pixels.shape[0] != self.channels or 0 in pixels.shape:
            raise InputError(
                f"image has shape {pixels.shape}: expected ({self.channels}, height, width)"
            )
        bands = [rows for _, rows in self.bands([_InMemory(pixels)], progress)]
        upscaled: Any = np.concatenate(bands, axis=1)
        torch: Any = sys.modules.get("torch")  # who has no tensor needs no torch
        is_tensor = torch is not None and isinstance(image, torch.Tensor)
        return torch.from_numpy(upscaled) if is_tensor else upscaled

    def bands(
        self,
        pictures: Iterable[AnyPicture],
        progress: Callable[[int, int], object] | None = None,
    ) -> Iterator[tuple[AnyPicture, NDArray[np.float32]]]:
        """Upscale pictures one after the other; tiles of the next are begun while one is finished.

        Grey goes through an RGB network as RGB, and an alpha channel as a picture of its own.

        Args:
            progress: called with the number of finished tiles of a picture, and of all its tiles.

        Yields:
            A picture and the next rows of its enlargement, from top to bottom, shape
            ``(channels, any, scale * width)``, float32, not clipped.

        Raises:
            InputError: a size that the IR cannot take.
        """
        outputs: list[Part] = []
        for (plan, row, column, tile, count), output in self._queue.run(self._patches(pictures)):
            outputs.append(self._leaving(output))
            if len(outputs) < count:
                continue
            rows = plan.mosaic.add(row, column, join(outputs, tile))
            outputs.clear()
            if progress is not None:
                across = len(plan.columns.starts)
                progress(row * across + column + 1, len(plan.rows.starts) * across)
            if rows is not None:
                yield plan.picture, rows

    def _patches(
        self, pictures: Iterable[AnyPicture]
    ) -> Iterator[tuple[_Tile[AnyPicture], NDArray[Any] | float]]:
        """What the network is to compute, in order; a number stands for a constant channel."""
        for picture in pictures:
            padded = self._padded(picture.height, picture.width)
            tile = self._tile_for(padded)
            rows, columns = (
                Axis.cover(size, extent, self._overlap)
                for size, extent in zip(padded, tile, strict=True)
            )
            plan = _Plan(picture, rows, columns, self._scale_of_tile(tile))
            for row, strip in enumerate(strips(picture, rows, padded)):
                for column, left in enumerate(columns.starts):
                    cut = strip[:, :, left : left + columns.tile]
                    parts = split(cut, self.channels)
                    for part in parts:
                        yield (plan, row, column, cut, len(parts)), self._entering(part)

    @property
    def _overlap(self) -> int:
        if self._given_overlap is not None:
            return self._given_overlap
        return _OVERLAP if self._tile is None else min(_OVERLAP, min(self._tile) // 4)

    def _padded(self, height: int, width: int) -> tuple[int, int]:
        found = tuple(next_multiple(size, self._multiple) for size in (height, width))
        if self._static and self._tile is not None:
            found = tuple(max(size, tile) for size, tile in zip(found, self._tile, strict=True))
        return found[0], found[1]

    def _tile_for(self, padded: tuple[int, int]) -> tuple[int, int]:
        if self._tile is None and max(padded) > _USUAL_TILE:
            least = next_multiple(max(_LEAST_TILE, 2 * self._overlap), self._multiple)
            sizes = range(least, max(_MOST_TILE, least) + 1, self._multiple)
            self._tile = 2 * (largest_tile(self._reshaped((least, least)), sizes, self._streams),)
        if self._tile is None:
            return padded
        if self._static:
            return self._tile
        height, width = (
            self._fitted(size, most) for size, most in zip(padded, self._tile, strict=True)
        )
        return height, width

    def _fitted(self, size: int, most: int) -> int:
        """The smallest tile of which no more are needed than of the largest."""
        if size <= most:
            return size
        count = -(-(size - self._overlap) // (most - self._overlap))
        return next_multiple(-(-(size + (count - 1) * self._overlap) // count), self._multiple)

    def _reshaped(self, tile: tuple[int, int]) -> ov.Model:
        trial = self._model.clone()
        shape = [1, *tile, 3] if self.takes_u8 else [1, self.channels, *tile]
        try:
            trial.reshape(shape)
        except RuntimeError as error:
            raise self._refusal(tile) from error
        return trial

    def _scale_of_tile(self, tile: tuple[int, int]) -> int:
        """Worked out before the first inference: with one thread some kernels die on wrong shapes."""
        if tile not in self._scales:
            shape = self._reshaped(tile).output().get_partial_shape()
            sizes = [shape[axis] for axis in ((1, 2) if self.takes_u8 else (2, 3))]
            if any(
                size.is_dynamic or size.get_length() % extent
                for size, extent in zip(sizes, tile, strict=True)
            ):
                raise self._refusal(tile)
            scales = {size.get_length() // extent for size, extent in zip(sizes, tile, strict=True)}
            if len(scales) > 1:
                raise self._refusal(tile)
            self._scales[tile] = scales.pop()
        return self._scales[tile]

    def _refusal(self, tile: tuple[int, int]) -> InputError:
        return InputError(
            f"{self._path} takes no images of {tile[1]}x{tile[0]}: export it "
            "with --static, or give a --tile"
        )

    def _entering(self, tile: Part) -> NDArray[Any] | float:
        if isinstance(tile, float):
            return tile
        if not self.takes_u8:
            return np.ascontiguousarray(tile[None])
        levels = np.rint(tile.clip(0, 1) * 255).astype(np.uint8)
        return np.ascontiguousarray(levels.transpose(1, 2, 0)[None])

    def _leaving(self, output: NDArray[Any] | float) -> Part:
        if isinstance(output, float) or not self.takes_u8:
            return output
        return (output.transpose(2, 0, 1) / np.float32(255)).astype(np.float32, copy=False)


class _Plan(Generic[AnyPicture]):
    """How a picture is cut, and what there is of its enlargement."""

    def __init__(self, picture: AnyPicture, rows: Axis, columns: Axis, scale: int) -> None:
        self.picture, self.rows, self.columns = picture, rows, columns
        size = (picture.height, picture.width)
        self.mosaic = Mosaic(rows, columns, size, scale, picture.channels)


_Tile = tuple[_Plan[AnyPicture], int, int, NDArray[np.float32], int]
"""A plan, the row and column of a tile, its pixels, and of how many parts it is."""


class _InMemory:
    def __init__(self, pixels: NDArray[np.float32]) -> None:
        self._pixels = pixels
        self.channels, self.height, self.width = pixels.shape

    def rows(self, top: int, bottom: int) -> NDArray[np.float32]:
        return self._pixels[:, top:bottom]


def next_multiple(size: int, multiple: int) -> int:
    """The smallest multiple that is not below ``size``."""
    return -(-size // multiple) * multiple
