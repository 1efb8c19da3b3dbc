"""A step of distillation against the float network's.

Run from the repository root: ``python tests/benchmarks/training_step.py [RECIPE [KEY=VALUE ...]]``.
Both on the same two crops, in turns; forward and backward passes and, of distillation, the optimiser.
"""

import copy
import statistics
import sys
import time
import warnings

import torch

import condiquant_basicsr as basicsr_host
import condiquant_nncf as nncf_host
from condiquant_plugin.distillation import DistillationConfig, DistillationLoss, parameter_groups
from condiquant_recipes import settings
from condiquant_recipes.recipe import load_recipe
from condiquant_recipes.recipe_files import recipe_path

TURNS = 7


def seconds(step) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def main(name: str = "dat_light/x4.yml", *overrides: str) -> None:
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    recipe = load_recipe(recipe_path(name), ["condiquant.recondition.enabled=false", *overrides])
    network = basicsr_host.build_network(recipe.network_g).eval()
    size = recipe.datasets.calibration.crop
    crops = torch.rand(4, 3, size, size)
    result = nncf_host.quantize_network(network, crops, settings.quantization(recipe))
    config = DistillationConfig()
    weights = nncf_host.trainable_weights(result.model, result.layers)
    optimizer = torch.optim.Adam(parameter_groups(result.model, config, weights))
    result.model.requires_grad_(False)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.requires_grad_(True)
    loss = DistillationLoss(network, [], config)
    batch = crops[: config.batch_size]
    loss.prepare(batch)
    trained = copy.deepcopy(network).requires_grad_(True)
    target = network(batch).detach()

    def float_step() -> None:
        (trained(batch) - target).abs().mean().backward()
        trained.zero_grad(set_to_none=True)

    def distillation_step() -> None:
        sum(loss(result.model, batch).values()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    float_step()
    distillation_step()
    pairs = [(seconds(float_step), seconds(distillation_step)) for _ in range(TURNS)]
    ratios = sorted(ours / theirs for theirs, ours in pairs)
    print(
        f"{recipe.name}, {torch.get_num_threads()} threads: float {min(p[0] for p in pairs):.2f} s, "
        f"distillation {min(p[1] for p in pairs):.2f} s, "
        f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
