"""Enlarging one picture with an IR."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from condiquant_openvino.running.reading import read_metadata
from condiquant_openvino.running.upscaling import Upscaler
from condiquant_plugin.errors import InputError
from condiquant_plugin.pictures import read_picture, write_picture
from condiquant_recipes.progress import Progress


def upscale_file(
    model: Path,
    image: Path,
    output: Path,
    device: str,
    tile: int | None,
    overlap: int | None,
    progress: Progress,
) -> None:
    """Enlarge an image file.

    Raises:
        InputError: no IR of a run, unreadable image, unknown device, unwritable output.
    """
    if output.suffix.lower() != ".png" or not output.parent.is_dir():
        raise InputError(f"cannot write {output}: give a .png in an existing folder")
    pixels = read_picture(image)
    run_metadata(model)
    upscaler = rgb_upscaler(model, device, tile, overlap)
    with progress.bar("upscaling", 1) as advance:
        result = upscaler(pixels, lambda done, total: advance("tiles", done, total))
    write_picture(output, result)


def run_metadata(model: Path) -> dict[str, Any]:
    """Metadata of an IR that a run has exported."""
    metadata = read_metadata(model)
    if "scale" not in metadata:
        raise InputError(
            f"{model} was not exported by condiquant: its scale is unknown; give the IR of a run"
        )
    return metadata


def rgb_upscaler(model: Path, *options: Any) -> Upscaler:
    """An upscaler of an IR that takes RGB."""
    upscaler = Upscaler(model, *options)
    if upscaler.channels != 3:
        raise InputError(
            f"{model} takes {upscaler.channels}-channel images, and image files are read as RGB:"
            " call condiquant_openvino.Upscaler on the channel"
        )
    return upscaler
