"""Accuracy, latency and what follows from them, for the rows of a comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import inf, isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

import condiquant_basicsr as basicsr_host
import condiquant_openvino as openvino_host
from condiquant_plugin.errors import InputError
from condiquant_recipes.comparison.crops import output_file
from condiquant_recipes.progress import Advance
from condiquant_recipes.recipe import Recipe

Row = dict[str, Any]
SCORES = ("psnr", "ssim", "fidelity")
_REASON_LENGTH, _ITERATIONS = 300, 30


@contextmanager
def keeping_reason(row: Row) -> Iterator[None]:
    """Why a method failed, in one line of its row."""
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        if not isinstance(error, InputError):
            text = f"{type(error).__name__}: {text}"
        row["reason"] = text if len(text) <= _REASON_LENGTH else f"{text[: _REASON_LENGTH - 1]}…"


def score_set(
    folder: Path,
    float_folder: Path,
    name: str,
    pairs: Sequence[basicsr_host.TestImage],
    recipe: Recipe,
    advance: Advance,
) -> dict[str, float | None]:
    """Upscale a test set with the IR of a method, keep the outputs, score them.

    Args:
        folder, float_folder: of the method and of the float network, whose outputs are there already.

    Returns:
        Means of ``psnr`` and ``ssim`` against the recipe's reference and of ``fidelity``, the PSNR to the
        float output, as :func:`condiquant_basicsr.evaluate` takes them; None for identical images.

    Raises:
        InputError: NaN or Inf in an output, or an unreadable image.
    """
    upscaler = openvino_host.Upscaler(folder / "model.xml")
    scores: dict[str, list[float]] = {key: [] for key in SCORES}
    for pair in pairs:
        lr, hr = pair.load(recipe.scale)
        sr = upscaler(lr)
        if not sr.isfinite().all():
            raise InputError(f"the IR gives NaN or Inf on {pair.name}")
        file = output_file(folder, name, pair.name)
        file.parent.mkdir(parents=True, exist_ok=True)
        basicsr_host.write_image(file, sr)
        float_output = basicsr_host.read_image(output_file(float_folder, name, pair.name))
        to_float = basicsr_host.evaluate_pair(sr, float_output, recipe.scale)
        found = to_float
        if recipe.datasets.reference == "hr":
            found = basicsr_host.evaluate_pair(sr, hr, recipe.scale)
        for key, value in (found | {"fidelity": to_float["psnr"]}).items():
            scores[key].append(value)
        advance(pair.name)
    means = {key: fmean(values) for key, values in scores.items()}
    return {key: mean if isfinite(mean) else None for key, mean in means.items()}


def measure_latency(rows: Sequence[Row], folders: Mapping[str, Path], image: Tensor) -> None:
    """Add latency and executed precisions to the rows that have an IR; the first is the float network's.

    An IR that cannot be measured gives its row a reason and leaves the others alone.
    """

    def measured(rows: Sequence[Row], iterations: int = _ITERATIONS) -> dict[str, dict[str, Any]]:
        models = {row["id"]: folders[row["id"]] / "model.xml" for row in rows}
        return openvino_host.compare_latency(
            models, data_shape=image.shape, hint="latency", iterations=iterations
        )

    finished = [row for row in rows if not row["reason"]]
    try:
        found = measured(finished)
    except Exception:
        for row in finished:
            with keeping_reason(row):
                measured([row], iterations=1)
        if rows[0]["reason"]:
            raise InputError(f"the float network: {rows[0]['reason']}") from None
        found = measured([row for row in finished if not row["reason"]])
    for row in rows:
        figures = found.get(row["id"], {})
        row["latency_ratio"] = figures.get("ratio")
        row["latency_ms"] = figures.get("median_ms")
        row["int8_share"] = figures.get("int8_share")


def derive(rows: Sequence[Row], sets: Sequence[str]) -> None:
    """Add drop and compression against the first row, the float network's, and Pareto marks."""
    original = rows[0]
    for row in rows:
        for key in SCORES:
            row[key] = {name: row[key][name] for name in sets if name in row[key]}
        row["drop"] = {
            name: None if None in (original["psnr"][name], psnr) else original["psnr"][name] - psnr
            for name, psnr in row["psnr"].items()
        }
        row["compression"] = None if row["reason"] else size(original) / size(row)
        row |= {"pareto_size": False, "pareto_latency": False}
    measured = [row for row in rows if not row["reason"]]
    for row in pareto(measured, size):
        row["pareto_size"] = True
    for row in pareto(measured, lambda row: float(row["latency_ratio"])):
        row["pareto_latency"] = True


def size(row: Row) -> int:
    """Bytes of the IR's two files."""
    total: int = row["bin_bytes"] + row["xml_bytes"]
    return total


def pareto(rows: Sequence[Row], cost: Callable[[Row], float]) -> list[Row]:
    """The rows that no other beats in mean PSNR without costing more, or in cost without losing PSNR."""
    points = [(_accuracy(row), -cost(row), row) for row in rows]
    return [
        row
        for accuracy, cheapness, row in points
        if not any(
            a >= accuracy and c >= cheapness and (a, c) != (accuracy, cheapness)
            for a, c, _ in points
        )
    ]


def _accuracy(row: Row) -> float:
    return fmean(inf if psnr is None else psnr for psnr in row["psnr"].values())
