"""Options and arguments that several commands of ``condiquant`` share, and what becomes of them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from condiquant_plugin.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from condiquant_recipes.progress import Progress
    from condiquant_recipes.recipe import Recipe

_PIPE = 10_000
"""Characters; tables take only what they need."""

RecipeArgument = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="A recipe or a BasicSR training YAML.")
]
DataOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder with a recipe's calibration and test images.", envvar="CONDIQUANT_DATA"
    ),
]
SetsOption = Annotated[
    str, typer.Option(help="Test sets, comma-separated (default: the recipe's).")
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Drop what the folder holds, and start anew.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY.SUB=VALUE", help="Override a recipe key.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
DeviceOption = Annotated[str, typer.Option(help="OpenVINO device.")]
LayersOption = Annotated[
    bool, typer.Option("--layers", help="Of an IR: also what each layer runs as, and why not int8.")
]


def console() -> Console:
    """Of standard output, as wide as what is printed where that is no terminal: a pipe cuts no names."""
    from rich.console import Console

    wide = None if sys.stdout.isatty() or os.environ.get("COLUMNS") else _PIPE
    return Console(width=wide)


def progress(quiet: bool) -> Progress:
    """Bars on the terminal, or nothing."""
    from condiquant_recipes.progress import Progress

    if quiet:
        return Progress()
    from rich.console import Console

    return Progress(Console(stderr=True))


def data_folder(data: Path | None) -> Path:
    """A folder that is there."""
    if data is None:
        raise InputError("no data folder: give --data DIR or set CONDIQUANT_DATA")
    if not data.is_dir():
        raise InputError(f"data folder {data} does not exist: give --data DIR")
    return data


def recipe_data(recipe: Recipe, data: Path | None) -> Path:
    """The folder that a recipe's own are in, if it has any."""
    return Path() if recipe.datasets.train is not None else data_folder(data)


def split(names: str) -> list[str]:
    """Names between commas."""
    found = [name.strip() for name in names.split(",") if name.strip()]
    if names and not found:
        raise InputError(f"{names!r} names nothing: give names, comma-separated, or leave it out")
    return found


def ir_path(model: Path) -> Path:
    """Of a file, or of what is in a run's folder."""
    return model / "model.xml" if model.is_dir() else model
