"""Reconditioning all of DAT-light x4 against one SVD a step and layer, in the same run.

python tests/benchmarks/reconditioning_speed.py
"""

import time
from pathlib import Path

import torch

import condiquant_nncf as host
from condiquant_plugin.layerwise.moments import weight_matrix
from condiquant_plugin.layerwise.problem import LayerProblem
from condiquant_plugin.methods.condiquant import reconditioning, spectrum
from condiquant_recipes.recipe import load_recipe
from condiquant_recipes.source import load_network

STEPS, TAU = 100, 3e-3


def svd_loop(blocks: torch.Tensor, gram_matrix: torch.Tensor) -> list[torch.Tensor]:
    """The plain form: every matrix alone, one SVD a step, float32."""
    pull = (gram_matrix / torch.linalg.eigvalsh(gram_matrix)[-1]).float()
    results = []
    for start in blocks:
        current = start
        for _ in range(STEPS):
            current = current - (current - start) @ pull
            current = spectrum.prox_spread_svd(current, TAU)
        results.append(current)
    return results


def main() -> None:
    torch.set_num_threads(2)
    recipe = load_recipe(Path(__file__).parents[2] / "recipes/dat_light/x4.yml")
    network = load_network(recipe)
    crops = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    wrapped = host.wrap(network, crops[:1])
    layers = [n for n in host.find_layers(wrapped, "transformer") if n.weight_name]
    moments = host.collect_moments(wrapped, layers, [crops])
    problems = [
        LayerProblem(
            layer.name, network.get_parameter(layer.weight_name), None,
            moments[layer.name], layer.geometry, layer.row_blocks,
        )
        for layer in layers
    ]  # fmt: skip
    config = reconditioning.ReconditioningConfig(objective="condition", strength=TAU, steps=STEPS)
    fast, slow, worst = [], [], 0.0
    for repeat in range(4):
        started = time.perf_counter()
        solutions = reconditioning.recondition(problems, config)
        fast.append(time.perf_counter() - started)
        started = time.perf_counter()
        loop = []
        for problem in problems:
            matrix = weight_matrix(problem.weight, problem.geometry)[0]
            loop.append(svd_loop(matrix.chunk(problem.row_blocks), problem.moments.gram[0]))
        slow.append(time.perf_counter() - started)
        if not repeat:
            fast.clear(), slow.clear()
        for solution, expected in zip(solutions, loop, strict=True):
            difference = (solution.weight - torch.cat(expected)).norm() / torch.cat(expected).norm()
            worst = max(worst, float(difference))
    matrices = sum(problem.row_blocks for problem in problems)
    print(f"{len(problems)} layers, {matrices} matrices, {STEPS} steps, report included")
    print(f"batched, SVD-free: median {sorted(fast)[1]:.2f} s; SVD loop: {sorted(slow)[1]:.2f} s")
    ratios = sorted(s / f for f, s in zip(fast, slow, strict=True))
    print(
        f"ratio {ratios[1]:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}); weights differ by {worst:.1e}"
    )


if __name__ == "__main__":
    main()
