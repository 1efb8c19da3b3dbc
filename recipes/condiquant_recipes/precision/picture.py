"""What layers' bits cost, as a heat map."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from condiquant_plugin.files import replacing
from condiquant_recipes.precision.target import decibels

_ROW = 0.16
"""Inches of a layer."""
_PARTS = {"weights": "weight", "inputs": "input"}


def draw_sensitivity(record: Mapping[str, Any], path: Path) -> None:
    """Write :func:`sensitivity_figure` as an SVG file."""
    with mpl.rc_context({"svg.hashsalt": "sensitivity", "svg.fonttype": "none"}):
        figure = sensitivity_figure(record)
        with replacing(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})


def sensitivity_figure(record: Mapping[str, Any]) -> Figure:
    """PSNR of the network's output with one tensor at so many bits, a cross at those that were chosen.

    Args:
        record: of a search, as ``metrics.json`` has it.
    """
    bits = record["bits"]
    names = list(bits)
    with mpl.rc_context({"font.size": 7}):
        figure = Figure((7, 1.5 + _ROW * len(names)), layout="constrained")
        for axes, (part, label) in zip(figure.subplots(1, 2), _PARTS.items(), strict=True):
            table = record["sensitivity"][part]
            widths = sorted({int(width) for by_width in table.values() for width in by_width})
            cells = np.full((len(names), len(widths)), np.nan)  # products have no weight
            for row, name in enumerate(names):
                for width, error in table.get(name, {}).items():
                    cells[row, widths.index(int(width))] = decibels(error)
            image = axes.imshow(cells, aspect="auto", cmap="viridis")
            for row, name in enumerate(names):
                chosen = bits[name][0 if part == "weights" else 1]
                if name in table and chosen in widths:
                    axes.plot(widths.index(chosen), row, "rx", markersize=4)
            axes.set_xticks(range(len(widths)), [str(width) for width in widths])
            axes.set_yticks(range(len(names)), names if part == "weights" else [])
            axes.set(xlabel=f"bits of the {label}")
        figure.colorbar(image, label="PSNR to the float output, dB")
    return figure
