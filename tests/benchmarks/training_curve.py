"""PSNR against minutes of training, for the method as it is and with each part left out, one seed.

Run from the repository root: ``CONDIQUANT_DATA=DATA python tests/benchmarks/training_curve.py FIGURE.svg
RECIPE W/A [KEY=VALUE ...]``, as ``docs/figures/training.svg dat_light/x4.yml 3/3``. Calibrates as ``quick``
does, trains 160 iterations, scores the first test set on the way; minutes are of calibration and training.
"""

import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from budgets import OFF, recipe_at, scores
from matplotlib import rcParams
from matplotlib.figure import Figure

from condiquant_recipes.progress import Advance, Progress
from condiquant_recipes.run import calibrate_network, distill_network
from condiquant_recipes.source import load_source

rcParams["svg.hashsalt"] = "training"
SCORED = (0, 10, 20, 40, 80, 120, 160)
"""Iterations."""
PARTS = (
    "aligned inputs",
    "trained weights",
    "softmax maps by row",
    "crops with detail",
    "new weights",
)


class Scoring(Progress):
    """Scores a network while it is trained, with a clock that stands still meanwhile."""

    def __init__(self, score) -> None:
        super().__init__()
        self.score, self.started = score, time.perf_counter()
        self.points: list[tuple[float, float]] = []

    def measure(self) -> None:
        stopped = time.perf_counter()
        self.points.append(((stopped - self.started) / 60, self.score()))
        self.started += time.perf_counter() - stopped

    @contextmanager
    def bar(self, description: str, total: int) -> Iterator[Advance]:
        self.measure()
        yield lambda detail="", done=None: self.measure() if done in SCORED else None


def curve(name: str, width: str, overrides: list[str]) -> list[tuple[float, float]]:
    iterations = f"condiquant.distillation.iterations={SCORED[-1]}"
    recipe = recipe_at(name, "quick", width, [iterations, *overrides])
    torch.manual_seed(recipe.seed)
    source = load_source(recipe, Path(os.environ["CONDIQUANT_DATA"]), recipe.datasets.test[:1])
    reference = source.network if recipe.datasets.reference == "float" else None
    progress = Scoring(
        lambda: next(iter(scores(quantized.model, source, recipe, reference).values()))
    )
    quantized = calibrate_network(source, recipe)
    distill_network(quantized.model, quantized.layers, source, recipe, progress)
    return progress.points


def draw(file: Path, title: str, curves: dict[str, list[tuple[float, float]]]) -> None:
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axis = figure.subplots()
    for label, points in curves.items():
        axis.plot(*zip(*points, strict=True), marker=".", label=label)
    axis.set(title=title, xlabel="minutes of calibration and training", ylabel="PSNR in dB")
    axis.legend(fontsize=7)
    figure.savefig(file, metadata={"Date": None})


def main(file: str, name: str, width: str, *overrides: str) -> None:
    warnings.filterwarnings("ignore")
    curves = {}
    variants = {"all": [], **{f"without {part}": [OFF[part]] for part in PARTS}}
    print("| part | " + " | ".join(f"{done} iterations" for done in SCORED) + " | minutes |")
    print("|---" * (len(SCORED) + 2) + "|", flush=True)
    for label, off in variants.items():
        curves[label] = curve(name, width, [*off, *overrides])
        found = " | ".join(f"{value:.2f}" for _, value in curves[label])
        print(f"| {label} | {found} | {curves[label][-1][0]:.1f} |", flush=True)
    draw(Path(file), f"{name}, {width} bits", curves)


if __name__ == "__main__":
    main(*sys.argv[1:])
