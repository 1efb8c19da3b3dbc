"""The float network as an IR, to set others beside."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch
from torch import Tensor, nn

import condiquant_basicsr as basicsr_host
import condiquant_openvino as openvino_host
from condiquant_openvino.running.upscaling import compile_ir
from condiquant_openvino.writing.from_torch import from_torch
from condiquant_plugin import __version__
from condiquant_plugin.errors import InputError
from condiquant_recipes.exporting import example_image, images_of_two_sizes, takes, tile_size
from condiquant_recipes.progress import Progress
from condiquant_recipes.recipe import Recipe
from condiquant_recipes.source import load_network

_TOLERANCE = 1e-3
"""Of the output's range, between torch and the IR."""


def export_float(network: nn.Module, recipe: Recipe, path: Path, progress: Progress) -> None:
    """Write the float network; errors as :func:`float_ir`."""
    multiple = basicsr_host.pad_multiple(network, recipe.pad_multiple)
    with progress.status("exporting the float network"):
        ir = float_ir(network, recipe, multiple)
        metadata: dict[str, Any] = {
            "network": recipe.name,
            "scale": recipe.scale,
            "pad_multiple": multiple,
            "static": not ir.is_dynamic(),
            "preprocessing": "f32_nchw",
            "device": "CPU",
            "plugin_version": __version__,
        }
        openvino_host.set_metadata(ir, metadata)
        openvino_host.save(ir, path)


def export_float_of(recipe: Recipe, folder: Path, progress: Progress) -> None:
    """Write ``float.xml`` beside what a run of the recipe wrote; errors as :func:`export_float`."""
    export_float(load_network(recipe), recipe, folder / "float.xml", progress)


def float_ir(network: nn.Module, recipe: Recipe, multiple: int) -> ov.Model:
    """OpenVINO's own conversion, checked against torch.

    Of any height and width where that is right at two sizes, unless ``export.static`` says otherwise; else
    of ``export.tile``.

    Raises:
        InputError: right at one size only, with ``export.static: false``.
        RuntimeError: the IR computes something else, or OpenVINO cannot convert the network.
    """
    size, channels = tile_size(recipe, multiple), basicsr_host.input_channels(recipe.network_g)
    if not recipe.export.static and recipe.export.device == "CPU":
        images = images_of_two_sizes(size, multiple, channels)
        for traced in images:
            try:
                ir = from_torch(network, traced, input=[ov.PartialShape([1, channels, -1, -1])])
            except RuntimeError:  # static it may convert
                continue
            if _agrees(ir, network, images, recipe.scale):
                return ir
        if recipe.export.static is False:
            raise InputError(
                f"{recipe.name} is right only at the size it is traced with: set export.static=true"
            )
    image = example_image(size, channels=channels)
    ir = from_torch(network, image, input=[ov.PartialShape(list(image.shape))])
    if not _agrees(ir, network, [image], recipe.scale):
        raise RuntimeError(f"OpenVINO computes another output than {recipe.name} in torch")
    return ir


@torch.no_grad()
def _agrees(ir: ov.Model, network: nn.Module, images: Sequence[Tensor], scale: int) -> bool:
    # Inference at a size that the shapes in it do not take may end the process.
    if not all(takes(ir, image, scale) for image in images):
        return False
    compiled = compile_ir(ir)
    for image in images:
        expected = network(image).numpy()
        try:
            found = compiled([image.numpy()])[0]
        except RuntimeError:
            return False
        if np.abs(found - expected).max() > _TOLERANCE * np.ptp(expected):
            return False
    return True
