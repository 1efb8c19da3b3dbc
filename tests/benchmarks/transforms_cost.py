"""What transforms and scales of rows cost an IR: bytes, and latency in turns against the float network.

Run from the repository root: ``CONDIQUANT_DATA=DATA python tests/benchmarks/transforms_cost.py RECIPE BITS
[--isa avx2]``, as ``dat_light/x4.yml 4``. Calibrated on few crops: what it computes matters to neither.
"""

import argparse
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import condiquant_openvino as openvino_host
from condiquant_recipes.recipe import load_recipe, with_condiquant
from condiquant_recipes.recipe_files import recipe_path
from condiquant_recipes.run import calibrate_network
from condiquant_recipes.source import load_source

FORMS = {
    "neither": ("none", "tensor"),
    "aligned inputs": ("alignment", "tensor"),
    "softmax maps by row": ("none", "row"),
    "both": ("alignment", "row"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("bits")
    parser.add_argument("--isa", default="vnni")
    given = parser.parse_args()
    recipe = load_recipe(
        recipe_path(given.recipe),
        [
            f"condiquant.weight_bits={given.bits}",
            f"condiquant.activation_bits={given.bits}",
            "condiquant.recondition.enabled=false",
            "datasets.calibration.count=8",
        ],
    )
    source = load_source(recipe, Path(os.environ["CONDIQUANT_DATA"]), [])
    example = torch.rand(1, 3, recipe.export.tile, recipe.export.tile)
    with TemporaryDirectory() as folder:
        files = {}
        for name, (transform, scale) in FORMS.items():
            variant = with_condiquant(recipe, transform=transform, softmax_scale=scale)
            model = calibrate_network(source, variant).model
            ir, in_float = openvino_host.convert_beside_float(
                model, example, static=True, isa=given.isa
            )
            for title, each in {"float": in_float, name: ir}.items():
                files[title] = Path(folder) / f"{title}.xml"
                openvino_host.save(each, files[title])
        measured = openvino_host.compare_latency(
            {name: str(path) for name, path in files.items()}, hint="latency"
        )
        for name, path in files.items():
            ratio = measured[name]["ratio"]
            sizes = [f"{p.stat().st_size:,}" for p in (path.with_suffix(".bin"), path)]
            print(f"{name}: {ratio:.3f} of float; {sizes[0]} bytes of .bin, {sizes[1]} of .xml")


if __name__ == "__main__":
    main()
