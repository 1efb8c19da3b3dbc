"""Layers whose inputs and weights pass fake quantizers, whichever host has placed them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from condiquant_plugin.errors import InputError
from condiquant_plugin.forward_pass import run
from condiquant_plugin.layerwise import distributed
from condiquant_plugin.layerwise.moments import (
    LayerGeometry,
    Moments,
    MomentSums,
    no_moments,
)
from condiquant_plugin.layerwise.problem import LayerProblem, Solution
from condiquant_plugin.uniform.fake_quantizer import FakeQuantizer, fake_quantizers
from condiquant_plugin.uniform.grid import SnappedGrid

_Rounding = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class QuantizedLayer:
    """A linear layer or convolution of a network with fake quantizers."""

    name: str
    weight: Tensor
    """The parameter or buffer itself."""
    bias: Tensor | None
    weight_quantizer: FakeQuantizer
    input_quantizers: tuple[FakeQuantizer, ...]
    """One per use of the weight."""
    geometry: LayerGeometry = LayerGeometry()
    row_blocks: int = 1
    transposed: bool = False
    """Whether the weight of a matrix product is kept as ``(in_features, out_features)``."""
    features_first: bool = False
    """Whether the last two axes of the input are the other way round than a linear layer takes them."""

    def rows_first(self, x: Tensor) -> Tensor:
        """What is laid out as the weight, as :mod:`condiquant_plugin.layerwise.moments` takes it."""
        return x.mT if self.transposed and x.ndim > 1 else x

    def moment_sums(self, dtype: torch.dtype, floats: Moments | None = None) -> MomentSums:
        """Of the layer's inputs, to be added to; see :class:`MomentSums`."""
        return MomentSums(self.geometry, name=self.name, dtype=dtype, floats=floats)

    def add_to(self, sums: MomentSums, x: Tensor, codes: Tensor | None) -> None:
        """Add inputs as they arrive, and what their quantizer makes of them."""
        if self.features_first:
            x, codes = x.mT, None if codes is None else codes.mT
        sums.add(x, codes)

    def problem(self, moments: Moments) -> LayerProblem:
        """The layer as a method sees it, with the levels that its weight is rounded to now."""
        weight = self.weight.detach()
        grid = self.weight_quantizer.levels_of(weight).map(self.rows_first)
        return LayerProblem(
            self.name,
            self.rows_first(weight).clone(memory_format=torch.contiguous_format),
            None if self.bias is None else self.bias.detach().clone(),
            moments,
            self.geometry,
            self.row_blocks,
            grid,
        )

    @torch.no_grad()
    def write(self, solution: Solution) -> None:
        """Put in a solution's weight and, if it has one, bias."""
        self.rows_first(self.weight).copy_(solution.weight)
        if self.bias is not None and solution.bias is not None:
            self.bias.copy_(solution.bias)


@contextmanager
def computing_floats(model: nn.Module) -> Iterator[None]:
    """All fake quantizers off."""
    quantizers = list(fake_quantizers(model).values())
    before = [quantizer.enabled for quantizer in quantizers]
    try:
        for quantizer in quantizers:
            quantizer.enabled = False
        yield
    finally:
        for quantizer, enabled in zip(quantizers, before, strict=True):
            quantizer.enabled = enabled


@dataclass
class Collected:
    """Moments of layers' inputs, and how often a forward pass uses each layer."""

    moments: dict[str, Moments]
    uses: Counter[str]


@torch.no_grad()
def collect_moments(
    model: nn.Module,
    layers: Sequence[QuantizedLayer],
    batches: Iterable[Any],
    *,
    quantized: bool = True,
    dtype: torch.dtype = torch.float64,
) -> Collected:
    """Moments of what the layers get in the float network, over all batches and uses.

    Under ``torch.distributed`` all processes call this with the same batches, run a part of them each
    and get the moments of all.

    Args:
        quantized: those of the inputs behind their quantizers too.
        dtype: of the sums.

    Raises:
        InputError: NaN or Inf in an input; a layer that is not called.
        DistributedError: another process ended or failed.
    """
    batches = list(batches)
    mine = distributed.share(batches)
    sums: dict[str, MomentSums] = {}
    uses: Counter[str] = Counter()

    def add(layer: QuantizedLayer, rounded: _Rounding, quantizer: FakeQuantizer, args: Any) -> None:
        x = quantizer.transformed(*args)
        codes = rounded(x) if quantized else None
        if layer.name not in sums:
            sums[layer.name] = layer.moment_sums(dtype)
        layer.add_to(sums[layer.name], x, codes)
        uses[layer.name] += 1

    hooks = [
        quantizer.register_forward_pre_hook(partial(add, layer, _rounding(quantizer)))
        for layer in layers
        for quantizer in layer.input_quantizers
    ]
    try:
        with distributed.failing_together("collecting moments"), computing_floats(model):
            for batch in mine:
                run(model, batch)
            ordered: dict[str, Moments] = {}
            for layer in layers:
                if mine and layer.name not in sums:
                    raise InputError(f"{layer.name} is not called: leave it out")
                if layer.name in sums:
                    ordered[layer.name] = sums.pop(layer.name).moments()
                else:
                    ordered[layer.name] = no_moments(
                        layer.rows_first(layer.weight),
                        layer.geometry,
                        quantized=quantized,
                        dtype=dtype,
                    )
    finally:
        for hook in hooks:
            hook.remove()
    distributed.all_reduce(ordered.values())
    times = {name: -(-count // len(mine)) for name, count in uses.items()}
    return Collected(ordered, distributed.agreed(Counter(times)))  # process 0 always has a batch


def quantized_input(quantizer: FakeQuantizer, x: Tensor) -> Tensor:
    """What an input quantizer makes of ``x``, transformed already, whether it is on or off."""
    return _rounding(quantizer)(x)


def _rounding(quantizer: FakeQuantizer) -> _Rounding:
    if quantizer.in_float:
        return torch.detach
    return partial(_on_grid, quantizer.snapped())


def _on_grid(grid: SnappedGrid, x: Tensor) -> Tensor:
    precise = x.detach().to(torch.promote_types(x.dtype, grid.lower.dtype))
    return grid.quantize(precise).to(x.dtype)
