"""Quantized and binarized networks in the experiments that ``condiquant train`` leaves."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import condiquant_basicsr as basicsr_host
from condiquant_basicsr.models.quantized_base import load_state
from condiquant_basicsr.quantizer import ENTRY, read_quantized
from condiquant_plugin.binary.convolution import binarized_convolutions
from condiquant_plugin.errors import InputError
from condiquant_recipes.recipe import Recipe, recorded
from condiquant_recipes.run import rebuild
from condiquant_recipes.sections import read_yaml


def is_experiment(folder: Path) -> bool:
    """Whether BasicSR keeps an experiment there."""
    return (folder / "models").is_dir()


def trained_network(
    folder: Path, iteration: int | None = None, ema: bool | None = None
) -> tuple[Recipe, nn.Module, str]:
    """The recipe of an experiment, its network, and the file and entry this is from.

    A network with binarized convolutions may be of any ``model_type`` of BasicSR: of it the recipe says
    name, scale and ``network_g``, as the option file in the folder has them.

    Args:
        folder: BasicSR's experiment.
        iteration: of the checkpoint; None takes the newest file.
        ema: the moving average of the weights; None takes it where there is one.

    Raises:
        InputError: no such checkpoint, or a float network.
    """
    file = _checkpoint(folder / "models", iteration)
    content = basicsr_host.read_checkpoint(file)
    binarized = None if ENTRY in content else _binarized(folder, file)
    if binarized is None:
        content = read_quantized(file)
    if ema and "params_ema" not in content:
        raise InputError(f"{file} has no moving average (train.ema_decay): leave out --ema")
    key = "params_ema" if ema is not False and "params_ema" in content else "params"
    if binarized is not None:
        recipe, network = binarized
        load_state(network, content[key], file)
        return recipe, network.requires_grad_(False), f"{key} of {file}"
    record = content[ENTRY]
    recipe = recorded(record, file)
    if recipe.network_g is None:
        raise InputError(f"{file} does not say which network it holds: train anew")
    network = basicsr_host.folded(basicsr_host.build_network(recipe.network_g))
    model, _ = rebuild(
        network.requires_grad_(False), torch.zeros(1, *record["example_shape"]), recipe
    )
    model.load_state_dict(content[key])
    return recipe, model, f"{key} of {file}"


def _binarized(folder: Path, file: Path) -> tuple[Recipe, nn.Module] | None:
    """A recipe and the untrained network of an experiment; None without binarized convolutions."""
    for written in sorted(folder.glob("*.yml"), key=lambda path: -path.stat().st_mtime_ns):
        options = read_yaml(written)
        if not isinstance(options.get("network_g"), dict):
            continue
        network = basicsr_host.build_network(options["network_g"])
        if not binarized_convolutions(network):
            return None
        recipe = Recipe(
            name=options.get("name", folder.name),
            scale=options["scale"],
            seed=options.get("manual_seed") or 0,
            network_g=options["network_g"],
            path={"pretrain_network_g": str(file)},
            datasets={"test": []},
            condiquant={"scope": "all"},
        )
        return recipe, network
    return None


def _checkpoint(folder: Path, iteration: int | None) -> Path:
    names = {path.stem.removeprefix("net_g_"): path for path in folder.glob("net_g_*.pth")}
    numbers = sorted(int(name) for name in names if name.isdigit())
    if iteration is not None and str(iteration) not in names:
        raise InputError(
            f"{folder} has no net_g_{iteration}.pth; iterations: {', '.join(map(str, numbers)) or 'none'}"
        )
    if not names:
        raise InputError(
            f"{folder} has no net_g_*.pth yet: wait for a checkpoint of `condiquant train`"
        )
    if iteration is None:
        return max(names.values(), key=lambda path: path.stat().st_mtime_ns)
    return names[str(iteration)]
