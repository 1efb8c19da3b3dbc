"""What a budget buys: PSNR on test sets (undistilled on the first), and minutes without the export.

Run from the repository root: ``CONDIQUANT_DATA=DATA python tests/benchmarks/budgets.py RECIPE BUDGET W/A
... [--method 2dquant | condition] [--sets Set5 Set14] [--seeds 0 1 2] [--set KEY=VALUE ...]``, as
``dat_light/x4.yml quick 4/4 3/3 2/2``. ``condition`` is the paper's recipe: lower condition numbers, then
2DQuant.
"""

import argparse
import os
import time
from functools import partial
from pathlib import Path

import torch

import condiquant_basicsr as basicsr_host
from condiquant_recipes.progress import Progress
from condiquant_recipes.recipe import Recipe, load_recipe
from condiquant_recipes.recipe_files import recipe_path
from condiquant_recipes.run import calibrate_network, distill_network
from condiquant_recipes.source import load_source

OFF = {
    "crops with detail": "datasets.calibration.drawn=1",
    "softmax maps by row": "condiquant.softmax_scale=tensor",
    "aligned inputs": "condiquant.transform=none",
    "equal channels": "condiquant.equalize=false",
    "new weights": "condiquant.recondition.enabled=false",
    "rounding with moments": "condiquant.rounding=nearest",
    "weight bounds per channel": "condiquant.weight_granularity=tensor",
    "trained weights": "condiquant.distillation.weights=false",
    "mirrored and turned crops": "condiquant.distillation.augment=false",
}
"""How each part of the method is left out."""
METHODS = {
    "condiquant": [],
    "2dquant": [*OFF.values()],
    "condition": [
        *(OFF[part] for part in OFF if part != "new weights"),
        "condiquant.recondition.objective=condition",
    ],
}
"""What each sets in a recipe."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("budget")
    parser.add_argument("widths", nargs="+")
    parser.add_argument("--method", choices=[*METHODS], default="condiquant")
    parser.add_argument("--sets", nargs="+", default=["Set5"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--set", nargs="+", default=[], dest="overrides")
    return parser.parse_args()


def scores(model, source, recipe, reference=None, sets=None) -> dict[str, float]:
    upscale = partial(basicsr_host.upscale, scale=recipe.scale, multiple=source.multiple)
    return {
        name: basicsr_host.evaluate(
            partial(upscale, model),
            pairs,
            recipe.scale,
            lambda *_: None,
            reference=reference and partial(upscale, reference),
        )["psnr"]
        for name, pairs in source.test_sets.items()
        if sets is None or name in sets
    }


def recipe_at(name: str, budget: str, width: str, overrides: list[str]) -> Recipe:
    """A recipe with its weights' and inputs' bits as ``W/A``."""
    weight_bits, activation_bits = width.split("/")
    bits = [
        f"condiquant.weight_bits={weight_bits}",
        f"condiquant.activation_bits={activation_bits}",
    ]
    return load_recipe(recipe_path(name), [f"budget={budget}", *bits, *overrides])


def row(given: argparse.Namespace, width: str, seed: int) -> str:
    overrides = [f"seed={seed}", *METHODS[given.method], *given.overrides]
    recipe = recipe_at(given.recipe, given.budget, width, overrides)
    torch.manual_seed(seed)
    source = load_source(recipe, Path(os.environ["CONDIQUANT_DATA"]), given.sets)
    reference = source.network if recipe.datasets.reference == "float" else None
    started = time.perf_counter()
    quantized = calibrate_network(source, recipe)
    calibrated = time.perf_counter() - started
    before = scores(quantized.model, source, recipe, reference, given.sets[:1])
    started = time.perf_counter()
    distill_network(quantized.model, quantized.layers, source, recipe, Progress())
    distilled = time.perf_counter() - started
    after = scores(quantized.model, source, recipe, reference)
    undistilled = ", ".join(f"{name} {value:.2f}" for name, value in before.items())
    found = ", ".join(f"{name} {value:.2f}" for name, value in after.items())
    return (
        f"{recipe.name} {width} {given.method} {given.budget} seed {seed}: {quantized.calibration.chosen}; "
        f"undistilled {undistilled}; {found} dB; "
        f"{calibrated / 60:.1f} + {distilled / 60:.1f} min"
    )


def main() -> None:
    given = arguments()
    for width in given.widths:
        for seed in given.seeds:
            print(row(given, width, seed), flush=True)


if __name__ == "__main__":
    main()
