"""Runs of one recipe at several sizes, each with the bits that are best for it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl

from condiquant_plugin.errors import InputError
from condiquant_plugin.files import replacing, write_atomic
from condiquant_recipes.precision.costs import SharedCosts
from condiquant_recipes.precision.target import Target
from condiquant_recipes.progress import Progress
from condiquant_recipes.recipe import Recipe, with_condiquant
from condiquant_recipes.run import run
from condiquant_recipes.workspace import remove

_LEAST, _MOST = 2, 8
"""Bits of all weights at both ends of the front."""
_FLOAT = "float"
"""Folder of what all points have of the float network."""


@dataclass(frozen=True)
class Point:
    """An IR."""

    name: str
    """Of its folder."""
    bits: str
    bin_bytes: int
    size_ratio: float
    """To the float network's .bin."""
    latency_ratio: float
    fidelity: float
    """PSNR to the float output on held-out crops, in dB, after training if there was any."""
    psnr: dict[str, float]
    """By test set."""


def run_front(
    recipe: Recipe,
    data: Path,
    out: Path,
    count: int,
    *,
    sets: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> list[Point]:
    """Write ``count`` IRs from 2-bit to 8-bit weights, ``front.json`` and ``front.svg`` to ``out``.

    The first and the last have the same bits everywhere; sizes between are evenly spaced. The float network
    is scored and written once for all of them, in ``float``, and what layers' bits cost is measured once.

    Args:
        sets, resume, overwrite, progress: as :func:`condiquant_recipes.run.run` takes them.

    Raises:
        InputError: fewer than 2 points; whatever a run raises.
    """
    if count < 2:
        raise InputError(f"--front {count}: give at least 2 points")
    progress = progress or Progress()
    if overwrite and not resume:
        remove(out / _FLOAT)
    arguments: dict[str, Any] = {
        "sets": sets,
        "resume": resume,
        "overwrite": overwrite,
        "float_folder": out / _FLOAT,
        "progress": progress,
    }
    ends = [
        _point(run(_uniform(recipe, bits), data, out / f"w{bits}a8", **arguments), f"w{bits}a8")
        for bits in (_LEAST, _MOST)
    ]
    first, last = (end.size_ratio for end in ends)
    points, costs = list(ends), SharedCosts()
    for place in range(1, count - 1):
        size = first + (last - first) * place / (count - 1)
        target = Target("size", float(f"{size:.3g}"))
        metrics = run(recipe, data, out / target.label, target=target, costs=costs, **arguments)
        points.append(_point(metrics, target.label))
        for warning in metrics["warnings"]:
            progress.note(warning)
    points.sort(key=lambda point: point.bin_bytes)
    write_atomic(out / "front.json", json.dumps([vars(p) for p in points], indent=1).encode())
    _plot(recipe.name, points, out / "front.svg")
    return points


def _uniform(recipe: Recipe, bits: int) -> Recipe:
    return with_condiquant(recipe, weight_bits=bits, activation_bits=8)


def _point(metrics: dict[str, Any], name: str) -> Point:
    ir = metrics["ir"]
    bits = f"w{metrics['weight_bits']}a{metrics['activation_bits']}"
    others = [f"{count} {label}" for label, count in metrics["other_bits"].items()]
    return Point(
        name,
        ", ".join([bits, *others]),
        ir["bin_bytes"],
        ir["bin_bytes"] / ir["float_bin_bytes"],
        ir["latency_ratio"],
        metrics["fidelity"],
        {name: scores["psnr"] for name, scores in metrics["quantized"].items()},
    )


def _plot(title: str, points: Sequence[Point], path: Path) -> None:
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "front", "svg.fonttype": "none"}):
        figure = Figure((6, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot([p.bin_bytes / 1024 for p in points], [p.fidelity for p in points], "o-")
        axes.set(title=title, xlabel="KiB of .bin", ylabel="PSNR to the float output, dB")
        axes.grid(alpha=0.3)
        with replacing(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})
