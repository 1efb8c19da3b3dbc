"""The bits of every layer that a target asks for, found on held-out crops.

Every layer may have a weight of any of the study's widths; inputs get 8 bits, as kernels of CPUs and NPUs
compute 2 to 8 bits alike, so that fewer would cost accuracy and buy nothing. Layers stay float only where
8 bits are not enough, and at most half of them.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

import condiquant_basicsr as basicsr_host
import condiquant_nncf as nncf_host
import condiquant_openvino as openvino_host
from condiquant_openvino.writing.quantizer_graphs import stored_bytes
from condiquant_plugin.errors import InputError
from condiquant_plugin.layerwise.precision import LayerBits
from condiquant_plugin.uniform.bits import FLOAT_BITS
from condiquant_recipes import settings
from condiquant_recipes.exporting import compared_to_float, example_image, tile_size
from condiquant_recipes.precision.allocation import Option, allocate
from condiquant_recipes.precision.rules import with_bits
from condiquant_recipes.precision.target import Target, decibels
from condiquant_recipes.progress import Progress
from condiquant_recipes.recipe import Recipe
from condiquant_recipes.source import Source, held_out_hr

INPUT_BITS = 8
_STUDIED = 32
"""Crops that moments and sensitivities are taken from, and bounds from half of them."""
_ROUNDS = 10
"""Allocations that are measured as first rounded, at most."""
_CALIBRATIONS = 3
_SPENT = 0.9
"""Of what a calibration leaves to spare, the part that the next one does without."""
_ENOUGH = 0.5
"""Of the error, in dB: bits that calibration leaves less to spare are kept."""
_CHECKED = 24
"""Single changes whose measured error the prediction is ranked against."""
_CLOSE = 0.05
"""Of the error, in dB: a target that is passed by less is met."""
_CAUTION = 0.7
"""Of what there is to spare, the part that the next allocation uses up."""
_LEAST_DROP = 1e-4
_FLOAT_PENALTY = 4.0
"""Of a float layer, in bytes of the whole float network: few of them, whatever their size."""


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
) -> tuple[Recipe, dict[str, Any]]:
    """A recipe with the bits that a target needs, and the record of how they were found.

    Args:
        data: the folder with the recipe's photographs, which ``drop`` is judged on.
        known: an earlier record, kept if it is of this target and recipe.

    Raises:
        InputError: as :func:`find_precision`; ``drop`` without photographs.
    """
    asked = {"target": str(target), "recipe_sha256": recipe.digest()}
    if known is None or any(known.get(key) != value for key, value in asked.items()):
        hr = held_out_hr(recipe, data) if target.aim == "drop" else None
        found = find_precision(recipe, source, hr, target, progress)
        # As JSON has it, so that a resumed run goes on from the same record.
        known = json.loads(json.dumps({**asdict(found), **asked}))
    bits = {name: LayerBits(*pair) for name, pair in known["bits"].items()}
    return with_bits(recipe, bits, bits.keys() - known["sensitivity"]["weights"]), dict(known)


def find_precision(
    recipe: Recipe, source: Source, hr: Tensor | None, target: Target, progress: Progress
) -> Precision:
    """The cheapest bits that keep a target's promise, or with ``size`` the most faithful ones.

    Args:
        hr: what the held-out crops of ``source`` were made from, for ``drop``.

    Raises:
        InputError: no bits reach the target; names the closest. Rules for single layers beside a target.
    """
    with progress.status(f"measuring what each layer's bits cost, for {target}"):
        search = _Search(recipe, source, hr, target)
        correlation = search.rank_correlation()
    with progress.status("choosing bits"):
        bits, reached = search.choose()
    return search.precision(str(target), bits, reached, correlation)


def as_large_as(
    recipe: Recipe, source: Source, widths: Iterable[int], progress: Progress
) -> dict[int, Precision]:
    """The most faithful bits for the bytes that weights of one width take; by that width.

    ``held_out`` is the ``fidelity`` as first rounded.

    Raises:
        InputError: rules for single layers.
    """
    with progress.status("measuring what each layer's bits cost"):
        search = _Search(recipe, source, None, Target("size", 1.0))
        correlation = search.rank_correlation()
    found = {}
    for width in widths:
        bits, fidelity = search.as_large_as(width)
        reached = {"fidelity": fidelity}
        found[width] = search.precision(f"{width}-bit size", bits, reached, correlation)
    return found


class _Search:
    def __init__(
        self,
        recipe: Recipe,
        source: Source,
        hr: Tensor | None,
        target: Target,
    ) -> None:
        if recipe.condiquant.layers:
            raise InputError("the bits of every layer are searched: leave out condiquant.layers")
        self.recipe, self.target = recipe, target
        self.network, self.multiple, self.crops = source.network, source.multiple, source.crops
        crops = source.crops[:_STUDIED]
        self.study = nncf_host.study_precision(
            source.network, crops, settings.quantization(recipe), bounds_crops=_STUDIED // 2
        )
        self.sensitivity = self.study.sensitivity(crops.split(1), seed=recipe.seed)
        self.held_out, self.hr = source.held_out, hr
        self.images = self.held_out.split(1)
        self._reached: list[float] = []
        self._figures: dict[frozenset[tuple[str, LayerBits]], float] = {}
        self.bytes = {name: self._stored(name) for name in self.study.layers}
        self.whole = float(sum(by_width[FLOAT_BITS] for by_width in self.bytes.values()))
        self.targets = self._outputs({})

    def rank_correlation(self) -> float:
        """Of what single changes are predicted to cost and do cost on held-out crops."""
        few = self.images[: max(len(self.images) // 2, 1)]
        items: list[tuple[float, dict[str, LayerBits]]] = [
            (error, {name: LayerBits(bits, FLOAT_BITS)})
            for name, by_bits in self.sensitivity.weights.items()
            for bits, error in by_bits.items()
        ]
        items += [
            (error, {name: LayerBits(FLOAT_BITS, bits)})
            for name, by_bits in self.sensitivity.inputs.items()
            for bits, error in by_bits.items()
        ]
        items.sort(key=lambda item: item[0])
        spread = items[:: max(len(items) // _CHECKED, 1)]
        measured = [mean(self.study.errors(bits, few)) for _, bits in spread]
        return float(spearmanr([error for error, _ in spread], measured).statistic)

    def choose(self) -> tuple[dict[str, LayerBits], dict[str, float]]:
        if self.target.aim == "size":
            return self._within_size()
        if self.target.aim == "latency":
            return self._within_latency()
        return self._keeping_promise()

    def as_large_as(self, width: int) -> tuple[dict[str, LayerBits], float]:
        """Least predicted error for the bytes of weights of one width, and the fidelity in dB."""
        room = self._bytes(self.study.uniform(width, INPUT_BITS))
        found = allocate(self._options(with_float=False), "error", room)
        assert found is not None  # weights of that width fit
        bits = {name: option.bits for name, option in found.items()}
        return bits, self._figure(bits)

    def precision(
        self, target: str, bits: dict[str, LayerBits], reached: dict[str, float], correlation: float
    ) -> Precision:
        """The record of a choice."""
        found = self.sensitivity
        return Precision(
            target,
            bits,
            decibels(found.predicted(bits)),
            reached,
            correlation,
            {"weights": found.weights, "inputs": found.inputs},
        )

    def _keeping_promise(self) -> tuple[dict[str, LayerBits], dict[str, float]]:
        """Least bytes for a figure of the calibrated network.

        What calibration makes of bits is closer to the float network than what they are first rounded to,
        by an amount that changes little from one choice to the next.
        """
        kept: tuple[float, dict[str, LayerBits], float] | None = None
        gained = 0.0
        for _ in range(_CALIBRATIONS):
            bits = self._cheapest(gained) or self._best()
            figure = self._calibrated(bits)
            spare, cost = self._spare(figure), self._cost(bits)
            if spare >= 0 and (kept is None or cost < kept[0]):
                kept = cost, bits, figure
            if 0 <= spare < _ENOUGH:
                break
            gained += spare * (_SPENT if spare > 0 else 1 / _SPENT)
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
        options, best = self._options(with_float=True), self._best()
        spare = self._spare(self._figure(best)) + gained
        asked = (predicted := decibels(self.sensitivity.predicted(best))) - spare
        kept: dict[str, LayerBits] | None = None
        too_low, enough = predicted if spare < 0 else -math.inf, math.inf
        for _ in range(_ROUNDS):
            found = allocate(options, "cost", 10 ** (-asked / 10))
            if found is None or self._is_mostly_float(found):
                enough = asked
            else:
                bits = {name: option.bits for name, option in found.items()}
                spare = self._spare(self._figure(bits)) + gained
                if spare >= 0 and (kept is None or self._cost(bits) < self._cost(kept)):
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

    def _calibrated(self, bits: Mapping[str, LayerBits]) -> float:
        """What the target speaks of, of a network calibrated with these bits."""
        result = nncf_host.quantize_network(
            self.network,
            self.crops[:_STUDIED],
            settings.quantization(with_bits(self.recipe, bits, self.study.products)),
            bounds_crops=_STUDIED // 2,
            held_out=self.held_out,
        )
        with torch.no_grad():
            figure = self._of_outputs([result.model(image)[0] for image in self.images])
        self._reached.append(figure)
        return figure

    def _is_mostly_float(self, found: Mapping[str, Option]) -> bool:
        in_float = [found[name].bits.weight == FLOAT_BITS for name in self.study.layers]
        return 2 * sum(in_float) > len(in_float)

    def _spare(self, figure: float) -> float:
        """How far the error may rise, in dB, until the target is just met."""
        if self.target.aim == "fidelity":
            return figure - self.target.value
        return 10 * math.log10(self.target.value / max(figure, _LEAST_DROP))

    def _figure(self, bits: Mapping[str, LayerBits]) -> float:
        """What the target speaks of, as first rounded; scored as test sets are, the worse half's mean."""
        key = frozenset(bits.items())
        if key not in self._figures:
            self._figures[key] = self._of_outputs(self._outputs(bits))
        return self._figures[key]

    def _of_outputs(self, outputs: Sequence[Tensor]) -> float:
        if self.target.aim != "drop":
            return _worse_half(map(self._psnr, outputs, self.targets), least=True)
        assert self.hr is not None
        in_float, ours = (list(map(self._psnr, x, self.hr)) for x in (self.targets, outputs))
        drops = (before - after for before, after in zip(in_float, ours, strict=True))
        return _worse_half(drops, least=False)

    def _outputs(self, bits: Mapping[str, LayerBits]) -> list[Tensor]:
        self.study.assemble({**bits, **self.study.fixed} if bits else {})
        with torch.no_grad():
            return [self.study.model(image)[0] for image in self.images]

    def _psnr(self, output: Tensor, target: Tensor) -> float:
        return basicsr_host.psnr(output, target, self.recipe.scale)

    def _within_size(self) -> tuple[dict[str, LayerBits], dict[str, float]]:
        """Least error for the bytes of an IR."""
        best = self._best()
        compared = self._compared(best)
        fixed = compared["bin_bytes"] - self._bytes(best)
        room = self.target.value * compared["float_bin_bytes"] - fixed
        found = allocate(self._options(with_float=False), "error", room)
        if found is None:
            least = self._bytes({n: LayerBits(min(self.study.widths), INPUT_BITS) for n in best})
            smallest = (fixed + least) / compared["float_bin_bytes"]
            raise InputError(
                f"--target {self.target}: 2-bit weights everywhere come to size={smallest:.3f}"
            )
        bits = {name: option.bits for name, option in found.items()}
        size = (fixed + self._bytes(bits)) / compared["float_bin_bytes"]
        return bits, {"size": size}

    def _within_latency(self) -> tuple[dict[str, LayerBits], dict[str, float]]:
        """8 bits: all bits take the same time."""
        best = self._best()
        ratio = self._compared(best)["latency_ratio"]
        if ratio > self.target.value:
            raise InputError(
                f"--target {self.target}: on this CPU the network takes latency={ratio:.2f} of the float "
                "one's with any bits"
            )
        return best, {"latency": ratio}

    def _compared(self, bits: Mapping[str, LayerBits]) -> dict[str, float]:
        """An IR with these bits beside the float network's."""
        self.study.assemble({**bits, **self.study.fixed})
        image = example_image(tile_size(self.recipe, self.multiple))
        with TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            path = Path(folder) / "model.xml"
            ir, in_float = openvino_host.convert_beside_float(self.study.model, image, static=True)
            sizes = openvino_host.save(ir, path)
            return {**sizes, **compared_to_float(in_float, path, image)[0]}

    def _best(self) -> dict[str, LayerBits]:
        return self.study.uniform(max(self.study.widths), INPUT_BITS)

    def _cost(self, bits: Mapping[str, LayerBits]) -> float:
        """In bytes, with the penalty of float layers."""
        in_float = sum(own.weight == FLOAT_BITS for own in bits.values())
        return self._bytes(bits) + in_float * self.whole * _FLOAT_PENALTY

    def _bytes(self, bits: Mapping[str, LayerBits]) -> float:
        return sum(by_width[bits[name].weight] for name, by_width in self.bytes.items())

    def _stored(self, name: str) -> dict[int, int]:
        """Bytes of a layer's weight in an IR, by width."""
        layer, found = self.study.layers[name], dict[int, int]()
        for width in self.study.widths:
            self.study.assemble({name: LayerBits(width, INPUT_BITS)})
            found[width] = stored_bytes(
                layer.weight, layer.weight_quantizer.levels_of(layer.weight)
            )
        return found | {FLOAT_BITS: layer.weight.numel() * 4}

    def _options(self, *, with_float: bool) -> dict[str, list[Option]]:
        options: dict[str, list[Option]] = {}
        in_float = LayerBits(FLOAT_BITS, FLOAT_BITS)
        for name, stored in self.bytes.items():
            of_input = self.sensitivity.inputs[name][INPUT_BITS]
            options[name] = [
                Option(LayerBits(width, INPUT_BITS), error + of_input, stored[width])
                for width, error in self.sensitivity.weights[name].items()
            ]
            if with_float:
                options[name].append(Option(in_float, 0.0, self.whole * _FLOAT_PENALTY))
        for name in self.study.products:
            error = self.sensitivity.inputs[name][INPUT_BITS]
            options[name] = [Option(LayerBits(INPUT_BITS, INPUT_BITS), error, 0.0)]
            if with_float:
                options[name].append(Option(in_float, 0.0, self.whole * _FLOAT_PENALTY))
        return options


def _worse_half(figures: Iterable[float], *, least: bool) -> float:
    ordered = sorted(figures, reverse=not least)
    return mean(ordered[: max(len(ordered) // 2, 1)])
