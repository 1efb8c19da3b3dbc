"""The plots of a comparison, as SVG."""

from __future__ import annotations

import io
import math
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import median, quantiles
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
from matplotlib.transforms import Bbox

from condiquant_recipes.precision.picture import sensitivity_figure

# Accuracies further below the best than this (dB) may leave the axis if they are outliers as well.
ACCURACY_SPAN = 4.0
MOST_LABELS, _LABEL_LENGTH = 6, 34
STYLES = {
    "float": ("o", "#4a4f57"),
    "nncf-int8": ("s", "#0072b2"),
    "nncf-weights": ("^", "#a8508a"),
    "nncf-low-bit": ("v", "#a87000"),
    "neural-compressor": ("X", "#7a6ad8"),
    "2dquant": ("P", "#00815e"),
    "condiquant": ("D", "#d1490b"),
    "trained": ("p", "#8c564b"),
    "gptq": ("s", "#0072b2"),
    "low-rank": ("v", "#a87000"),
    "one-bit": ("D", "#d1490b"),
    "pruned": ("P", "#00815e"),
}
"""Marker and colour of each group of methods, those of the page's table."""
_ANGLES = (150, 120, 180, 90, 60, 30, 0, 330, 300, 270, 240, 210)
"""Above and to the left of a front there is nothing."""
_POINTS = 72
"""In an inch."""
_BEFORE, _AFTER = STYLES["nncf-int8"][1], STYLES["condiquant"][1]
_SETTINGS: Any = {
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "compare",
    "text.parse_math": False,  # labels are anybody's
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@dataclass(frozen=True)
class Plot:
    """A scatter plot with its Pareto front.

    ``below``: number and accuracy of methods under the axis, drawn on its lower edge; ``absent``: numbers
    of those without a value.
    """

    title: str
    figure: Figure
    below: list[tuple[int, float]]
    absent: list[int]

    @property
    def uri(self) -> str:
        """SVG as a data URI."""
        return _uri(self.figure)


def scatter(
    rows: Sequence[Mapping[str, Any]],
    value: Callable[[Mapping[str, Any]], tuple[float | None, float | None]],
    front: str,
    *,
    title: str,
    x_label: str,
    y_label: str,
    log: bool = False,
    y_text: Callable[[float], str] | None = None,
) -> Plot | None:
    """Accuracy (upwards) against a cost (to the right); None where no row has both values.

    Labels are the front's, at most :data:`MOST_LABELS` of them.

    Args:
        rows: rows of the report with their ``number``.
        value: cost and accuracy of a row.
        front: key of the rows' Pareto flag.
        log: logarithmic cost.
        y_text: what stands at an accuracy's tick in the place of its value.
    """
    found: dict[int, tuple[float, float]] = {}
    for row in rows:
        cost, accuracy = value(row)
        if cost is not None and accuracy is not None:
            found[row["number"]] = cost, accuracy
    shown = [row for row in rows if row["number"] in found]
    if not shown:
        return None
    floor = _accuracy_floor([accuracy for _, accuracy in found.values()])
    drawn = {number: (cost, max(accuracy, floor)) for number, (cost, accuracy) in found.items()}
    with mpl.rc_context(_SETTINGS):
        figure = Figure((7, 4.8), layout="constrained")
        axes = figure.subplots()
        axes.set(xlabel=x_label, ylabel=y_label, xscale="log" if log else "linear")
        axes.grid(alpha=0.25)
        axes.margins(0.08)
        if y_text is not None:
            axes.yaxis.set_major_formatter(lambda value, _: y_text(value))
        if log:
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(ScalarFormatter())
            axes.xaxis.set_minor_formatter(NullFormatter())
        for row in shown:
            marker, colour = STYLES[row["group"]]
            ringed = {"markeredgecolor": "black"} if row.get(front) else {"alpha": 0.7}
            axes.plot(*drawn[row["number"]], marker, color=colour, markersize=7, **ringed)
        steps = sorted(
            (row for row in shown if row.get(front)), key=lambda row: drawn[row["number"]]
        )
        points = [drawn[row["number"]] for row in steps]
        if points:
            axes.step(*zip(*points, strict=True), "--", where="post", color="black", lw=1, zorder=1)
        labelled = _spread(steps, MOST_LABELS)
        texts = [f"{row['number']} {row['label']}" for row in labelled]
        _label(axes, [drawn[row["number"]] for row in labelled], texts, list(drawn.values()))
    below = [(number, accuracy) for number, (_, accuracy) in found.items() if accuracy < floor]
    absent = [row["number"] for row in rows if row["number"] not in found]
    return Plot(title, figure, below, absent)


def layer_errors(layers: Iterable[Mapping[str, Any]]) -> str | None:
    """Relative error of each layer's output, with the weights as trained and after; as a data URI.

    Returns:
        None where no layer has both errors.
    """
    keys = ("quantized_output_error_before", "quantized_output_error_after")
    found = [
        (place, *(layer[key] for key in keys))
        for place, layer in enumerate(layers, 1)
        if all(_positive(layer.get(key)) for key in keys)
    ]
    if not found:
        return None
    places, before, after = zip(*found, strict=True)
    with mpl.rc_context(_SETTINGS):
        figure = Figure((12, 3.4), layout="constrained")
        axes = figure.subplots()
        axes.vlines(places, before, after, color="#c8ccd2", lw=1.5)
        for values, marker, colour, name in (
            (before, "o", _BEFORE, "weights as trained"),
            (after, "D", _AFTER, "CondiQuant"),
        ):
            middle = median(values)
            label = f"{name}, median {middle:.2%}"
            axes.plot(places, values, marker, color=colour, markersize=4, label=label)
            axes.axhline(middle, ls="--", lw=1, color=colour)
        axes.set(xlabel="layer, in network order", ylabel="relative output error", yscale="log")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
    return _uri(figure)


def sensitivity(record: Mapping[str, Any]) -> str:
    """The heat map of a search for bits, as a data URI."""
    return _uri(sensitivity_figure(record))


def _accuracy_floor(accuracies: Sequence[float]) -> float:
    """Lowest accuracy on the axis: Tukey's fence for outliers, but never within ACCURACY_SPAN."""
    if len(accuracies) < 4:
        return min(accuracies)
    lower, _, upper = quantiles(accuracies, n=4)
    fence = min(lower - 1.5 * (upper - lower), max(accuracies) - ACCURACY_SPAN)
    return min(a for a in accuracies if a >= fence)


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """So many of them, the first and the last included."""
    if len(items) <= count:
        return list(items)
    return [items[round(place * (len(items) - 1) / (count - 1))] for place in range(count)]


def _label(
    axes: Axes,
    points: Sequence[tuple[float, float]],
    texts: Sequence[str],
    markers: Sequence[tuple[float, float]],
) -> None:
    """Put each text at the nearest place around its point that is free of markers and other texts."""
    figure = axes.figure
    assert isinstance(figure, Figure)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    figure.set_layout_engine("none")  # or texts would move the axes that they are placed in
    renderer = canvas.get_renderer()
    inside = axes.get_window_extent(renderer)
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in axes.transData.transform(markers)]
    for point, text in zip(points, texts, strict=True):
        short = text if len(text) <= _LABEL_LENGTH else f"{text[: _LABEL_LENGTH - 1]}…"
        note = axes.annotate(
            short,
            point,
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=8,
            va="center",
            ha="center",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
            arrowprops={"arrowstyle": "-", "lw": 0.5, "color": "#5c6470", "shrinkB": 5},
        )
        plain = Text.get_window_extent(note, renderer)
        half = plain.width / 2
        for radius, angle in product(range(14, 200, 6), _ANGLES):
            radians = math.radians(angle)
            along, up = math.cos(radians), math.sin(radians)
            shift = (along * (radius + half), up * radius)
            x, y = axes.transData.transform(point)
            box = Bbox.from_bounds(
                x + shift[0] - half, y + shift[1] - plain.height / 2, plain.width, plain.height
            )
            contained = inside.contains(*box.p0) and inside.contains(*box.p1)
            if contained and not any(box.overlaps(other) for other in taken):
                break
        note.set_position((shift[0] * _POINTS / figure.dpi, shift[1] * _POINTS / figure.dpi))
        taken.append(box)


def _positive(value: float | None) -> bool:
    return value is not None and 0 < value < math.inf


def _uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    with mpl.rc_context(_SETTINGS):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + b64encode(buffer.getvalue()).decode()
