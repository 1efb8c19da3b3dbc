"""Geometry of the plots of a comparison: pixels for the page's template, which draws them as SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from statistics import median, quantiles
from typing import Any

from matplotlib.ticker import LogLocator, MaxNLocator

MARKER_RADIUS, RING_RADIUS = 6.0, 8.0
LABEL_SIZE = (8.0, 12.0)
# Accuracies further below the best than this (dB) may leave the axis if they are outliers as well.
ACCURACY_SPAN = 4.0


@dataclass(frozen=True)
class Axis:
    """One axis: values from ``low`` to ``high`` onto pixels from ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = (math.log10(v) if self.log else v for v in (self.low, self.high))
        position = ((math.log10(value) if self.log else value) - low) / (high - low)
        return round(self.start + position * (self.end - self.start), 1)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Pixel and label of each tick."""
        for values in self._tick_candidates():
            inside = [float(v) for v in values if self.low <= v <= self.high]
            if len(inside) >= 3:
                break
        return [(self(v), f"{v:,.10g}") for v in inside]

    def _tick_candidates(self) -> Iterable[Sequence[float]]:
        if self.log:
            for subs in ([1], [1, 2, 5], [1, 2, 3, 4, 6, 8]):
                yield LogLocator(subs=subs, numticks=99).tick_values(self.low, self.high)
        yield MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]).tick_values(self.low, self.high)


@dataclass(frozen=True)
class Point:
    """A method in a plot. ``below``: under the axis, drawn on its lower edge."""

    number: int
    label: str
    group: str
    x: float
    y: float
    value: str
    front: bool
    below: bool
    label_x: float = 0.0
    label_y: float = 0.0

    @property
    def tag(self) -> str:
        """The text beside the marker."""
        return f"{self.number}↓" if self.below else f"{self.number}"


@dataclass(frozen=True)
class Plot:
    """A scatter plot with its Pareto front; ``absent``: numbers of methods without a value."""

    title: str
    x_label: str
    y_label: str
    x: Axis
    y: Axis
    points: list[Point]
    front: str
    absent: list[int]


def scatter(
    rows: Sequence[Mapping[str, Any]],
    value: Callable[[Mapping[str, Any]], tuple[float | None, float | None]],
    front: str,
    *,
    title: str,
    x_label: str,
    y_label: str,
    log: bool = False,
    size: tuple[float, float] = (600, 420),
) -> Plot | None:
    """Accuracy (upwards) against a cost (to the right); None where no row has both values.

    Args:
        rows: rows of the report with their ``number``.
        value: cost and accuracy of a row.
        front: key of the rows' Pareto flag.
        log: logarithmic cost.
        size: width and height in pixels.
    """
    values = {row["number"]: value(row) for row in rows}
    shown = [row for row in rows if None not in values[row["number"]]]
    if not shown:
        return None
    costs, accuracies = zip(*(values[row["number"]] for row in shown), strict=True)
    floor = _accuracy_floor(accuracies)
    x = _axis(costs, 64, size[0] - 16, log=log)
    y = _axis([a for a in accuracies if a >= floor], size[1] - 52, 14)
    points = [
        Point(
            row["number"],
            row["label"],
            row["group"],
            x(cost),
            y(accuracy) if accuracy >= floor else y.start,
            f"{accuracy:.2f}",
            bool(row.get(front)),
            accuracy < floor,
        )
        for row, cost, accuracy in zip(shown, costs, accuracies, strict=True)
    ]
    steps = sorted((p for p in points if p.front), key=lambda p: (p.x, -p.y))
    path = "".join(f"H{p.x} V{p.y} " if i else f"M{p.x} {p.y} " for i, p in enumerate(steps))
    absent = [number for number, pair in values.items() if None in pair]
    return Plot(title, x_label, y_label, x, y, _place_labels(points, x, y), path.strip(), absent)


def _accuracy_floor(accuracies: Sequence[float]) -> float:
    """Lowest accuracy on the axis: Tukey's fence for outliers, but never within ACCURACY_SPAN."""
    if len(accuracies) < 4:
        return min(accuracies)
    lower, _, upper = quantiles(accuracies, n=4)
    fence = min(lower - 1.5 * (upper - lower), max(accuracies) - ACCURACY_SPAN)
    return min(a for a in accuracies if a >= fence)


def _axis(values: Iterable[float], start: float, end: float, *, log: bool = False) -> Axis:
    low, high = min(values), max(values)
    if log:
        margin = (high / low) ** 0.06 if high > low else 1.5
        return Axis(low / margin, high * margin, start, end, log=True)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return Axis(low - margin, high + margin, start, end)


def _place_labels(points: Sequence[Point], x: Axis, y: Axis) -> list[Point]:
    """Put each number at the nearest free place around its marker, the front's first."""
    taken = [(p.x, p.y, *[RING_RADIUS if p.front else MARKER_RADIUS] * 2) for p in points]
    placed = {}
    for point in sorted(points, key=lambda p: (not p.front, p.number)):
        half = (LABEL_SIZE[0] * len(point.tag) / 2, LABEL_SIZE[1] / 2)
        for radius, angle in product(range(13, 130, 3), range(0, 360, 30)):
            box = (
                round(point.x + radius * math.cos(math.radians(angle)), 1),
                round(point.y - radius * math.sin(math.radians(angle)), 1),
                *half,
            )
            inside = x.start < box[0] - half[0] and box[0] + half[0] < x.end
            inside = inside and y.end < box[1] - half[1] and box[1] + half[1] < y.start
            if inside and not any(_overlap(box, other) for other in taken):
                break
        taken.append(box)
        placed[point.number] = replace(point, label_x=box[0], label_y=box[1])
    return [placed[p.number] for p in points]


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return abs(one[0] - other[0]) < one[2] + other[2] and abs(one[1] - other[1]) < one[3] + other[3]


@dataclass(frozen=True)
class ConditionPlot:
    """Condition number of each layer before and after, in network order."""

    x: Axis
    y: Axis
    layers: list[tuple[str, float, float, float]]
    medians: tuple[float, float]


def condition_plot(
    layers: Iterable[Mapping[str, Any]], size: tuple[float, float] = (1200, 320)
) -> ConditionPlot | None:
    """Layers as name, x, y before, y after; None where no layer has condition numbers."""
    found = [
        (index, layer["name"], layer["condition_before"], layer["condition_after"])
        for index, layer in enumerate(layers, 1)
        if all(_positive(layer.get(f"condition_{when}")) for when in ("before", "after"))
    ]
    if not found:
        return None
    before, after = ([layer[column] for layer in found] for column in (2, 3))
    y = _axis(before + after, size[1] - 44, 12, log=True)
    x = Axis(0, max(index for index, *_ in found) + 1, 64, size[0] - 12)
    marks = [(name, x(index), y(old), y(new)) for index, name, old, new in found]
    return ConditionPlot(x, y, marks, (median(before), median(after)))


def _positive(value: float | None) -> bool:
    return value is not None and 0 < value < math.inf
