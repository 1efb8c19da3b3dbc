"""A recipe for a checkpoint and a folder of photographs: what else it needs is found."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from torch import nn

import condiquant_basicsr as basicsr_host
import condiquant_nncf as nncf_host
from condiquant_plugin.errors import InputError
from condiquant_plugin.layerwise.scope import Scope
from condiquant_recipes.exporting import example_image
from condiquant_recipes.recipe import CalibrationSection, Recipe, with_overrides


def recipe_for(
    model: Path,
    images: Path,
    scope: Scope | None = None,
    overrides: Sequence[str] = (),
) -> Recipe:
    """The recipe of a network that spandrel recognises.

    Name, scale, size of the crops and scope are the network's: with attention in it, its linear layers and
    attention are quantized, else its convolutions.

    Args:
        model: a checkpoint.
        images: photographs to calibrate on.
        scope: instead of the one found.
        overrides: ``key.sub=value``, which win over what is found.

    Raises:
        InputError: a missing or unknown checkpoint, or an override that cannot be.
    """
    if model.suffix in {".yml", ".yaml"}:
        raise InputError(f"{model} is a recipe: give it to `condiquant run`")
    if not images.is_dir():
        raise InputError(f"--images {images} is no folder: give one with photographs")
    network, scale = basicsr_host.load_network(None, str(model))
    multiple = basicsr_host.pad_multiple(network)
    crop = -(-CalibrationSection().crop // multiple) * multiple
    recipe = Recipe(
        name=re.sub(r"[^\w.+-]", "_", model.stem),
        scale=scale,
        path={"pretrain_network_g": str(model.resolve())},
        datasets={
            "calibration": {"folders": [str(images.resolve())], "crop": crop},
            "test": [],
            "reference": "float",
        },
        condiquant={
            "scope": scope or _scope(network, crop),
            "weight_granularity": "channel",
        },
    )
    return with_overrides(recipe, overrides)


def _scope(network: nn.Module, size: int) -> Scope:
    wrapped = nncf_host.wrap(network, example_image(size))
    layers = nncf_host.find_layers(wrapped, "all")
    attends = any(layer.weight_name is None for layer in layers)
    return "transformer" if attends else "all"
