"""How close a quantized network is to the float one on whole images.

Run from the repository root: ``CONDIQUANT_DATA=DATA python tests/benchmarks/whole_images.py RECIPE BITS
[--iterations N] [KEY=VALUE ...]``, as ``dat_light/x4.yml 4 datasets.calibration.drawn=2 seed=1``. Prints
PSNR to the float output, nothing trained and after that many iterations: the mean of every third of DIV2K's
100 validation crops, which nothing else here uses, and of Set5.
"""

import argparse
import os
import warnings
from functools import partial
from pathlib import Path

import torch
from budgets import recipe_at

import condiquant_basicsr as basicsr_host
from condiquant_recipes.progress import Progress
from condiquant_recipes.run import calibrate_network, distill_network
from condiquant_recipes.source import load_source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("bits")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--iterations", type=int, default=0)
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    data = Path(os.environ["CONDIQUANT_DATA"])
    overrides = [f"condiquant.distillation.iterations={given.iterations}", *given.overrides]
    recipe = recipe_at(given.recipe, "quick", f"{given.bits}/{given.bits}", overrides)
    torch.manual_seed(recipe.seed)
    source = load_source(recipe, data, ["Set5"])
    photographs = sorted((data / "calibration/DIV2K_valid_crop256").iterdir())[::3][:33]
    sets = {
        "DIV2K": [basicsr_host.Pair(file.stem, None, file) for file in photographs],
        **source.test_sets,
    }
    quantized = calibrate_network(source, recipe)
    upscale = partial(basicsr_host.upscale, scale=recipe.scale, multiple=source.multiple)

    def show(title: str) -> None:
        found = {
            name: basicsr_host.evaluate(
                partial(upscale, quantized.model),
                images,
                recipe.scale,
                lambda *_: None,
                reference=partial(upscale, source.network),
            )["psnr"]
            for name, images in sets.items()
        }
        figures = ", ".join(f"{name} {value:.2f} dB" for name, value in found.items())
        settings = " ".join(given.overrides)
        print(f"{recipe.name} {given.bits} bits {settings}, {title}: {figures}", flush=True)

    show("nothing trained")
    if given.iterations:
        distill_network(quantized.model, quantized.layers, source, recipe, Progress())
        show(f"after {given.iterations} iterations")


if __name__ == "__main__":
    main()
