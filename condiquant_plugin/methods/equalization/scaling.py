"""Equal ranges for the channels of one activation, so that a grid for all of them has finer steps.

A factor per channel moves from what gives an activation into the weights that read it: the float network
computes the same, and nothing is added to it at run time (cross-layer equalization, Nagel et al.,
arXiv 1906.04721; the exponent is SmoothQuant's, arXiv 2211.10438, equation 4, here of the activation alone
and chosen for every link by the error of what its readers give).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from condiquant_plugin.forward_pass import run
from condiquant_plugin.layerwise.quantized import QuantizedLayer, computing_floats
from condiquant_plugin.methods.equalization.links import Link, find_links

EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)
_SMALLEST = 1e-2
"""Of the median: the range of a channel that is hardly used."""
_WORTH = 0.95
"""Of the error without factors: what is above it may be chance."""
_EXACT = 1e-4
"""Of the output's largest value: what rounding in float32 may change."""


@dataclass(frozen=True)
class Scaling:
    """A link and what its channels are divided by, positive, shape ``(channels,)``."""

    link: Link
    factors: Tensor
    exponent: float
    readers: tuple[str, ...]
    """Names of the quantized layers behind it."""


def factors_of(ranges: Tensor, exponent: float) -> Tensor:
    """Powers of the channels' ranges, with a geometric mean of 1.

    Args:
        ranges: largest magnitude of each channel, shape ``(channels,)``.
    """
    least = _SMALLEST * ranges.median().clamp_min(torch.finfo(ranges.dtype).tiny)
    logarithms = ranges.clamp_min(least).log() * exponent
    return (logarithms - logarithms.mean()).exp()


class _Trial:
    """What each exponent costs the readers of one link."""

    def __init__(self) -> None:
        self.ranges: Tensor | None = None
        self.errors = [0.0] * len(EXPONENTS)
        self.readers: dict[str, None] = {}

    def read(
        self, layer: QuantizedLayer, weight: Tensor, x: Tensor, compute: Callable[..., Tensor]
    ) -> None:
        # A linear layer has its channels last, a convolution in front of its extents.
        axis = -1 if weight.ndim == 2 else 1 - weight.ndim
        if self.ranges is None:
            lined = x.movedim(axis, 0)
            self.ranges = lined.reshape(len(lined), -1).abs().amax(1)
        self.readers[layer.name] = None
        wanted = compute(x, weight)
        energy = float(wanted.var(correction=0).clamp_min(1e-30))
        for place, exponent in enumerate(EXPONENTS):
            factors = factors_of(self.ranges, exponent)
            given = compute(
                _quantized(layer.input_quantizers[0], x / factors.view(-1, *[1] * (-1 - axis))),
                _quantized(layer.weight_quantizer, weight * factors.view(-1, *[1] * (-1 - axis))),
            )
            error = given.sub_(wanted).movedim(axis, 0).flatten(1)
            # A bias makes up for the mean.
            self.errors[place] += float(error.var(1, correction=0).mean()) / energy

    def best(self) -> float:
        place = min(range(len(EXPONENTS)), key=self.errors.__getitem__)
        unscaled = self.errors[EXPONENTS.index(0)]
        return EXPONENTS[place] if self.errors[place] <= _WORTH * unscaled else 0.0


def _quantized(quantizer: nn.Module, x: Tensor) -> Tensor:
    """``x`` on a grid of its own bounds, with the settings of ``quantizer``."""
    own: Any = copy.deepcopy(quantizer)
    if own.in_float:
        return x
    own.search_bounds(x)
    return own.levels_of(x).quantize(x)


@torch.no_grad()
def find_scalings(model: nn.Module, layers: Sequence[QuantizedLayer], batch: Any) -> list[Scaling]:
    """How ``model`` can be equalized, wherever it can; changes nothing.

    An exponent of 0 is where it is better left alone.

    Args:
        model: a network with fake quantizers, as trained.
        layers: those in scope that have a weight.
        batch: calibration images, from which ranges and errors are taken.
    """
    by_weight = {layer.weight.data_ptr(): layer for layer in layers if not layer.transposed}
    trials: dict[Link, _Trial] = {}

    def read(link: Link, weight: nn.Parameter, x: Tensor, compute: Callable[..., Tensor]) -> None:
        if (layer := by_weight.get(weight.data_ptr())) is not None:
            trials.setdefault(link, _Trial()).read(layer, weight, x, compute)

    with computing_floats(model):
        run(model, batch)  # Brevitas looks at the values themselves in a first pass
        links = find_links(model, batch, read)
    found = []
    for link in links:
        if (trial := trials.get(link)) is None or trial.ranges is None:
            continue
        exponent = trial.best()
        factors = factors_of(trial.ranges, exponent)
        found.append(Scaling(link, factors, exponent, tuple(trial.readers)))
    return found


@torch.no_grad()
def equalize(model: nn.Module, scalings: Sequence[Scaling], batch: Any) -> list[Scaling]:
    """Apply scalings in place, but those that change what the float network computes from ``batch``.

    Returns:
        Those applied.
    """
    with computing_floats(model):
        wanted = run(model, batch)

        def changes_nothing(tried: Sequence[Scaling]) -> bool:
            before = [(t, t.clone()) for each in tried for t in each.link.tensors()]
            for each in tried:
                each.link.scale(each.factors)
            if _same(run(model, batch), wanted):
                return True
            for tensor, value in reversed(before):
                tensor.copy_(value)
            return False

        if changes_nothing(scalings):
            return list(scalings)
        return [each for each in scalings if changes_nothing([each])]


def _same(output: Tensor, wanted: Tensor) -> bool:
    difference = float((output - wanted).abs().max())
    return math.isfinite(difference) and difference <= _EXACT * float(wanted.abs().max())
