"""Tables and pictures of results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import nan
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from rich.table import Table
from torch import Tensor

from condiquant_plugin.files import replacing
from condiquant_plugin.layerwise.precision import LayerBits

if TYPE_CHECKING:
    from condiquant_recipes.front import Point

_BRIGHTEST = 0.995
"""Quantile of errors that is drawn as the largest."""


def run_report(metrics: Mapping[str, Any]) -> Iterator[Table]:
    """Float and quantized scores of one run, one column per test set if any, and other figures."""
    bits = LayerBits(metrics["weight_bits"], metrics["activation_bits"]).label.upper()
    for other, count in metrics.get("other_bits", {}).items():
        bits += f", {count} layers {other.upper()}"
    if metrics["reference"] == "float":
        bits += " against the float output"
    if metrics["float"]:
        table = score_table({"float": metrics["float"], bits: metrics["quantized"]})
        table.title = f"{metrics['model']} x{metrics['scale']}"
        yield table
    before, after = condition_medians(metrics)
    ir, chosen = metrics["ir"], metrics["weights"]
    others = ", ".join(f"{n} {db:.2f} dB" for n, db in chosen["fidelity_db"].items())
    figures = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    if (found := metrics.get("precision")) is not None:
        ((aim, value),) = found["held_out"].items()
        ranked = (
            f"layers ranked by predicted error with correlation {found['rank_correlation']:.2f}"
        )
        figures.add_row(found["target"], f"{aim} {value:.3g} on held-out crops; {ranked}")
    figures.add_row("bits", bits)
    figures.add_row("to the float output", f"{metrics['fidelity']:.2f} dB on held-out crops")
    figures.add_row(
        "weights", chosen["chosen"] + (f" (held-out crops: {others})" if others else "")
    )
    figures.add_row("condition number", f"median {before:.0f} -> {after:.0f}")
    kib = [ir[f"{part}_bytes"] / 1024 for part in ("bin", "xml")]
    figures.add_row("IR", f"{kib[0]:.0f} KiB .bin, {sum(kib):.0f} KiB with .xml")
    figures.add_row("latency", f"{ir['latency_ratio']:.2f} of the float network's on this CPU")
    figures.add_row(
        "IR against simulation",
        f"layers within {ir['parity_layer_max']:.0e}, rounding ties {ir['tie_rate']:.0e}, "
        f"end to end {ir['parity_mean_abs']:.0e}",
    )
    yield figures


def score_table(rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """PSNR/SSIM per test set, a row per network."""
    names = list(next(iter(rows.values())))
    table = Table("network", *names)
    for label, scores in rows.items():
        cells = [f"{scores[n]['psnr']:.2f} dB / {scores[n]['ssim']:.4f}" for n in names]
        table.add_row(label, *cells)
    return table


def front_table(points: Sequence[Point]) -> Table:
    """A row per IR, the smallest first."""
    table = Table(
        "folder", "bits", "KiB .bin", "of float", "latency", "dB to float", *points[0].psnr
    )
    for point in points:
        table.add_row(
            point.name,
            point.bits,
            f"{point.bin_bytes / 1024:.0f}",
            f"{point.size_ratio:.3f}",
            f"{point.latency_ratio:.2f}",
            f"{point.fidelity:.2f}",
            *(f"{psnr:.2f}" for psnr in point.psnr.values()),
        )
    return table


def condition_medians(metrics: Mapping[str, Any]) -> tuple[float, float]:
    """Median condition number of the layers before and after reconditioning."""
    layers = metrics["layers"]
    if not layers:
        return nan, nan
    before = median(layer["condition_before"] for layer in layers)
    return before, median(layer["condition_after"] for layer in layers)


def with_error_maps(images: Mapping[str, Tensor], original: Tensor, path: Path) -> None:
    """Save a PNG of images with titles, the original, and below each its distance from that.

    Args:
        images: equally large, by title: ``(3, H, W)`` in [0, 1].
    """
    mpl.use("Agg")
    from matplotlib import pyplot

    errors = [(image.clamp(0, 1) - original).abs().mean(0).numpy() for image in images.values()]
    most = float(np.quantile(errors, _BRIGHTEST))
    height, width = original.shape[1:]
    figure, axes = pyplot.subplots(
        2,
        len(images) + 1,
        figsize=(3.2 * (len(images) + 1), 6.4 * height / width + 0.5),
        layout="constrained",
    )
    for axis, (title, image) in zip(
        axes[0], [*images.items(), ("original", original)], strict=True
    ):
        axis.imshow(image.clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_title(title, fontsize=10)
    for axis, error in zip(axes[1], errors, strict=False):
        shown = axis.imshow(error, cmap="inferno", vmin=0, vmax=most, interpolation="nearest")
    for axis in axes.flat:
        axis.set_axis_off()
    figure.colorbar(shown, ax=axes[1], label="absolute error, of 1", shrink=0.9)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    pyplot.close(figure)
