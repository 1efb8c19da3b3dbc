"""How long a run will take, from forward passes of its network that are timed before it starts."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from condiquant_plugin.errors import InputError
from condiquant_plugin.layerwise.blocks import module_geometry
from condiquant_plugin.layerwise.moments import has_wide_patches
from condiquant_plugin.layerwise.scope import Scope
from condiquant_recipes.exporting import example_image
from condiquant_recipes.progress import Progress
from condiquant_recipes.recipe import Recipe, load_recipe, with_overrides
from condiquant_recipes.source import load_network
from condiquant_recipes.workspace import RECIPE

_TIMED = 3
# Forward passes on a crop, as measured on SRVGGNetCompact (all) and DAT-light (transformer).
_BOUNDS, _MOMENTS = 3.0, 13.0
"""Of calibration for each crop: what goes by the network, and what by the moments of layers' inputs, where
these are as many as the outputs."""
_PATCHES = 5.1, 350.0
"""Of wide 3x3 convolutions, by channels squared and by channels, in place of their inputs squared."""
_TRAINING = 7.0
"""Of an iteration for each crop in its batch: forward and backward passes through fake quantizers."""
_VALIDATION = 2.0
_EXPORT, _EXPORT_SECONDS = 60.0, 5.0
"""Of the export, on the tile that it is traced with; and what does not go by the network."""
_SPREAD = 1.8
"""Expected is from so many times less to so many times more: layers differ, and so do machines."""


@dataclass(frozen=True)
class ExpectedTime:
    """Of a run without test sets, in seconds."""

    untrained: float
    """Calibration and export."""
    per_iteration: float
    """Of training, validations included."""

    def seconds(self, iterations: int) -> tuple[float, float]:
        """From, to."""
        middle = self.untrained + iterations * self.per_iteration
        return middle / _SPREAD, middle * _SPREAD

    def text(self, iterations: int) -> str:
        """The range in words, such as ``2 to 6 min``."""
        low, high = self.seconds(iterations)
        unit, divisor = ("s", 1) if high < 120 else ("min", 60) if high < 7200 else ("h", 3600)
        return f"{max(1, math.floor(low / divisor))} to {math.ceil(high / divisor)} {unit}"

    def iterations_within(self, minutes: float) -> int:
        """Iterations of training for which there is time, two digits of them.

        Raises:
            InputError: there is none for calibration and export.
        """
        count = math.floor((60 * minutes - self.untrained) / self.per_iteration)
        if count < 0:
            raise InputError(
                f"--minutes {minutes:g}: without training it is expected to take"
                f" {self.text(0)}: give more, or --iterations 0"
            )
        digits = 10 ** max(0, len(str(count)) - 2)
        return count // digits * digits


def expected_time(network: nn.Module, recipe: Recipe, crops: Tensor) -> ExpectedTime:
    """Time forward passes and multiply.

    Args:
        crops: of the recipe's size, shape ``(count, 3, height, width)``.
    """
    calibration, training = recipe.datasets.calibration, recipe.condiquant.distillation
    crop = median(_passes(network, crops[:1]))
    tile_area = (recipe.export.tile / calibration.crop) ** 2
    validation = _VALIDATION * calibration.held_out / training.validate_every
    per_crop = _BOUNDS + _MOMENTS * _moments(network, recipe.condiquant.scope)
    return ExpectedTime(
        per_crop * crop * (calibration.count + calibration.held_out)
        + _EXPORT * crop * tile_area
        + _EXPORT_SECONDS,
        crop * (_TRAINING * training.batch_size + validation),
    )


def _moments(network: nn.Module, scope: Scope) -> float:
    """Multiplications in the second moments of the layers' inputs, by those in the layers."""
    modules = list(network.modules())
    linear = [m for m in modules if isinstance(m, nn.Linear)]
    layers = sum(m.weight.numel() for m in linear)
    products = float(sum(m.in_features**2 for m in linear))
    if scope == "all":
        convolutions = [m for m in modules if isinstance(m, nn.Conv2d)]
        layers += sum(m.weight.numel() for m in convolutions)
        products += sum(_of_convolution(m) for m in convolutions)
    return products / layers if layers else 0.0


def _of_convolution(layer: nn.Conv2d) -> float:
    features = layer.weight[0].numel()
    if has_wide_patches(layer.in_channels, module_geometry(layer)):
        return _PATCHES[0] * layer.in_channels**2 + _PATCHES[1] * layer.in_channels
    return float(features**2)


def within(recipe: Recipe, minutes: float, out: Path | None, progress: Progress) -> Recipe:
    """The recipe with as many iterations as there is time for.

    A folder that has this run begun keeps its iterations, which another measurement would change.

    Args:
        out: where the run goes; ``None`` to start anew in any case.

    Raises:
        InputError: no time for calibration and export.
    """
    begun = out and out / RECIPE
    if begun is not None and begun.is_file():
        iterations = load_recipe(begun).condiquant.distillation.iterations
        progress.note(f"keeping the {iterations} iterations of the run in {out} (not: --overwrite)")
    else:
        calibration = recipe.datasets.calibration
        crops = example_image(calibration.crop)
        expected = expected_time(load_network(recipe), recipe, crops)
        iterations = expected.iterations_within(minutes)
        progress.note(f"training for {iterations} iterations")
    return with_overrides(recipe, [f"condiquant.distillation.iterations={iterations}"])


@torch.no_grad()
def _passes(network: nn.Module, crop: Tensor) -> Iterator[float]:
    network(crop)
    for _ in range(_TIMED):
        started = time.perf_counter()
        network(crop)
        yield time.perf_counter() - started
