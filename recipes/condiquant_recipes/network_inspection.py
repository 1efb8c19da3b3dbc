"""``condiquant inspect`` of recipes and checkpoints: the layers of a float network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

import condiquant_basicsr as basicsr_host
import condiquant_nncf as nncf_host
from condiquant_plugin.methods.condiquant.reconditioning import layer_condition
from condiquant_recipes.exporting import example_image
from condiquant_recipes.recipe_files import find_recipe
from condiquant_recipes.settings import quantization
from condiquant_recipes.source import load_network


def describe_recipe(file: Path) -> dict[str, Any]:
    """The recipe, and the network that it names."""
    recipe = find_recipe(file)
    described = _describe_network(
        load_network(recipe),
        recipe.scale,
        recipe.pad_multiple,
        quantization(recipe),
        basicsr_host.input_channels(recipe.network_g),
    )
    return {"recipe": recipe.model_dump(), **described}


def describe_checkpoint(file: Path) -> dict[str, Any]:
    """The network of a checkpoint, its architecture found by spandrel."""
    network, scale = basicsr_host.load_network(None, str(file))
    return _describe_network(network, scale, None, nncf_host.QuantizationConfig(scope="all"))


def _describe_network(
    network: nn.Module,
    scale: int,
    override: int | None,
    config: nncf_host.QuantizationConfig,
    channels: int = 3,
) -> dict[str, Any]:
    multiple = basicsr_host.pad_multiple(network, override)
    size = max(64 // multiple, 1) * multiple
    wrapped = nncf_host.wrap(network, example_image(size, channels=channels))
    layers = config.find_layers(wrapped)
    rows = []
    for layer in layers:
        if layer.weight_name is not None:
            weight = network.get_parameter(layer.weight_name)
            kappa = layer_condition(weight, layer.geometry, layer.row_blocks)
            row = {"name": layer.name, "shape": list(weight.shape), "condition": kappa}
        else:
            row = {"name": layer.name, "shape": None, "condition": None}
        rows.append(row | {"nncf_node": layer.node.node_name})
    return {
        "architecture": type(basicsr_host.bare(network)).__name__,
        "scale": scale,
        "parameters": sum(p.numel() for p in network.parameters()),
        "pad_multiple": multiple,
        "scope": config.scope,
        "layers": rows,
    }
