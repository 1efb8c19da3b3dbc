"""What a lower condition number does to the error of a layer, measured, not bounded.

Run from the repository root: ``CONDIQUANT_DATA=DATA python tests/benchmarks/condition_numbers.py BITS
FIGURE.svg RECIPE ...``, as ``3 docs/figures/condition_numbers.svg dat_light/x4.yml realesrgan/x4.yml``.

Of every layer in scope: the condition number of its weight, and how much of the noise that quantizing its
input makes arrives in its output, both relative: with 1 a weight passes noise as it passes the input, the
condition number is what the bound allows. Weights are float; nothing is rounded but the inputs.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import correlation, median

import torch
from matplotlib import rcParams
from matplotlib.figure import Figure

import condiquant_nncf as nncf_host
from condiquant_nncf.network import quantized_layers
from condiquant_plugin.layerwise.moments import weight_matrix
from condiquant_plugin.layerwise.problem import LayerProblem, Solution
from condiquant_plugin.layerwise.quantized import collect_moments
from condiquant_plugin.methods.condiquant.reconditioning import (
    ReconditioningConfig,
    default_config,
    layer_condition,
)
from condiquant_recipes import settings
from condiquant_recipes.recipe import load_recipe
from condiquant_recipes.recipe_files import recipe_path
from condiquant_recipes.source import load_source

rcParams["svg.hashsalt"] = "condition numbers"
TRANSFORMS = {"none": "", "rotation": "rotated, ", "alignment": "aligned, "}
WORDS = tuple(word for word in TRANSFORMS.values() if word)


@dataclass(frozen=True)
class Row:
    """One layer after one objective."""

    condition: float
    norm: float
    """``|W| / |W0|``"""
    change: float
    """``|X W^T + b - X W0^T - b0| / |X W0^T|``: what the new weight costs without any noise."""
    noise: float
    """``|N W^T| / |X W0^T|`` for the noise ``N = Q - X`` of the quantized input."""
    gain: float
    """``noise`` over ``|N| / |X|``."""
    total: float
    """``|Q W^T + b - X W0^T - b0| / |X W0^T + b0|``"""


def row(problem: LayerProblem, solution: Solution, *, as_trained: bool = False) -> Row:
    """Of the solution, or of the weight that it started from."""
    moments = problem.moments
    noise = moments.quantized_gram - moments.quantized_cross - moments.quantized_cross.mT
    noise = noise + moments.gram
    start = weight_matrix(problem.weight, problem.geometry).double()
    weight = problem.weight if as_trained else solution.weight
    end = weight_matrix(weight, problem.geometry).double()

    def energy(matrix: torch.Tensor, second: torch.Tensor) -> float:
        return float(((matrix @ second) * matrix).sum().clamp_min(0).sqrt())

    def trace(second: torch.Tensor) -> float:
        return float(second.diagonal(dim1=-2, dim2=-1).sum().sqrt())

    arriving = energy(end, noise) / energy(start, moments.gram)
    report = solution.report
    total = report.quantized_output_error_after
    return Row(
        layer_condition(weight, problem.geometry, problem.row_blocks),
        float(end.norm() / start.norm()),
        0.0 if as_trained else report.output_error,
        arriving,
        arriving * trace(moments.gram) / trace(noise),
        report.quantized_output_error_before if as_trained else total,
    )


def rows(recipe, source, bits: int) -> dict[str, list[Row]]:
    found = {}
    ways = {
        "`condition`, 3e-3": ReconditioningConfig("condition", strength=3e-3),
        "`condition`, 3e-2": ReconditioningConfig("condition", strength=3e-2),
        "`least_squares`": default_config(bits),
    }
    for transform, before in TRANSFORMS.items():
        if before and recipe.condiquant.scope == "all":
            continue  # convolutions are not transformed
        config = settings.quantization(recipe).changed(
            {
                "recondition": None,
                "rounding": "nearest",
                "equalize": False,
                "transform": transform,
            }
        )
        network = nncf_host.quantize_network(source.network, source.crops[:8], config)
        layers = quantized_layers(network.model, network.layers)
        moments = collect_moments(network.model, layers, source.crops.split(1)).moments
        problems = [layer.problem(moments[layer.name]) for layer in layers]
        for name, way in ways.items():
            pairs = list(zip(problems, way.solve(problems), strict=True))
            if name == next(iter(ways)):
                found[f"{before}as trained"] = [row(*pair, as_trained=True) for pair in pairs]
            found[before + name] = [row(*pair) for pair in pairs]
    return found


def ranks(layers: list[Row], field: str) -> list[float]:
    values = torch.tensor([getattr(layer, field) for layer in layers])
    return values.argsort().argsort().tolist()


def table(found: dict[str, list[Row]]) -> str:
    lines = [
        "| weights | κ | \\|W\\| | gain | change | noise | total | layers better than as trained | "
        "rank correlation of κ and gain |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, layers in found.items():
        before = name[: name.find(", ") + 2] if name.startswith(WORDS) else ""
        base = found[f"{before}as trained"]
        better = sum(new.total < old.total for new, old in zip(layers, base, strict=True))
        middle = [
            median(getattr(layer, field) for layer in layers)
            for field in ("condition", "norm", "gain", "change", "noise", "total")
        ]
        related = correlation(*(ranks(layers, field) for field in ("condition", "gain")))
        lines.append(
            f"| {name} | {middle[0]:.0f} | "
            + " | ".join(f"{value:.3f}" for value in middle[1:])
            + f" | {better} of {len(layers)} | {related:.2f} |"
        )
    return "\n".join(lines)


def draw(file: Path, networks: dict[str, dict[str, list[Row]]]) -> None:
    figure = Figure(figsize=(4.4 * len(networks), 3.6), layout="constrained")
    axes = figure.subplots(1, len(networks), squeeze=False)[0]
    for axis, (name, found) in zip(axes, networks.items(), strict=True):
        for label, layers in found.items():
            if label.startswith(WORDS) and "`" in label:
                continue
            x, y = [r.condition for r in layers], [r.gain for r in layers]
            axis.scatter(x, y, s=9, label=label.replace("`", ""), alpha=0.7)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(xscale="log", title=name, xlabel="condition number of the weight")
        axis.legend(fontsize=7)
    axes[0].set_ylabel("relative noise, output over input")
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    bits, file, *names = sys.argv[1:]
    networks = {}
    for name in names:
        overrides = [
            f"condiquant.weight_bits={bits}",
            f"condiquant.activation_bits={bits}",
            "datasets.calibration.count=32",
        ]
        recipe = load_recipe(recipe_path(name), overrides)
        source = load_source(recipe, Path(os.environ["CONDIQUANT_DATA"]), [])
        networks[recipe.name] = rows(recipe, source, int(bits))
        print(f"{recipe.name}, {bits} bits\n\n{table(networks[recipe.name])}\n", flush=True)
    draw(Path(file), networks)


if __name__ == "__main__":
    main()
