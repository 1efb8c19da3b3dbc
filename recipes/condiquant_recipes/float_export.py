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
from condiquant_recipes.exporting import images_of_two_sizes, takes, tile_size
from condiquant_recipes.progress import Progress
from condiquant_recipes.recipe import Recipe
from condiquant_recipes.source import load_network

_TOLERANCE = 1e-3
"""Of the output's range, between torch and the IR."""


def export_float(network: nn.Module, recipe: Recipe, path: Path, progress: Progress) -> None:
    """Write the float network, dynamic where that is right at two sizes, and check it against torch.

    Raises:
        RuntimeError: the IR computes something else.
    """
    multiple = basicsr_host.pad_multiple(network, recipe.pad_multiple)
    channels = basicsr_host.input_channels(recipe.network_g)
    images = images_of_two_sizes(tile_size(recipe, multiple), multiple, channels)
    with progress.status("exporting the float network"):
        ir = None
        if not recipe.export.static and recipe.export.device == "CPU":
            ir = _converted(network, images, recipe.scale)
        static = ir is None
        if ir is None:
            ir = _converted(network, images[:1], recipe.scale)
        if ir is None:
            raise RuntimeError(f"OpenVINO computes another output than {recipe.name} in torch")
        metadata: dict[str, Any] = {
            "network": recipe.name,
            "scale": recipe.scale,
            "pad_multiple": multiple,
            "static": static,
            "preprocessing": "f32_nchw",
            "device": "CPU",
            "plugin_version": __version__,
        }
        openvino_host.set_metadata(ir, metadata)
        openvino_host.save(ir, path)


def export_float_of(recipe: Recipe, folder: Path, progress: Progress) -> None:
    """Write ``float.xml`` beside what a run of the recipe wrote; errors as :func:`export_float`."""
    export_float(load_network(recipe), recipe, folder / "float.xml", progress)


@torch.no_grad()
def _converted(network: nn.Module, images: Sequence[Tensor], scale: int) -> ov.Model | None:
    """An IR that is right on all images, static for one; ``None`` where there is none."""
    first = images[0]
    dims = list(first.shape) if len(images) == 1 else [*first.shape[:2], -1, -1]
    ir = from_torch(network, first, input=[ov.PartialShape(dims)])
    # Inference at a size that the shapes in it do not take may end the process.
    if not all(takes(ir, image, scale) for image in images):
        return None
    compiled = compile_ir(ir)
    for image in images:
        expected, found = network(image).numpy(), compiled([image.numpy()])[0]
        if np.abs(found - expected).max() > _TOLERANCE * np.ptp(expected):
            return None
    return ir
