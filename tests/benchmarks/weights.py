"""Which weights are closest to the float network before distillation: every way, and every rounding.

Run from the repository root: ``CONDIQUANT_DATA=DATA python tests/benchmarks/weights.py RECIPE W/A ...``,
such as ``dat_light/x4.yml 4/4 3/3 2/2``.
"""

import os
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

import condiquant_basicsr as basicsr_host
import condiquant_nncf as nncf_host
from condiquant_recipes import settings
from condiquant_recipes.recipe import load_recipe
from condiquant_recipes.recipe_files import recipe_path
from condiquant_recipes.source import load_source


def main() -> None:
    torch.manual_seed(0)
    name, *widths = sys.argv[1:]
    for width in widths:
        weight_bits, activation_bits = width.split("/")
        overrides = [
            f"condiquant.weight_bits={weight_bits}",
            f"condiquant.activation_bits={activation_bits}",
        ]
        recipe = load_recipe(recipe_path(name), overrides)
        source = load_source(recipe, Path(os.environ["CONDIQUANT_DATA"]), ["Set5"])
        upscale = partial(basicsr_host.upscale, scale=recipe.scale, multiple=source.multiple)
        for rounding in ("nearest", "gptq"):
            config = replace(settings.quantization(recipe), rounding=rounding)
            started = time.perf_counter()
            result = nncf_host.quantize_network(
                source.network, source.crops, config, held_out=source.held_out
            )
            seconds = time.perf_counter() - started
            against = {"HR": None, "float": partial(upscale, source.network)}
            scores = {
                label: basicsr_host.evaluate(
                    partial(upscale, result.model),
                    source.test_sets["Set5"],
                    recipe.scale,
                    lambda *_: None,
                    reference=reference,
                )["psnr"]
                for label, reference in against.items()
            }
            ways = ", ".join(f"{n} {db:.2f}" for n, db in result.calibration.fidelity.items())
            print(
                f"{width} {rounding}: held out, dB: {ways}; chosen: {result.calibration.chosen}; "
                f"Set5 to HR {scores['HR']:.2f}, to float {scores['float']:.2f}; {seconds:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
