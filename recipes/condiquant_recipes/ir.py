"""Commands that work on an IR."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import condiquant_basicsr as basicsr_host
from condiquant_plugin import fake_quantizers
from condiquant_plugin.binary.convolution import binarized_convolutions
from condiquant_plugin.errors import InputError
from condiquant_recipes.exporting import example_image, export, tile_size
from condiquant_recipes.float_export import export_float_of
from condiquant_recipes.progress import Progress
from condiquant_recipes.recipe import Recipe, with_export
from condiquant_recipes.run import rebuild
from condiquant_recipes.source import load_network
from condiquant_recipes.training.experiment import is_experiment, trained_network
from condiquant_recipes.upscaling.model import rgb_upscaler, run_metadata
from condiquant_recipes.workspace import Workspace, load_parameters


def evaluate(
    model: Path, data: Path, sets: Sequence[str], device: str, progress: Progress
) -> dict[str, Any]:
    """Scores of an IR per test set.

    Raises:
        InputError: no IR, no metadata of this project, missing test sets.
    """
    scale = run_metadata(model)["scale"]
    upscaler = rgb_upscaler(model, device)
    pairs = {name: basicsr_host.test_pairs(data, name, scale) for name in sets}
    scores = {}
    for name, test_set in pairs.items():
        with progress.bar(f"{model.name} on {name}", len(test_set)) as advance:
            scores[name] = basicsr_host.evaluate(
                lambda image: torch.as_tensor(upscaler(image[0]))[None], test_set, scale, advance
            )
    return scores


def export_again(
    folder: Path,
    target: Path,
    changes: Mapping[str, Any],
    progress: Progress,
    iteration: int | None = None,
    ema: bool | None = None,
    *,
    also_float: bool = False,
) -> dict[str, Any]:
    """Export a finished run, or an experiment of BasicSR, with some keys of ``export`` changed.

    A run that was calibrated for an NPU keeps its grids on the CPU, which can run them. One that was
    calibrated for the CPU gets other grids on an NPU; what that costs is reported.

    Args:
        changes: of the recipe's ``export`` section.
        iteration, ema: which network of an experiment; see
            :func:`condiquant_recipes.training.experiment.trained_network`.
        also_float: write the network before quantization, too, as ``float.xml``.

    Returns:
        As :func:`condiquant_recipes.exporting.export`.

    Raises:
        InputError: no finished run, or values out of range.
    """
    if is_experiment(folder):
        calibrated, model, origin = trained_network(folder, iteration, ema)
        notes = [f"exported are {origin}"]
    elif iteration is None and ema is None:
        calibrated, model = _finished_run(folder)
        notes = []
    else:
        raise InputError(
            f"{folder} is no experiment of `condiquant train`: leave out --iteration and --ema"
        )
    if also_float and binarized_convolutions(model):
        raise InputError(f"{folder} was trained with one bit: there is no network for --float")
    if changes.get("device") == "NPU":
        changes = {"static": None, **changes}
    recipe = with_export(calibrated, changes)
    multiple = basicsr_host.pad_multiple(model, recipe.pad_multiple)
    moved = None
    if recipe.export.device == "NPU" and calibrated.export.device != "NPU":
        with progress.status("moving the grids"):
            moved = _move_zero_onto_grids(
                model,
                example_image(
                    tile_size(recipe, multiple),
                    channels=basicsr_host.input_channels(recipe.network_g),
                ),
            )
    figures = export(model, recipe, multiple, target, progress, moved)
    if also_float:
        export_float_of(recipe, target, progress)
    return figures | {"notes": notes + figures["notes"]}


def _finished_run(folder: Path) -> tuple[Recipe, nn.Module]:
    workspace, recipe = Workspace.open(folder)
    size = recipe.datasets.calibration.crop
    model, _ = rebuild(load_network(recipe), torch.zeros(1, 3, size, size), recipe)
    load_parameters(model, workspace.network_path)
    return recipe, model


@torch.no_grad()
def _move_zero_onto_grids(model: nn.Module, image: Tensor) -> dict[str, float]:
    """Search the weights' bounds again, shift those of activations; returns what it does to the output."""
    before = model(image)
    for quantizer in fake_quantizers(model).values():
        quantizer.zero_on_grid = True
        if quantizer.kind == "weight":
            quantizer.search_on_next_input = True
        elif not quantizer.in_float:
            snapped = quantizer.snapped()
            quantizer.set_bounds(snapped.lower, snapped.upper)
    difference = (model(image) - before).abs()
    return {
        "zero_on_grid_mean_abs": float(difference.mean()),
        "zero_on_grid_max_abs": float(difference.max()),
    }
