"""The output folder of a run: finished stages on disk, so that a rerun with --resume goes on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from condiquant_plugin.errors import InputError
from condiquant_recipes.recipe import Recipe, load_recipe

_RECIPE, _STAGES, _NETWORK = "recipe.yml", "stages", "quantized.safetensors"


class Workspace:
    """Paths and files of one output folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def create(cls, folder: Path, recipe: Recipe, *, resume: bool) -> Workspace:
        """Make or reopen the folder; without ``resume`` the stages of an earlier run are dropped.

        Raises:
            InputError: not writable, or ``resume`` with another recipe.
        """
        workspace = cls(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if resume and workspace.recipe_path.exists():
                if load_recipe(workspace.recipe_path).digest() != recipe.digest():
                    raise InputError(
                        f"{folder} holds a run of another recipe: "
                        "leave out --resume, or give another --out"
                    )
            else:
                shutil.rmtree(folder / _STAGES, ignore_errors=True)
            (folder / _STAGES).mkdir(exist_ok=True)
            write_text(workspace.recipe_path, recipe.to_yaml())
        except OSError as error:
            raise InputError(
                f"cannot write to {folder}: {error.strerror}; give another --out"
            ) from error
        return workspace

    @classmethod
    def open(cls, folder: Path) -> tuple[Workspace, Recipe]:
        """Open the folder of a finished run.

        Raises:
            InputError: if it holds none.
        """
        workspace = cls(folder)
        if not workspace.network_path.exists():
            raise InputError(
                f"{folder} holds no finished run: run `condiquant run` with --out {folder}"
            )
        return workspace, load_recipe(workspace.recipe_path)

    @property
    def recipe_path(self) -> Path:
        return self.folder / _RECIPE

    @property
    def network_path(self) -> Path:
        """Parameters of the finished quantized network, bounds included."""
        return self.folder / _NETWORK

    @property
    def distillation_path(self) -> Path:
        """Where distillation keeps its state."""
        return self.folder / _STAGES / "distillation.pt"

    def finished(self, stage: str) -> dict[str, Any] | None:
        """What a finished stage recorded, if it has finished."""
        path = self.folder / _STAGES / f"{stage}.json"
        if not path.exists():
            return None
        record: dict[str, Any] = json.loads(path.read_text())
        return record

    def finish(
        self, stage: str, record: Mapping[str, Any], network: nn.Module | None = None
    ) -> None:
        """Record a stage, with the network's parameters if it changed them."""
        if network is not None:
            save_parameters(network, self.folder / _STAGES / f"{stage}.safetensors")
        write_text(self.folder / _STAGES / f"{stage}.json", json.dumps(record))

    def restore(self, stage: str, network: nn.Module) -> None:
        """Load the parameters that a finished stage left."""
        load_parameters(network, self.folder / _STAGES / f"{stage}.safetensors")


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def save_parameters(network: nn.Module, path: Path) -> None:
    """Save all parameters (not buffers: those come with the architecture)."""
    tensors = {n: p.detach().contiguous().clone() for n, p in network.named_parameters()}
    temporary = path.with_name(path.name + ".part")
    save_file(tensors, temporary)
    os.replace(temporary, path)


@torch.no_grad()
def load_parameters(network: nn.Module, path: Path) -> None:
    """Load what :func:`save_parameters` saved.

    Raises:
        InputError: unreadable, or the parameters of another network.
    """
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read {path}: {error}; run again without --resume") from error
    own = dict(network.named_parameters())
    if own.keys() != tensors.keys():
        name = min(own.keys() ^ tensors.keys())
        raise InputError(f"{path} belongs to another network (parameter {name}): run again")
    for name, parameter in own.items():
        parameter.copy_(tensors[name])
