"""What the bits of each layer of a network cost: error of its output, bytes of its IR."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import condiquant_nncf as nncf_host
import condiquant_openvino as openvino_host
from condiquant_openvino.writing.quantizer_graphs import stored_bytes
from condiquant_plugin.calibration.images import few_at_once
from condiquant_plugin.errors import InputError
from condiquant_plugin.layerwise.precision import LayerBits
from condiquant_plugin.uniform.bits import FLOAT_BITS
from condiquant_plugin.uniform.fake_quantizer import snapped_together
from condiquant_recipes import settings
from condiquant_recipes.exporting import compared_to_float, example_image, tile_size
from condiquant_recipes.precision.allocation import Option
from condiquant_recipes.progress import Progress
from condiquant_recipes.recipe import Recipe
from condiquant_recipes.source import Source

INPUT_BITS = 8
STUDIED = 32
"""Crops that moments and sensitivities are taken from, and bounds from half of them."""
_CHECKED = 24
"""Single changes whose measured error the prediction is ranked against."""
_FLOAT_PENALTY = 4.0
"""Of a float layer, in bytes of the whole float network: few of them, whatever their size."""


class LayerCosts:
    """What each layer's bits cost, measured once for any number of choices.

    Args:
        recipe: whose layers, rounding and scale; its bits do not matter.
        source: the network, its calibration crops, and the held-out ones that choices are measured on.

    Raises:
        InputError: rules for single layers.
    """

    def __init__(self, recipe: Recipe, source: Source, progress: Progress) -> None:
        if recipe.condiquant.layers:
            raise InputError("the bits of every layer are searched: leave out condiquant.layers")
        self.recipe, self.source = recipe, source
        with progress.status("measuring what each layer's bits cost"):
            crops = source.crops[:STUDIED]
            self.study = nncf_host.study_precision(
                source.network, crops, settings.quantization(recipe), bounds_crops=STUDIED // 2
            )
            self.sensitivity = self.study.sensitivity(crops.split(1), seed=recipe.seed)
            self.held_out = few_at_once(source.held_out.split(1))
            self._shared = dict.fromkeys(self.study.widths, 0)
            self._stored = {name: self._stored_bytes(name) for name in self.study.layers}
            self._whole = float(sum(by_width[FLOAT_BITS] for by_width in self._stored.values()))
            self.float_outputs = self.outputs({})
            self.rank_correlation = self._rank_correlation()

    def outputs(self, bits: Mapping[str, LayerBits]) -> list[Tensor]:
        """Of the held-out crops, as first rounded; without bits the float network's."""
        self._assemble(bits)
        return self.outputs_of(self.study.model)

    @torch.no_grad()
    def outputs_of(self, model: nn.Module) -> list[Tensor]:
        """Of the held-out crops, each."""
        with snapped_together(model):
            return [output for batch in self.held_out for output in model(batch)]

    def best(self) -> dict[str, LayerBits]:
        """The most bits everywhere."""
        return self.study.uniform(max(self.study.widths), INPUT_BITS)

    def bytes(self, bits: Mapping[str, LayerBits]) -> float:
        """That the weights in scope take in an IR."""
        widths = [bits[name].weight for name in self._stored]
        own = sum(
            self._stored[name][width] for name, width in zip(self._stored, widths, strict=True)
        )
        return own + sum(self._shared.get(width, 0) for width in set(widths))

    def penalty(self, bits: Mapping[str, LayerBits]) -> float:
        """Of float layers, in bytes."""
        in_float = sum(own.weight == FLOAT_BITS for own in bits.values())
        return in_float * self._whole * _FLOAT_PENALTY

    def options(self, *, with_float: bool) -> dict[str, list[Option]]:
        """What each layer and product may have."""
        options: dict[str, list[Option]] = {}
        in_float = LayerBits(FLOAT_BITS, FLOAT_BITS)
        for name, stored in self._stored.items():
            of_input = self.sensitivity.inputs[name][INPUT_BITS]
            options[name] = [
                Option(LayerBits(width, INPUT_BITS), error + of_input, stored[width])
                for width, error in self.sensitivity.weights[name].items()
            ]
        for name in self.study.products:
            error = self.sensitivity.inputs[name][INPUT_BITS]
            options[name] = [Option(LayerBits(INPUT_BITS, INPUT_BITS), error, 0.0)]
        if with_float:
            for each in options.values():
                each.append(Option(in_float, 0.0, self._whole * _FLOAT_PENALTY))
        return options

    @cached_property
    def best_beside_float(self) -> dict[str, float]:
        """Sizes and latency of an IR with the most bits, beside the float network's."""
        self._assemble(self.best())
        image = example_image(tile_size(self.recipe, self.source.multiple))
        with TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            path = Path(folder) / "model.xml"
            ir, in_float = openvino_host.convert_beside_float(self.study.model, image, static=True)
            sizes = openvino_host.save(ir, path)
            return {**sizes, **compared_to_float(in_float, path, image)[0]}

    def _assemble(self, bits: Mapping[str, LayerBits]) -> None:
        self.study.assemble({**bits, **self.study.fixed} if bits else {})

    def _rank_correlation(self) -> float:
        """Of what single changes are predicted to cost and do cost on held-out crops."""
        half = self.source.held_out.split(1)[: max(len(self.source.held_out) // 2, 1)]
        few = few_at_once(half)
        known = torch.stack(self.float_outputs[: len(half)])
        targets = known.split([len(batch) for batch in few])
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
        measured = [mean(self.study.errors(bits, few, targets)) for _, bits in spread]
        return float(spearmanr([error for error, _ in spread], measured).statistic)

    def _stored_bytes(self, name: str) -> dict[int, int]:
        """Of a layer's weight in an IR, by width, without what it shares with others of that width."""
        layer, found = self.study.layers[name], dict[int, int]()
        for width in self.study.widths:
            self.study.assemble({name: LayerBits(width, INPUT_BITS)})
            levels = layer.weight_quantizer.levels_of(layer.weight)
            found[width], shared = stored_bytes(layer.weight, levels)
            self._shared[width] = max(self._shared[width], shared)
        return found | {FLOAT_BITS: layer.weight.numel() * 4}


class SharedCosts:
    """The costs of one recipe's network for several targets, measured when the first asks for them."""

    def __init__(self) -> None:
        self._costs: LayerCosts | None = None

    def of(self, recipe: Recipe, source: Source, progress: Progress) -> LayerCosts:
        """Raises what :class:`LayerCosts` does."""
        if self._costs is None:
            self._costs = LayerCosts(recipe, source, progress)
        return self._costs
