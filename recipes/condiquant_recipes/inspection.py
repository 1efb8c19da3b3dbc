"""``condiquant inspect``: IR files, recipes and checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import nn

import condiquant_basicsr as basicsr_host
import condiquant_nncf as nncf_host
import condiquant_openvino as openvino_host
from condiquant_plugin.errors import InputError
from condiquant_plugin.reconditioning import layer_condition
from condiquant_recipes.recipe import load_recipe
from condiquant_recipes.run import example_image, load_network


def describe(file: Path) -> dict[str, Any]:
    """Describe an IR (.xml), a recipe (.yml, .yaml) or a checkpoint.

    Raises:
        InputError: missing or unreadable file.
    """
    if not file.is_file():
        raise InputError(f"{file} does not exist: give an IR, a recipe or a checkpoint")
    if file.suffix == ".xml":
        return openvino_host.inspect(file)
    if file.suffix in {".yml", ".yaml"}:
        recipe = load_recipe(file)
        network = load_network(recipe)
        described = _describe_network(network, recipe.scale, recipe.condiquant.scope)
        return {"recipe": recipe.model_dump(), **described}
    network, scale = basicsr_host.load_network(None, str(file))
    return _describe_network(network, scale, "all")


def _describe_network(network: nn.Module, scale: int, scope: nncf_host.Scope) -> dict[str, Any]:
    multiple = basicsr_host.pad_multiple(network)
    size = max(64 // multiple, 1) * multiple
    layers = nncf_host.find_layers(nncf_host.wrap(network, example_image(size)), scope)
    rows = []
    for layer in layers:
        if layer.weight_name is not None:
            weight = network.get_parameter(layer.weight_name)
            kappa = layer_condition(weight, layer.geometry, layer.row_blocks)
            rows.append({"name": layer.name, "shape": list(weight.shape), "condition": kappa})
        else:
            rows.append({"name": layer.name, "shape": None, "condition": None})
    return {
        "architecture": type(network).__name__,
        "scale": scale,
        "parameters": sum(p.numel() for p in network.parameters()),
        "pad_multiple": multiple,
        "scope": scope,
        "layers": rows,
    }


def tables(described: dict[str, Any]) -> Iterator[Table]:
    """The description as tables."""
    summary = Table("property", "value")
    for key, value in _flat({k: v for k, v in described.items() if k != "layers"}):
        summary.add_row(key, value)
    yield summary
    if "layers" in described:
        layers = Table("layer", "weight", "condition number")
        for row in described["layers"]:
            if row["shape"] is None:
                layers.add_row(row["name"], "product of activations", "")
            else:
                layers.add_row(
                    row["name"], "x".join(map(str, row["shape"])), f"{row['condition']:.1f}"
                )
        yield layers


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)
