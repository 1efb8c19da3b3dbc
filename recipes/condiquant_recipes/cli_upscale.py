"""The command ``condiquant upscale``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from condiquant_plugin.errors import InputError
from condiquant_recipes.cli_options import DeviceOption, QuietOption, ir_path, progress


class Precision(StrEnum):
    """Of float operators."""

    f32 = "f32"
    bf16 = "bf16"
    f16 = "f16"


class Format(StrEnum):
    """Of pictures."""

    png = "png"
    jpg = "jpg"
    webp = "webp"
    tiff = "tiff"


class Alpha(StrEnum):
    """What enlarges an alpha channel."""

    network = "network"
    bicubic = "bicubic"


def upscale(
    model: Annotated[Path, typer.Argument(help="model.xml, or the output folder of a run.")],
    source: Annotated[
        Path, typer.Argument(metavar="INPUT", help="A picture, a folder of them, or a video.")
    ],
    output: Annotated[
        Path, typer.Argument(metavar="OUTPUT", help="File, or folder, to write; as INPUT is.")
    ],
    scale: Annotated[
        float | None,
        typer.Option(min=0.01, max=64, help="By resampling, where it is not the network's."),
    ] = None,
    file_format: Annotated[
        Format | None,
        typer.Option("--format", help="Of a folder's pictures (default: each as its input)."),
    ] = None,
    quality: Annotated[
        int | None,
        typer.Option(min=1, max=100, help="Of jpg and webp (default: 95), of video (70)."),
    ] = None,
    suffix: Annotated[
        str, typer.Option(help="Added to the names of a folder's pictures, as _x4.")
    ] = "",
    recursive: Annotated[
        bool, typer.Option("--recursive", "-r", help="Pictures in folders of the folder, too.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what exists (default: skip it).")
    ] = False,
    alpha: Annotated[Alpha, typer.Option(help="What enlarges an alpha channel.")] = Alpha.network,
    device: DeviceOption = "CPU",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of inference (default: as many as cores).")
    ] = None,
    precision: Annotated[Precision, typer.Option(help="Of float operators.")] = Precision.f32,
    tile: Annotated[
        int | None, typer.Option(help="Most of a tile's sides (default: as memory allows).")
    ] = None,
    overlap: Annotated[int | None, typer.Option(help="Pixels that tiles share.")] = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder for compiled networks.", envvar="CONDIQUANT_CACHE"),
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Enlarge a picture, a folder of pictures or a video with an IR."""
    if "/" in suffix or "\\" in suffix:
        raise InputError(f"--suffix {suffix!r} has a folder in it: give it as OUTPUT")
    from condiquant_recipes.upscaling.model import Hardware
    from condiquant_recipes.upscaling.request import Request

    Request(
        model=ir_path(model),
        source=source,
        output=output,
        scale=scale,
        ending=None if file_format is None else f".{file_format.value}",
        quality=quality,
        suffix=suffix,
        recursive=recursive,
        overwrite=overwrite,
        bicubic_alpha=alpha is Alpha.bicubic,
        hardware=Hardware(device, threads, precision.value, tile, overlap, cache),
    ).run(progress(quiet))
