"""Which quantizers the error of a quantized network comes from: some left out, all others in place.

Run from the repository root: ``CONDIQUANT_DATA=DATA python tests/benchmarks/error_sources.py RECIPE BITS
[--set KEY=VALUE ...]``, as ``dat_light/x4.yml 4``. Prints PSNR to the float output on the held-out crops,
before distillation.
"""

import argparse
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

import condiquant_nncf as nncf_host
from condiquant_plugin import FakeQuantizer, fake_quantizers
from condiquant_plugin.uniform.fake_quantizer import snapped_together
from condiquant_recipes.recipe import load_recipe
from condiquant_recipes.recipe_files import recipe_path
from condiquant_recipes.run import calibrate_network
from condiquant_recipes.source import load_source


def groups(
    quantizers: Iterable[FakeQuantizer], blocks: Sequence[str]
) -> dict[str, list[FakeQuantizer]]:
    """Quantizers by what they quantize, by block, and by their place in all blocks."""
    found = defaultdict(list)
    for quantizer in quantizers:
        found[f"every {quantizer.kind}"].append(quantizer)
        if quantizer.kind != "weight":
            found["all but weights"].append(quantizer)
        place = quantizer.name
        for block in blocks:
            if place.startswith(f"{block}."):
                found[f"block {block}"].append(quantizer)
                place = place.removeprefix(f"{block}.")
        found[re.sub(r"\.\d+/", "/", place)].append(quantizer)
    return dict(sorted(found.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("bits")
    parser.add_argument("--set", nargs="+", default=[], dest="overrides")
    given = parser.parse_args()
    widths = [f"condiquant.{part}_bits={given.bits}" for part in ("weight", "activation")]
    recipe = load_recipe(recipe_path(given.recipe), ["budget=quick", *widths, *given.overrides])
    torch.manual_seed(recipe.seed)
    source = load_source(recipe, Path(os.environ["CONDIQUANT_DATA"]), [])
    quantized = calibrate_network(source, recipe)
    crops, model = source.held_out.split(1), quantized.model
    with torch.no_grad():
        targets = [source.network(crop) for crop in crops]

    @torch.no_grad()
    def to_float() -> float:
        with snapped_together(model):
            errors = [
                (model(crop) - target).square().mean()
                for crop, target in zip(crops, targets, strict=True)
            ]
        return float(-10 * torch.stack(errors).mean().log10())

    print(f"nothing left out: {to_float():.2f} dB")
    blocks = nncf_host.feature_blocks(source.network, quantized.layers)
    for name, members in groups(fake_quantizers(model).values(), blocks).items():
        for quantizer in members:
            quantizer.enabled = False
        print(f"{name} ({len(members)}): {to_float():.2f} dB", flush=True)
        for quantizer in members:
            quantizer.enabled = True


if __name__ == "__main__":
    main()
