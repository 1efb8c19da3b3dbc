"""What each layer's bits cost at the network's output, and the network with any bits for each layer.

With a network ``f``, what quantizing one tensor adds to it, ``d``, moves the output by ``J d`` to first
order. For a random sign ``v`` at each entry of the output, the expectation of ``(vᵀ J d)²`` is ``|J d|²``,
and ``vᵀ J`` is one backward pass, so all tensors and widths are judged by one pass through the float
network for each image (Hutchinson's estimator). Errors of different tensors are taken to add up.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from condiquant_plugin.calibration.images import few_at_once
from condiquant_plugin.configuration import QuantizationConfig
from condiquant_plugin.errors import InputError
from condiquant_plugin.forward_pass import run
from condiquant_plugin.layerwise.moments import Moments
from condiquant_plugin.layerwise.precision import LayerBits
from condiquant_plugin.layerwise.quantized import (
    QuantizedLayer,
    collect_moments,
    computing_floats,
)
from condiquant_plugin.methods.gptq.rounding import GPTQ
from condiquant_plugin.uniform import grid
from condiquant_plugin.uniform.bits import FLOAT_BITS
from condiquant_plugin.uniform.bounds_search import float_inputs
from condiquant_plugin.uniform.fake_quantizer import (
    FakeQuantizer,
    fake_quantizers,
    snapped_together,
)

WIDTHS = (2, 3, 4, 6, 8)
"""Bits that are tried; of 5 and 7 there is little to be had beside their neighbours."""


@dataclass(frozen=True)
class Sensitivity:
    """Mean squared error of the network's output that each tensor causes alone, by bits."""

    weights: dict[str, dict[int, float]]
    """By layer."""
    inputs: dict[str, dict[int, float]]
    """By layer, and by product of activations for both its factors."""

    def predicted(self, bits: Mapping[str, LayerBits]) -> float:
        """Mean squared error with these bits; layers and products that are left out are float."""
        total = 0.0
        for name, (weight, activation) in bits.items():
            total += self.weights.get(name, {}).get(weight, 0.0)
            total += self.inputs.get(name, {}).get(activation, 0.0)
        return total


_Bounds = dict[str, tuple[Tensor, Tensor]]
"""By quantizer."""


@dataclass(frozen=True)
class _Rounded:
    """A calibration at one width."""

    parts: dict[str, list[Tensor]]
    """Weight and bias as rounding left them, by layer."""
    bounds: _Bounds


class PrecisionStudy:
    """A network calibrated at several widths, of which every layer can take any.

    Args:
        model: with fake quantizers whose bounds are yet to come, all else as trained; changed.
        layers: those in scope that have a weight.
        images: batches of one image each that ``model`` takes, to calibrate with.
        config: how weights are rounded.
        bounds_images: how many of the images bounds are searched on.
        widths: bits to calibrate at.
        fixed: bits of further layers that have quantizers, by name.

    Raises:
        InputError: NaN or Inf anywhere; ``transform``.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[QuantizedLayer],
        images: Sequence[Any],
        config: QuantizationConfig,
        *,
        bounds_images: int,
        widths: Sequence[int] = WIDTHS,
        fixed: Mapping[str, LayerBits] | None = None,
    ) -> None:
        config.check_no_transform("knows no search for bits")
        self.model, self.layers = model, {layer.name: layer for layer in layers}
        self.images = list(images)
        self.widths = tuple(widths)
        self.fixed = dict(fixed or {})
        self._quantizers = {q.name: q for q in fake_quantizers(model).values()}
        self._trained = {name: _parts(layer) for name, layer in self.layers.items()}
        moments: dict[str, Moments] = {}
        if config.rounding == "gptq":
            batches = few_at_once(self.images)
            moments = collect_moments(model, layers, batches, quantized=False).moments
        self._rounded = self._calibrated(self._searched(self.images[:bounds_images]), moments)

    def _searched(self, images: Sequence[Any]) -> dict[int, _Bounds]:
        """Bounds at every width, on what the float network gives."""
        given = float_inputs(self.model, images)
        if missed := self._quantizers.keys() - {quantizer.name for quantizer in given}:
            raise InputError(
                f"no image passes {min(missed)}: leave its layer out, or give images that do"
            )
        found = {}
        for bits in self.widths:
            for quantizer, entries in given.items():
                own = self.fixed.get(_owner(quantizer))
                quantizer.set_bits(bits if own is None else _width(own, quantizer.kind))
                quantizer.search_bounds(entries)
            found[bits] = {
                name: (q.lower.detach().clone(), q.upper.detach().clone())
                for name, q in self._quantizers.items()
            }
        return found

    @torch.no_grad()
    def _calibrated(
        self, bounds: Mapping[int, _Bounds], moments: Mapping[str, Moments]
    ) -> dict[int, _Rounded]:
        """Weights rounded at every width, each layer on the inputs that the float network gives it."""
        seen = {name: found.as_quantized() for name, found in moments.items()}
        parts = {bits: dict(self._trained) for bits in self.widths}
        asked = []
        for bits in self.widths:
            for name, layer in self.layers.items():
                _put(layer.weight_quantizer, bits, bounds[bits])
                if name in seen:
                    asked.append((bits, layer, layer.problem(seen[name])))
        solutions = GPTQ().solve([problem for _, _, problem in asked])
        for (bits, layer, _), solution in zip(asked, solutions, strict=True):
            layer.write(solution)
            parts[bits][layer.name] = _parts(layer)
        self._restore()
        return {bits: _Rounded(parts[bits], bounds[bits]) for bits in self.widths}

    @property
    def products(self) -> list[str]:
        """Names of the products of activations."""
        operands = (q for q in self._quantizers.values() if q.kind == "operand")
        return list(dict.fromkeys(_owner(quantizer) for quantizer in operands))

    def uniform(self, weight_bits: int, activation_bits: int) -> dict[str, LayerBits]:
        """The same bits for all layers and products."""
        bits = LayerBits(weight_bits, activation_bits)
        return dict.fromkeys((*self.layers, *self.products), bits)

    @torch.no_grad()
    def assemble(self, bits: Mapping[str, LayerBits]) -> None:
        """Give each layer and product its bits; those that are left out, ``fixed`` ones too, stay float."""
        self._restore()
        for quantizer in self._quantizers.values():
            owner = _owner(quantizer)
            width = _width(bits.get(owner), quantizer.kind)
            quantizer.enabled = width != FLOAT_BITS
            if quantizer.enabled:
                self._put(quantizer, width, self.widths[0] if owner in self.fixed else width)
        for name, layer in self.layers.items():
            if (width := _width(bits.get(name), "weight")) != FLOAT_BITS:
                _put_parts(layer, self._rounded[width].parts[name])

    @torch.no_grad()
    def errors(
        self,
        bits: Mapping[str, LayerBits],
        images: Sequence[Any],
        targets: Sequence[Tensor] | None = None,
    ) -> list[float]:
        """Mean squared error of the output with these bits, of each image.

        Args:
            images: batches of any size.
            targets: the float network's outputs for each batch, where they are known.
        """
        if targets is None:
            self._restore()
            with computing_floats(self.model):
                targets = [run(self.model, image) for image in images]
        self.assemble(bits)
        with snapped_together(self.model):
            outputs = [run(self.model, image) for image in images]
        pairs = zip(outputs, targets, strict=True)
        squares = (((o.double() - t.double()) ** 2).flatten(1).mean(1) for o, t in pairs)
        return torch.cat(list(squares)).tolist()

    def sensitivity(self, images: Sequence[Any], *, seed: int = 0) -> Sensitivity:
        """What every tensor costs at every width.

        Args:
            images: one backward pass each; the estimate's relative spread is ``sqrt(2 / len(images))``.
            seed: of the random signs.
        """
        generator = torch.Generator().manual_seed(seed)
        squares: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
        self._restore()
        changes = [(name, *c) for name, x in self.layers.items() for c in self._changes(x)]
        grids = {
            name: [self._grid_at(quantizer, bits) for bits in self.widths]
            for name, quantizer in self._quantizers.items()
            if quantizer.kind != "weight" and _owner(quantizer) not in self.fixed
        }
        for image in images:
            moved: dict[tuple[str, str], Tensor] = defaultdict(
                lambda: torch.zeros(len(self.widths), dtype=torch.float64)
            )
            with self._watched(moved, grids), torch.enable_grad():
                image, starts = _followed(image)
                output = run(self.model, image)
                signs = torch.randint(0, 2, output.shape, generator=generator).to(output) * 2 - 1
                # Hooks run only on the way to one of these.
                wanted = [*(part for _, part, _ in changes), *starts]
                gradients = torch.autograd.grad(output, wanted, signs, allow_unused=True)
            for (name, _, by_width), gradient in zip(changes, gradients, strict=False):
                if gradient is not None:
                    moved[name, "weight"] += torch.stack([(gradient * c).sum() for c in by_width])
            for key, value in moved.items():
                squares[key].append(value.square() / output.numel())
        found: dict[str, dict[str, dict[int, float]]] = {"weight": {}, "input": {}}
        for (name, part), values in squares.items():
            means = torch.stack(values).mean(0).tolist()
            found[part][name] = dict(zip(self.widths, means, strict=True))
        return Sensitivity(found["weight"], found["input"])

    def _changes(self, layer: QuantizedLayer) -> list[tuple[Tensor, list[Tensor]]]:
        """A weight, and a bias that makes up for the mean, and what rounding adds to them by width."""
        quantizer, trained = layer.weight_quantizer, self._trained[layer.name]
        by_width = []
        for bits in self.widths:
            self._put(quantizer, bits, bits)
            weight, *bias = self._rounded[bits].parts[layer.name]
            rounded = [quantizer.levels_of(weight).quantize(weight), *bias]
            by_width.append([r - t for r, t in zip(rounded, trained, strict=True)])
        tensors = _tensors(layer)
        return [(t, list(c)) for t, c in zip(tensors, zip(*by_width, strict=True), strict=True)]

    @contextmanager
    def _watched(
        self,
        moved: dict[tuple[str, str], Tensor],
        grids: Mapping[str, Sequence[grid.SnappedGrid]],
    ) -> Iterator[None]:
        """The float network; its backward pass adds to ``moved`` what each input moves the output."""

        def add(key: tuple[str, str], name: str, x: Tensor, gradient: Tensor) -> None:
            moves = [(gradient * (each.quantize(x) - x)).sum() for each in grids[name]]
            moved[key] += torch.stack(moves).double()

        def watch(quantizer: FakeQuantizer, _: Any, output: Tensor) -> Tensor:
            own = output.view_as(output)  # so that other readers of the tensor add nothing
            if own.requires_grad:
                key = (_owner(quantizer), "input")
                own.register_hook(partial(add, key, quantizer.name, output.detach()))
            return own

        tensors = [tensor for layer in self.layers.values() for tensor in _tensors(layer)]
        needed = [(t, t.requires_grad) for t in (*self.model.parameters(), *tensors)]
        hooks = []
        try:
            hooks += [self._quantizers[name].register_forward_hook(watch) for name in grids]
            for tensor in tensors:
                tensor.requires_grad_(True)
            with computing_floats(self.model):
                yield
        finally:
            for hook in hooks:
                hook.remove()
            for tensor, before in needed:
                tensor.requires_grad_(before)

    def _grid_at(self, quantizer: FakeQuantizer, bits: int) -> grid.SnappedGrid:
        self._put(quantizer, bits, bits)
        return quantizer.snapped()

    def _put(self, quantizer: FakeQuantizer, bits: int, calibration: int) -> None:
        """Give a quantizer bits, and the bounds that it got in the calibration at a width."""
        _put(quantizer, bits, self._rounded[calibration].bounds)

    @torch.no_grad()
    def _restore(self) -> None:
        for name, layer in self.layers.items():
            _put_parts(layer, self._trained[name])


def _followed(image: Any) -> tuple[Any, list[Tensor]]:
    """An image that gradients lead back from, and that a network may change in place; where they end."""
    starts: list[Tensor] = []

    def follow(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        starts.append(x.detach().clone().requires_grad_())
        return starts[-1].clone()

    return tree_map_only(Tensor, follow, image), starts


def _tensors(layer: QuantizedLayer) -> list[Tensor]:
    return [layer.weight, *([] if layer.bias is None else [layer.bias])]


def _parts(layer: QuantizedLayer) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in _tensors(layer)]


def _put_parts(layer: QuantizedLayer, parts: Sequence[Tensor]) -> None:
    for tensor, part in zip(_tensors(layer), parts, strict=True):
        tensor.copy_(part)


def _owner(quantizer: FakeQuantizer) -> str:
    """Of a layer's quantizers the layer, of those of a product's factors the product."""
    return quantizer.name.rpartition(".")[0]


def _put(quantizer: FakeQuantizer, bits: int, bounds: _Bounds) -> None:
    quantizer.set_bits(bits)
    quantizer.set_bounds(*bounds[quantizer.name])


def _width(bits: LayerBits | None, kind: grid.Kind) -> int:
    if bits is None:
        return FLOAT_BITS
    return bits.weight if kind == "weight" else bits.activation
