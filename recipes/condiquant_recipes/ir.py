"""Commands that work on an IR."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import condiquant_basicsr as basicsr_host
import condiquant_openvino as openvino_host
from condiquant_plugin.errors import InputError
from condiquant_recipes.progress import Progress
from condiquant_recipes.recipe import Recipe
from condiquant_recipes.run import export, load_network, rebuild
from condiquant_recipes.workspace import Workspace, load_parameters


def evaluate(
    model: Path, data: Path, sets: Sequence[str], device: str, progress: Progress
) -> dict[str, Any]:
    """Scores of an IR per test set.

    Raises:
        InputError: no IR, no metadata of this project, missing test sets.
    """
    scale = openvino_host.read_metadata(model).get("scale")
    if scale is None:
        raise InputError(f"{model} was not exported by condiquant: its scale is unknown")
    upscaler = openvino_host.Upscaler(model, device)
    pairs = {name: basicsr_host.test_pairs(data, name, scale) for name in sets}
    scores = {}
    for name, test_set in pairs.items():
        with progress.bar(f"{model.name} on {name}", len(test_set)) as advance:
            scores[name] = basicsr_host.evaluate(
                lambda image: torch.as_tensor(upscaler(image[0]))[None], test_set, scale, advance
            )
    return scores


def export_again(
    folder: Path, target: Path, changes: Mapping[str, Any], progress: Progress
) -> dict[str, Any]:
    """Export a finished run with some keys of the recipe's ``export`` section changed.

    Raises:
        InputError: no finished run, or values out of range.
    """
    workspace, recipe = Workspace.open(folder)
    values = recipe.model_dump()
    values["export"] |= changes
    try:
        recipe = Recipe.model_validate(values)
    except ValueError as error:
        raise InputError(f"export: {' '.join(str(error).split())}") from error
    network = load_network(recipe)
    multiple = basicsr_host.pad_multiple(network, recipe.pad_multiple)
    size = recipe.datasets.calibration.crop
    model, _ = rebuild(network, torch.zeros(1, 3, size, size), recipe)
    load_parameters(model, workspace.network_path)
    return export(model, recipe, multiple, target, progress)


def upscale(
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
        InputError: unreadable IR or image, unknown device, unwritable output.
    """
    if output.suffix.lower() != ".png" or not output.parent.is_dir():
        raise InputError(f"cannot write {output}: give a .png in an existing folder")
    pixels = basicsr_host.read_image(image)
    upscaler = openvino_host.Upscaler(model, device, tile, overlap)
    with progress.bar("upscaling", 1) as advance:
        result = upscaler(pixels, lambda done, total: advance("tiles", done, total))
    basicsr_host.write_image(output, torch.as_tensor(result))
