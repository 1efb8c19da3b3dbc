"""Quantized networks in the experiments that ``condiquant train`` leaves."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import condiquant_basicsr as basicsr_host
from condiquant_basicsr.quantizer import ENTRY, read_quantized
from condiquant_plugin.errors import InputError
from condiquant_recipes.recipe import Recipe, recorded
from condiquant_recipes.run import rebuild


def is_experiment(folder: Path) -> bool:
    """Whether BasicSR keeps an experiment there."""
    return (folder / "models").is_dir()


def trained_network(
    folder: Path, iteration: int | None = None, ema: bool | None = None
) -> tuple[Recipe, nn.Module, str]:
    """The recipe of an experiment, its quantized network, and the file and entry this is from.

    Args:
        folder: BasicSR's experiment.
        iteration: of the checkpoint; None takes the newest file.
        ema: the moving average of the weights; None takes it where there is one.

    Raises:
        InputError: no such checkpoint.
    """
    file = _checkpoint(folder / "models", iteration)
    content = read_quantized(file)
    if ema and "params_ema" not in content:
        raise InputError(f"{file} has no moving average (train.ema_decay): leave out --ema")
    record = content[ENTRY]
    recipe = recorded(record, file)
    if recipe.network_g is None:
        raise InputError(f"{file} does not say which network it holds: train anew")
    network = basicsr_host.folded(basicsr_host.build_network(recipe.network_g))
    model, _ = rebuild(
        network.requires_grad_(False), torch.zeros(1, *record["example_shape"]), recipe
    )
    key = "params_ema" if ema is not False and "params_ema" in content else "params"
    model.load_state_dict(content[key])
    return recipe, model, f"{key} of {file}"


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
