"""The bits of every layer that a target asks for, found on held-out crops.

Every layer may have a weight of any of the study's widths; inputs get 8 bits, as kernels of CPUs and NPUs
compute 2 to 8 bits alike, so that fewer would cost accuracy and buy nothing. Layers stay float only where
8 bits are not enough, and at most half of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

import condiquant_basicsr as basicsr_host
import condiquant_nncf as nncf_host
from condiquant_plugin.errors import InputError
from condiquant_plugin.layerwise.precision import LayerBits
from condiquant_plugin.uniform.bits import FLOAT_BITS
from condiquant_recipes import settings
from condiquant_recipes.precision.allocation import Option, allocate
from condiquant_recipes.precision.costs import INPUT_BITS, STUDIED, LayerCosts, SharedCosts
from condiquant_recipes.precision.rules import with_bits
from condiquant_recipes.precision.target import Target, decibels
from condiquant_recipes.progress import Progress
from condiquant_recipes.recipe import Recipe
from condiquant_recipes.source import Source, held_out_hr

_ROUNDS = 10
"""Allocations that are measured as first rounded, at most."""
_CALIBRATIONS = 3
_SPENT = 0.9
"""Of what a calibration leaves to spare, the part that the next one does without."""
_SAFE = 0.25
"""dB of the error by which the next calibration keeps away from one that missed the target."""
_ENOUGH = 0.5
"""Of the error, in dB: bits that calibration leaves less to spare are kept."""
_CLOSE = 0.05
"""Of the error, in dB: a target that is passed by less is met."""
_CAUTION = 0.7
"""Of what there is to spare, the part that the next allocation uses up."""
_LEAST_DROP = 1e-4


@dataclass
class Precision:
    """What a search found."""

    target: str
    bits: dict[str, LayerBits]
    """By layer and product."""
    predicted_db: float
    """PSNR of all entries to the float output, by the sensitivities."""
    held_out: dict[str, float]
    """What the target speaks of, measured on held-out crops before any training."""
    rank_correlation: float
    """Of predicted and measured errors, layer by layer (Spearman)."""
    sensitivity: dict[str, dict[str, dict[int, float]]] = field(default_factory=dict)


def targeted(
    recipe: Recipe,
    source: Source,
    data: Path,
    target: Target,
    known: Mapping[str, Any] | None,
    progress: Progress,
    costs: SharedCosts | None = None,
) -> tuple[Recipe, dict[str, Any]]:
    """A recipe with the bits that a target needs, and the record of how they were found.

    Args:
        data: the folder with the recipe's photographs, which ``drop`` is judged on.
        known: an earlier record, kept if it is of this target and recipe.
        costs: those of this recipe and source, for several targets.

    Raises:
        InputError: as :func:`find_precision`; ``drop`` without photographs.
    """
    asked = {"target": str(target), "recipe_sha256": recipe.digest()}
    if known is None or any(known.get(key) != value for key, value in asked.items()):
        hr = held_out_hr(recipe, data) if target.aim == "drop" else None
        measured = (costs or SharedCosts()).of(recipe, source, progress)
        found = find_precision(measured, hr, target, progress)
        # As JSON has it, so that a resumed run goes on from the same record.
        known = json.loads(json.dumps({**asdict(found), **asked}))
    bits = {name: LayerBits(*pair) for name, pair in known["bits"].items()}
    return with_bits(recipe, bits, bits.keys() - known["sensitivity"]["weights"]), dict(known)


def find_precision(
    costs: LayerCosts, hr: Tensor | None, target: Target, progress: Progress
) -> Precision:
    """The cheapest bits that keep a target's promise, or with ``size`` the most faithful ones.

    Args:
        hr: what the held-out crops were made from, for ``drop``.

    Raises:
        InputError: no bits reach the target; names the closest.
    """
    with progress.status(f"choosing bits for {target}"):
        search = _Search(costs, hr, target)
        bits, reached = search.choose()
    return search.precision(str(target), bits, reached)


def as_large_as(
    recipe: Recipe, source: Source, widths: Iterable[int], progress: Progress
) -> dict[int, Precision]:
    """The most faithful bits for the bytes that weights of one width take; by that width.

    ``held_out`` is the ``fidelity`` as first rounded, of all crops.

    Raises:
        InputError: rules for single layers.
    """
    search = _Search(LayerCosts(recipe, source, progress), None, Target("size", 1.0))
    found = {}
    for width in widths:
        bits, fidelity = search.as_large_as(width)
        found[width] = search.precision(f"{width}-bit size", bits, {"fidelity": fidelity})
    return found


class _Search:
    def __init__(self, costs: LayerCosts, hr: Tensor | None, target: Target) -> None:
        self.costs, self.hr, self.target = costs, hr, target
        self._reached: list[float] = []
        self._figures: dict[frozenset[tuple[str, LayerBits]], float] = {}

    def choose(self) -> tuple[dict[str, LayerBits], dict[str, float]]:
        if self.target.aim == "size":
            return self._within_size()
        if self.target.aim == "latency":
            return self._within_latency()
        return self._keeping_promise()

    def as_large_as(self, width: int) -> tuple[dict[str, LayerBits], float]:
        """Least predicted error for the bytes of weights of one width, and the fidelity in dB."""
        uniform = self.costs.study.uniform(width, INPUT_BITS)
        bits = self._fitting(self.costs.bytes(uniform)) or uniform
        return bits, self._figure(bits)

    def _fitting(self, room: float) -> dict[str, LayerBits] | None:
        """Least predicted error of weights that take so many bytes; None if none are so small."""
        options, left = self.costs.options(with_float=False), room
        for _ in range(_ROUNDS):
            if (found := allocate(options, "error", left)) is None:
                return None
            bits = {name: option.bits for name, option in found.items()}
            if (over := self.costs.bytes(bits) - room) <= 0:
                return bits
            left -= over  # tables, which do not belong to one layer
        return None

    def precision(
        self, target: str, bits: dict[str, LayerBits], reached: dict[str, float]
    ) -> Precision:
        """The record of a choice."""
        found = self.costs.sensitivity
        return Precision(
            target,
            bits,
            decibels(found.predicted(bits)),
            reached,
            self.costs.rank_correlation,
            {"weights": found.weights, "inputs": found.inputs},
        )

    def _keeping_promise(self) -> tuple[dict[str, LayerBits], dict[str, float]]:
        """Least bytes for a figure of the calibrated network.

        What calibration makes of bits is closer to the float network than what they are first rounded to,
        by an amount that changes little from one choice to the next.
        """
        kept: tuple[float, dict[str, LayerBits], float] | None = None
        gained, too_much = 0.0, math.inf
        tried: list[dict[str, LayerBits]] = []
        for left in reversed(range(_CALIBRATIONS)):
            ways: list[Callable[[], dict[str, LayerBits] | None]] = [
                partial(self._cheapest, gained)
            ]
            if kept is None:
                ways += [self.costs.best, self._half_float]
                if not left:
                    ways.reverse()  # before it is said that nothing reaches the target
            untried = (found for way in ways if (found := way()) and found not in tried)
            if (bits := next(untried, None)) is None:
                break
            tried.append(bits)
            figure = self._calibrated(bits)
            spare, cost = self._spare(figure), self._cost(bits)
            if spare >= 0 and (kept is None or cost < kept[0]):
                kept = cost, bits, figure
            if 0 <= spare < _ENOUGH or not left:
                break
            needed = -self._spare(self._figure(bits))
            if spare < 0:
                too_much = min(too_much, needed) - _SAFE
            gained = min(needed + spare * (_SPENT if spare > 0 else 1 / _SPENT), too_much)
        if kept is None:
            closest = max(self._reached, key=self._spare)
            raise InputError(
                f"--target {self.target}: no bits reach it on held-out crops with half of the layers "
                f"quantized, the closest is {self.target.aim}={closest:.3g}"
            )
        _, bits, figure = kept
        return bits, {self.target.aim: figure}

    def _cheapest(self, gained: float) -> dict[str, LayerBits] | None:
        """Least bytes for a figure as first rounded, where calibration is worth ``gained`` dB of error.

        What is predicted is corrected by what it turns out to be.
        """
        options, best = self.costs.options(with_float=True), self.costs.best()
        spare = self._spare(self._figure(best)) + gained
        asked = (predicted := decibels(self.costs.sensitivity.predicted(best))) - spare
        kept: dict[str, LayerBits] | None = None
        too_low, enough = predicted if spare < 0 else -math.inf, math.inf
        for _ in range(_ROUNDS):
            found = allocate(options, "cost", 10 ** (-asked / 10))
            if found is None or self._is_mostly_float(found):
                enough = asked
            else:
                bits = {name: option.bits for name, option in found.items()}
                spare, cost = self._spare(self._figure(bits)) + gained, self._cost(bits)
                if spare >= 0 and (kept is None or cost < self._cost(kept)):
                    kept = bits
                if 0 <= spare < _CLOSE:
                    break
                too_low, enough = (too_low, asked) if spare >= 0 else (asked, enough)
                asked -= spare if spare < 0 else _CAUTION * spare
            if not too_low < asked < enough:
                asked = (too_low + enough) / 2
            if not math.isfinite(asked) or enough - too_low < _CLOSE:
                break
        return kept

    def _half_float(self) -> dict[str, LayerBits] | None:
        """Least predicted error of networks of which half the layers are quantized."""
        options = self.costs.options(with_float=True)
        one = self.costs.penalty({"": LayerBits(FLOAT_BITS, FLOAT_BITS)})
        room = len(self.costs.study.layers) // 2 * one + self.costs.bytes(self.costs.best())
        if (found := allocate(options, "error", room)) is None:
            return None
        return {name: option.bits for name, option in found.items()}

    def _calibrated(self, bits: Mapping[str, LayerBits]) -> float:
        """What the target speaks of, of a network calibrated with these bits."""
        source = self.costs.source
        result = nncf_host.quantize_network(
            source.network,
            source.crops[:STUDIED],
            settings.quantization(with_bits(self.costs.recipe, bits, self.costs.study.products)),
            bounds_crops=STUDIED // 2,
            held_out=source.held_out,
        )
        figure = self._of_outputs(self.costs.outputs_of(result.model))
        self._reached.append(figure)
        return figure

    def _is_mostly_float(self, found: Mapping[str, Option]) -> bool:
        in_float = [found[name].bits.weight == FLOAT_BITS for name in self.costs.study.layers]
        return 2 * sum(in_float) > len(in_float)

    def _spare(self, figure: float) -> float:
        """How far the error may rise, in dB, until the target is just met."""
        if self.target.aim == "fidelity":
            return figure - self.target.value
        return 10 * math.log10(self.target.value / max(figure, _LEAST_DROP))

    def _figure(self, bits: Mapping[str, LayerBits]) -> float:
        """What the target speaks of, as first rounded; scored as test sets are."""
        key = frozenset(bits.items())
        if key not in self._figures:
            self._figures[key] = self._of_outputs(self.costs.outputs(bits))
        return self._figures[key]

    def _of_outputs(self, outputs: Sequence[Tensor]) -> float:
        if self.target.aim != "drop":
            return self.target.promised(map(self._psnr, outputs, self.costs.float_outputs))
        assert self.hr is not None
        in_float, ours = (
            list(map(self._psnr, x, self.hr)) for x in (self.costs.float_outputs, outputs)
        )
        return self.target.promised(
            before - after for before, after in zip(in_float, ours, strict=True)
        )

    def _psnr(self, output: Tensor, target: Tensor) -> float:
        return basicsr_host.psnr(output, target, self.costs.recipe.scale)

    def _cost(self, bits: Mapping[str, LayerBits]) -> float:
        return self.costs.bytes(bits) + self.costs.penalty(bits)

    def _within_size(self) -> tuple[dict[str, LayerBits], dict[str, float]]:
        """Least error for the bytes of an IR."""
        costs, compared = self.costs, self.costs.best_beside_float
        fixed = compared["bin_bytes"] - costs.bytes(costs.best())
        room = self.target.value * compared["float_bin_bytes"] - fixed
        if (bits := self._fitting(room)) is None:
            least = costs.bytes(costs.study.uniform(min(costs.study.widths), INPUT_BITS))
            smallest = (fixed + least) / compared["float_bin_bytes"]
            raise InputError(
                f"--target {self.target}: 2-bit weights everywhere come to size={smallest:.3f}"
            )
        size = (fixed + costs.bytes(bits)) / compared["float_bin_bytes"]
        return bits, {"size": size}

    def _within_latency(self) -> tuple[dict[str, LayerBits], dict[str, float]]:
        """8 bits: all bits take the same time."""
        ratio = self.costs.best_beside_float["latency_ratio"]
        if ratio > self.target.value:
            raise InputError(
                f"--target {self.target}: on this CPU the network takes latency={ratio:.2f} of the float "
                "one's with any bits"
            )
        return self.costs.best(), {"latency": ratio}
