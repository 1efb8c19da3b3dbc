"""The same network through both hosts, without distillation: PSNR, and how far the weights are apart.

python tests/benchmarks/brevitas_against_nncf.py DATA [--hosts nncf brevitas] [--bits 4] [--sets Set5]
    [--recipe recipes/dat_light/x4.yml]

Weights are compared where both hosts run; --sets without a name leaves PSNR out.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import nn

import condiquant_basicsr as basicsr_host
import condiquant_brevitas as brevitas_host
import condiquant_nncf as nncf_host
from condiquant_recipes import settings
from condiquant_recipes.recipe import Recipe, load_recipe
from condiquant_recipes.source import Source, load_source

RECIPE = Path(__file__).parents[2] / "recipes/dat_light/x4.yml"


def through_nncf(source: Source, recipe: Recipe) -> nn.Module:
    config = settings.quantization(recipe)
    crops = recipe.condiquant.bounds.crops
    result = nncf_host.quantize_network(source.network, source.crops, config, bounds_crops=crops)
    return result.model


def through_brevitas(source: Source, recipe: Recipe) -> nn.Module:
    config = settings.quantization(recipe)
    return brevitas_host.quantize_sr(
        source.network,
        source.crops,
        weight_bits=config.weight_bits,
        activation_bits=config.activation_bits,
        scope=config.scope,
        other_bits=config.other_bits,
        weight_granularity=config.weight_granularity,
        activation_side=config.activation_side,
        zero_on_grid=config.zero_on_grid,
        overflow=config.overflow,
        reconditioning=config.recondition,
        bounds_crops=recipe.condiquant.bounds.crops,
    )


HOSTS = {"nncf": through_nncf, "brevitas": through_brevitas}


def largest_difference(models: Mapping[str, nn.Module], network: nn.Module) -> float:
    """``|a - b| / |b|`` of the parameters of the float network, the worst."""
    one, other = (dict(model.named_parameters()) for model in models.values())
    return max(
        float((one[name] - other[name]).norm() / other[name].norm().clamp_min(1e-30))
        for name, _ in network.named_parameters()
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder with calibration photographs and test sets")
    parser.add_argument("--hosts", nargs="+", choices=HOSTS, default=list(HOSTS))
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--sets", nargs="*", default=["Set5"])
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    arguments = parser.parse_args()
    bits = arguments.bits
    changes = [f"condiquant.weight_bits={bits}", f"condiquant.activation_bits={bits}"]
    recipe = load_recipe(arguments.recipe, changes)
    source = load_source(recipe, arguments.data, arguments.sets)
    print("| host | " + " | ".join([*arguments.sets, "seconds"]) + " |")
    print("|---" * (len(arguments.sets) + 2) + "|", flush=True)
    models = {}
    for host in arguments.hosts:
        started = time.perf_counter()
        models[host] = HOSTS[host](source, recipe)
        seconds = time.perf_counter() - started
        upscale = partial(
            basicsr_host.upscale, models[host], scale=recipe.scale, multiple=source.multiple
        )
        scores = [
            basicsr_host.evaluate(upscale, source.test_sets[name], recipe.scale)["psnr"]
            for name in arguments.sets
        ]
        cells = [*(f"{score:.3f}" for score in scores), f"{seconds:.0f}"]
        print(f"| {host} | {' | '.join(cells)} |", flush=True)
    if len(models) == 2:
        print(f"\nweights differ by {largest_difference(models, source.network):.1e} at most")


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    main()
