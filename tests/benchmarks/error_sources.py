"""Which quantizers the error of a quantized network comes from: each kind left out, the others in place.

Run from the repository root: ``CONDIQUANT_DATA=DATA python tests/benchmarks/error_sources.py RECIPE BITS
[--set KEY=VALUE ...]``, as ``dat_light/x4.yml 4``. Prints PSNR to the float output on the held-out crops,
before distillation.
"""

import argparse
import os
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch

import condiquant_nncf as nncf_host
from condiquant_plugin import FakeQuantizer, fake_quantizers
from condiquant_plugin.uniform.fake_quantizer import snapped_together
from condiquant_recipes import settings
from condiquant_recipes.recipe import load_recipe
from condiquant_recipes.recipe_files import recipe_path
from condiquant_recipes.source import load_source


def kinds(quantizers: Iterable[FakeQuantizer]) -> dict[str, list[FakeQuantizer]]:
    """Quantizers of one place in all blocks, by its name; all weights and all others, too."""
    found = defaultdict(list)
    for quantizer in quantizers:
        found["all weights" if quantizer.kind == "weight" else "all activations"].append(quantizer)
        found[re.sub(r"\d+(?=\.)|\d+(?=/)", "*", quantizer.name)].append(quantizer)
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
    quantized = nncf_host.quantize_network(
        source.network,
        source.crops,
        settings.quantization(recipe),
        bounds_crops=recipe.condiquant.bounds.crops,
        held_out=source.held_out,
    ).model
    crops = source.held_out.split(1)

    @torch.no_grad()
    def to_float() -> float:
        with snapped_together(quantized):
            errors = [(quantized(x) - source.network(x)).square().mean() for x in crops]
        return float(-10 * torch.stack(errors).mean().log10())

    print(f"nothing left out: {to_float():.2f} dB")
    for name, members in kinds(fake_quantizers(quantized).values()).items():
        for quantizer in members:
            quantizer.enabled = False
        print(f"{name} ({len(members)}): {to_float():.2f} dB", flush=True)
        for quantizer in members:
            quantizer.enabled = True


if __name__ == "__main__":
    main()
