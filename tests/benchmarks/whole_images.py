"""How close a calibrated network is to the float one on whole images, nothing trained.

Run from the repository root: ``CONDIQUANT_DATA=DATA python tests/benchmarks/whole_images.py RECIPE BITS
[KEY=VALUE ...]``, as ``dat_light/x4.yml 4 datasets.calibration.drawn=2 seed=1``. Prints PSNR to the float
output, the mean of every third of DIV2K's 100 validation crops, which nothing else here uses, and of Set5.
"""

import os
import sys
import warnings
from functools import partial
from pathlib import Path

import condiquant_basicsr as basicsr_host
from condiquant_recipes.recipe import load_recipe
from condiquant_recipes.recipe_files import recipe_path
from condiquant_recipes.run import calibrate_network
from condiquant_recipes.source import load_source


def main(name: str, bits: str, *overrides: str) -> None:
    warnings.filterwarnings("ignore")
    data = Path(os.environ["CONDIQUANT_DATA"])
    widths = [f"condiquant.{kind}_bits={bits}" for kind in ("weight", "activation")]
    recipe = load_recipe(recipe_path(name), ["budget=quick", *widths, *overrides])
    source = load_source(recipe, data, ["Set5"])
    photographs = sorted((data / "calibration/DIV2K_valid_crop256").iterdir())[::3][:33]
    sets = {
        "DIV2K": [basicsr_host.Pair(file.stem, None, file) for file in photographs],
        **source.test_sets,
    }
    model = calibrate_network(source, recipe).model
    upscale = partial(basicsr_host.upscale, scale=recipe.scale, multiple=source.multiple)
    reference = partial(upscale, source.network)
    found = {
        title: basicsr_host.evaluate(
            partial(upscale, model), images, recipe.scale, lambda *_: None, reference=reference
        )["psnr"]
        for title, images in sets.items()
    }
    print(f"{recipe.name} {bits} bits {' '.join(overrides)}:", end=" ")
    print(", ".join(f"{title} {value:.2f} dB" for title, value in found.items()), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
