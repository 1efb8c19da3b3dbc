"""A recipe for a checkpoint and a folder of photographs: what else it needs is found."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

import condiquant_basicsr as basicsr_host
import condiquant_nncf as nncf_host
from condiquant_plugin.errors import InputError
from condiquant_plugin.layerwise.scope import Scope
from condiquant_recipes.exporting import example_image
from condiquant_recipes.recipe import CalibrationSection, Recipe, with_overrides
from condiquant_recipes.sections import apply_override


def recipe_for(
    model: Path,
    images: Path,
    scope: Scope | None = None,
    overrides: Sequence[str] = (),
    own_network: str | None = None,
) -> Recipe:
    """The recipe of a network that spandrel recognises, or of one's own.

    Name, scale, size of the crops and scope are the network's: with attention in it, its linear layers and
    attention are quantized, else its convolutions.

    Args:
        model: a checkpoint.
        images: photographs to calibrate on.
        scope: instead of the one found.
        overrides: ``key.sub=value``, which win over what is found.
        own_network: ``FILE.py:Class``, whose code is run; its arguments are ``network_g.NAME=value`` among
            the overrides.

    Raises:
        InputError: a missing or unknown checkpoint, or an override that cannot be.
    """
    if model.suffix in {".yml", ".yaml"}:
        raise InputError(f"{model} is a recipe: give it to `condiquant run`")
    if not images.is_dir():
        raise InputError(f"--images {images} is no folder: give one with photographs")
    section: dict[str, Any] = {}
    if own_network is not None:
        path = basicsr_host.code_file(own_network).resolve()
        section = {"network_g": {"type": f"{path}:{own_network.rpartition(':')[2]}"}}
    for override in overrides:
        if override.startswith("network_g."):
            apply_override(section, override)
    network_g = section.get("network_g")
    network, scale = basicsr_host.load_network(network_g, str(model))
    multiple = basicsr_host.pad_multiple(network)
    crop = -(-CalibrationSection().crop // multiple) * multiple
    recipe = Recipe(
        name=re.sub(r"[^\w.+-]", "_", model.stem),
        scale=scale,
        network_g=network_g,
        path={"pretrain_network_g": str(model.resolve())},
        datasets={
            "calibration": {"folders": [str(images.resolve())], "crop": crop},
            "test": [],
            "reference": "float",
        },
        condiquant={
            "scope": scope or _scope(network, crop),
            "transform": "auto",
            "softmax_scale": "auto",
            "weight_granularity": "channel",
        },
    )
    return with_overrides(recipe, overrides)


def _scope(network: nn.Module, size: int) -> Scope:
    wrapped = nncf_host.wrap(network, example_image(size))
    layers = nncf_host.find_layers(wrapped, "all")
    attends = any(layer.weight_name is None for layer in layers)
    return "transformer" if attends else "all"
