"""One image through the simulation and the IR: how far apart they are, and how far rounding takes torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from torch import Tensor, nn

from condiquant_openvino.parity.cutting import (
    OUTPUT,
    Pieces,
    Runner,
    entry_tensors,
    quantized_tensors,
)
from condiquant_openvino.parity.probe_points import (
    Array,
    ProbePoint,
    locate,
    mean_error,
    value_range,
)
from condiquant_openvino.parity.simulation import Rounding, record, simulate

LAYER_TOLERANCE, INPUT_TOLERANCE, END_TO_END_TOLERANCE, TIE_TOLERANCE = 1e-5, 1e-5, 1e-4, 1e-4
ROOM = 4.0
"""Independent roundings add up as a square root: up to 16 where an operator of torch has one."""


def tolerance(strict: float, rounded: float) -> float:
    """What the IR may differ by where rounding makes torch differ by ``rounded``."""
    return max(strict, ROOM * rounded)


@dataclass
class Figures:
    """Differences relative to the value range, over any number of runs."""

    means: list[float] = field(default_factory=list)
    max_abs: float = 0.0
    flips: int = 0
    codes: int = 0
    inputs: dict[str, float] = field(default_factory=dict)
    """Worst mean difference of what arrives at a quantizer, by label, or at ``OUTPUT``."""

    @property
    def mean_abs(self) -> float:
        """Of the output, mean over the runs."""
        return float(np.mean(self.means))

    @property
    def flip_rate(self) -> float:
        """Share of the codes that differ."""
        return self.flips / max(self.codes, 1)

    def add(self, other: Figures) -> None:
        """Take in more runs."""
        self.means += other.means
        self.max_abs = max(self.max_abs, other.max_abs)
        self.flips += other.flips
        self.codes += other.codes
        for label, error in other.inputs.items():
            self.add_input(label, error)

    def add_output(self, output: Array, expected: Array) -> None:
        """One run."""
        self.means.append(mean_error(output, expected))
        self.add_input(OUTPUT, self.means[-1])
        largest = float(np.abs(output - expected).max()) / value_range(expected)
        self.max_abs = max(self.max_abs, largest)

    def add_codes(self, differing: NDArray[np.bool_]) -> None:
        """Codes of one quantizer."""
        self.flips += int(np.count_nonzero(differing))
        self.codes += differing.size

    def add_input(self, label: str, error: float) -> None:
        """Mean difference at one place."""
        self.inputs[label] = max(self.inputs.get(label, 0.0), error)

    def tolerances(self) -> dict[str, float]:
        """Of ``inputs`` of an IR, with these figures those of rounding."""
        return {
            place: tolerance(END_TO_END_TOLERANCE if place == OUTPUT else INPUT_TOLERANCE, error)
            for place, error in self.inputs.items()
        }


_PORTION = 2**29
"""Bytes of the tensors that one run gives."""
_Item = TypeVar("_Item")


def _in_portions(items: Sequence[_Item], size: Callable[[_Item], int]) -> Iterator[list[_Item]]:
    """In order, each of so many bytes as memory takes next to what torch computed."""
    portion: list[_Item] = []
    total = 0
    for item in items:
        if portion and total + size(item) > _PORTION:
            yield portion
            portion, total = [], 0
        portion.append(item)
        total += size(item)
    if portion:
        yield portion


class Example:
    """What torch computes for one image, and where it is in the IR.

    Args:
        image: shape ``(1, channels, height, width)``.
    """

    def __init__(self, model: nn.Module, ir: ov.Model, image: Tensor, device: str) -> None:
        self._model: nn.Module | None = model
        self._ir, self.tensor = ir, image
        self._rounded: dict[tuple[tuple[str, ...], Rounding], Figures] = {}
        self.image = image.numpy()
        self.expected = record(model, image)
        self.probe_points = locate(ir, self.image, device)
        raw = {s.label: s.from_network(self.expected.raw[s.label]) for s in self.probe_points}
        self.quantized = {
            s.label: s.from_network(self.expected.quantized[s.label]) for s in self.probe_points
        }
        """What the quantizers of activations gave, by label, in the order of the exits."""
        clear = {
            s.label: s.away_from_ties(raw[s.label], self.quantized[s.label])
            for s in self.probe_points
        }
        self.entries = entry_tensors(self.probe_points, clear)
        """What the nodes that round get, by name."""

    def recorded(self) -> Example:
        """What torch computed, to be pickled: without the model and the IR."""
        found = copy(self)
        found._model, found._ir, found._rounded = None, None, {}
        return found

    def on(self, ir: ov.Model) -> Example:
        """A recorded example with its IR."""
        found = copy(self)
        found._ir = ir
        return found

    def pieces(self, cuts: Collection[str]) -> Pieces:
        """The IR cut at nodes that round."""
        return Pieces(self._ir, {name: self.entries[name] for name in cuts})

    def from_image(self, network: ov.CompiledModel) -> Figures:
        """The whole IR, compiled; only figures of the output."""
        figures = Figures()
        figures.add_output(network([self.image])[0], self.expected.output)
        return figures

    def codes_from_image(self, runner: Runner) -> Figures:
        """Codes of the whole IR, which gives them out; no other figures."""
        figures = Figures()
        for portion in _in_portions(
            self.probe_points, lambda point: self.quantized[point.label].nbytes
        ):
            found = quantized_tensors(self._ir, portion, self.image, runner)
            for point in portion:
                codes = point.codes(self.quantized[point.label])
                figures.add_codes(point.codes(found[point.label]) != codes)
        return figures

    def errors(self, place: str, tensor: Array) -> dict[str, float]:
        """Mean difference of what arrives at a node that rounds, by quantizer, or at ``OUTPUT``."""
        if place == OUTPUT:
            return {OUTPUT: mean_error(tensor, self.expected.output)}
        raw = self.expected.raw
        return {
            point.label: point.input_error(tensor, point.from_network(raw[point.label]))
            for point in self.probe_points
            if point.entry == place
        }

    def between(
        self, cuts: Sequence[str], runner: Runner, tolerances: Mapping[str, float]
    ) -> Figures:
        """The IR with the tensors torch saw put in at ``cuts``, and compared there.

        With several outputs the plugin may overwrite one while it computes another. Hence what
        exceeds its tolerance is computed again alone, up to the first that still does.
        """
        figures, pieces, found_one = Figures(), self.pieces(cuts), False
        probe_points: dict[str, list[ProbePoint]] = defaultdict(list)
        for point in self.probe_points:
            probe_points[point.entry].append(point)
        sizes = {place: tensor.nbytes for place, tensor in self.entries.items()}
        for places in _in_portions([*cuts, OUTPUT], lambda place: sizes.get(place, 0)):
            ports = [pieces.source(place) for place in places]
            found = pieces.run(ports, self.image, runner, (*cuts, *places))
            for place, tensor in zip(places, found, strict=True):
                if not found_one and self._exceeds(place, tensor, tolerances):
                    (tensor,) = pieces.run([pieces.source(place)], self.image, runner)
                    found_one = self._exceeds(place, tensor, tolerances)
                if place == OUTPUT:
                    figures.add_output(tensor, self.expected.output)
                    continue
                for point in probe_points[place]:
                    codes = point.codes(self.quantized[point.label])
                    figures.add_codes(point.codes_at_entry(tensor) != codes)
                for label, error in self.errors(place, tensor).items():
                    figures.add_input(label, error)
        return figures

    def _exceeds(self, place: str, tensor: Array, tolerances: Mapping[str, float]) -> bool:
        errors = self.errors(place, tensor)
        return not all(error <= tolerances[label] for label, error in errors.items())

    def rounded(self, cuts: Sequence[str], rounding: Rounding) -> Figures:
        """The simulation with its floats rounded, with the tensors torch saw at ``cuts``.

        Between cuts every tie goes the other way than in torch. Inputs are those of all quantizers,
        codes those at ``cuts``.
        """
        key = tuple(cuts), rounding
        if key not in self._rounded:
            self._rounded[key] = self._round(set(cuts), rounding)
        return self._rounded[key]

    def _round(self, cuts: Collection[str], rounding: Rounding) -> Figures:
        figures, expected = Figures(), self.expected
        probe_points = {point.label: point for point in self.probe_points}

        def observe(label: str, raw: Array, quantized: Array) -> Array | None:
            if label not in probe_points:
                return None
            figures.add_input(label, mean_error(raw, expected.raw[label]))
            if probe_points[label].entry in cuts:
                figures.add_codes(quantized != expected.quantized[label])
                return expected.quantized[label]
            if not cuts:
                return None
            return probe_points[label].with_other_ties(expected.raw[label], quantized)

        assert self._model is not None  # a recorded example has only what torch computed
        output = simulate(self._model, self.tensor, observe, rounding)
        figures.add_output(output, expected.output)
        return figures
