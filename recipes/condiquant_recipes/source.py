"""What a run reads: the float network of a recipe, calibration crops, test sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

import condiquant_basicsr as basicsr_host
from condiquant_plugin.errors import InputError
from condiquant_recipes.exporting import check_overflow
from condiquant_recipes.progress import Progress
from condiquant_recipes.recipe import Recipe


@dataclass(frozen=True)
class Source:
    """The float network of a recipe and the data that a run needs."""

    network: nn.Module
    multiple: int
    crops: Tensor
    held_out: Tensor
    test_sets: Mapping[str, Sequence[basicsr_host.TestImage]]


def load_source(
    recipe: Recipe, data: Path, sets: Sequence[str], progress: Progress | None = None
) -> Source:
    """Load and check everything a run reads, before it computes anything.

    Args:
        progress: shows what is downloaded, and says whose code is run.

    Raises:
        InputError: whatever is missing or does not fit.
    """
    check_overflow(recipe)
    if (channels := basicsr_host.input_channels(recipe.network_g)) != 3:
        raise InputError(
            f"{recipe.name} takes {channels}-channel images, but run and compare need RGB:"
            " use `condiquant train`, `test` and `export`"
        )
    shown = progress or Progress()
    if (file := own_code(recipe)) is not None:
        shown.note(f"running the code of {file.resolve()}")
    weights = recipe.path
    with_bar = shown.console is not None and shown.console.is_terminal
    basicsr_host.resolve(weights.pretrain_network_g, weights.sha256, progressbar=with_bar)
    network = load_network(recipe)
    calibration = recipe.datasets.calibration
    count = calibration.taken
    if (training := recipe.datasets.train) is not None:
        section = {**training, "gt_size": calibration.crop * recipe.scale}
        crops = basicsr_host.training_crops(section, recipe.scale, count, recipe.seed)
    else:
        folders = [data / folder for folder in calibration.folders]
        crops = basicsr_host.calibration_crops(
            folders, recipe.scale, calibration.crop, count, recipe.seed
        )
    multiple = basicsr_host.pad_multiple(network, recipe.pad_multiple)
    if calibration.crop % multiple:
        right = -(-calibration.crop // multiple) * multiple
        remedy = f"use {right}"
        if training is not None:
            remedy = f"use datasets.train.gt_size={right * recipe.scale}"
        raise InputError(
            f"datasets.calibration.crop={calibration.crop} is not a multiple of {multiple}, "
            f"which {type(basicsr_host.bare(network)).__name__} needs: {remedy}"
        )
    key, factor = ("datasets.calibration.crop", 1)
    if training is not None:
        key, factor = ("datasets.train.gt_size", recipe.scale)
    basicsr_host.check_crop_size(network, calibration.crop, channels, key, factor)
    test_sets = {name: _test_set(recipe, data, name) for name in sets}
    crops, held_out = crops[: -calibration.held_out], crops[-calibration.held_out :]
    kept = _with_most_detail(crops, calibration.count)
    return Source(network, multiple, kept, held_out, test_sets)


def _with_most_detail(crops: Tensor, count: int) -> Tensor:
    """Those of ``crops``, ``(all, channels, height, width)``, whose neighbouring pixels differ most."""
    differences = (crops.diff(dim=axis).abs().mean((1, 2, 3)) for axis in (2, 3))
    kept = sum(differences, torch.zeros(len(crops))).topk(count).indices.sort().values
    return crops[kept]


def held_out_hr(recipe: Recipe, data: Path) -> Tensor:
    """What a source's held-out crops were reduced from.

    Raises:
        InputError: the crops come from a training set of BasicSR's.
    """
    if recipe.datasets.train is not None:
        raise InputError("--target drop needs photographs (datasets.calibration): use fidelity")
    calibration = recipe.datasets.calibration
    folders = [data / folder for folder in calibration.folders]
    pairs = basicsr_host.calibration_pairs(
        folders, recipe.scale, calibration.crop, calibration.taken, recipe.seed
    )
    drawn = calibration.count * calibration.drawn
    return torch.stack([hr for _, hr in islice(pairs, drawn, None)])


def _test_set(recipe: Recipe, data: Path, name: str) -> Sequence[basicsr_host.TestImage]:
    section = recipe.datasets
    if section.train is None:
        return basicsr_host.test_pairs(data, name, recipe.scale)
    if name not in section.val:
        known = ", ".join(section.val) or "none"
        raise InputError(f"no validation set is named {name!r}; there are: {known}")
    return basicsr_host.validation_pairs(section.val[name])


def load_network(recipe: Recipe) -> nn.Module:
    """The float network, frozen, for images in 0 to 1."""
    network, _ = basicsr_host.load_network(
        recipe.network_g,
        recipe.path.pretrain_network_g,
        recipe.path.sha256,
        recipe.path.param_key_g,
        recipe.scale,
        basicsr_host.input_channels(recipe.network_g),
    )
    network = basicsr_host.in_range(network, recipe.img_range, recipe.mean)
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    return network


def code_digest(recipe: Recipe) -> dict[str, str]:
    """What a resumed run must share of the user's own code."""
    file = own_code(recipe)
    return {} if file is None else {"code": sha256(file.read_bytes()).hexdigest()}


def own_code(recipe: Recipe) -> Path | None:
    """The user's file whose code makes the network, if one does."""
    kind = (recipe.network_g or {}).get("type")
    return basicsr_host.code_file(str(kind)) if basicsr_host.is_own(kind) else None
