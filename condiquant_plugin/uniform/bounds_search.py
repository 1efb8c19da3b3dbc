"""Bounds for all fake quantizers of a network, searched on what they get of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from condiquant_plugin.errors import InputError
from condiquant_plugin.forward_pass import run
from condiquant_plugin.uniform.fake_quantizer import FakeQuantizer, fake_quantizers
from condiquant_plugin.uniform.sampling import First, Sample


@torch.no_grad()
def search_bounds(
    model: nn.Module,
    crops: Tensor | Sequence[Any],
    *,
    quantized_inputs: bool = False,
    batch_size: int | None = None,
) -> None:
    """DOBI for every fake quantizer; one that nothing passes is searched on the first that does.

    Args:
        crops: ``(count, channels, height, width)``, or batches that pass one after the other.
        quantized_inputs: search where everything before is quantized, else on the float network. Takes
            one forward pass over all ``crops``, whatever ``batch_size``.
        batch_size: crops in one forward pass, of which a :class:`.sampling.Sample` is
            taken, as of batches; ``None`` is one pass over all, of which everything is.

    Raises:
        InputError: NaN or Inf; with ``quantized_inputs``, batches of several sizes.
    """
    at_once = quantized_inputs or (isinstance(crops, Tensor) and batch_size is None)
    quantizers = list(fake_quantizers(model).values())
    for quantizer in quantizers:
        quantizer.search_on_next_input = True
    if not at_once:
        batches = crops.split(batch_size or len(crops)) if isinstance(crops, Tensor) else crops
        for quantizer, given in float_inputs(model, batches).items():
            quantizer.search_bounds(given)
            quantizer.search_on_next_input = False
        return
    try:
        for quantizer in quantizers:
            quantizer.enabled = quantized_inputs
        run(model, crops if isinstance(crops, Tensor) else _joined(crops))
    finally:
        for quantizer in quantizers:
            quantizer.enabled = True


@torch.no_grad()
def float_inputs(model: nn.Module, batches: Sequence[Any]) -> dict[FakeQuantizer, Tensor]:
    """What fake quantizers get where all are off: a weight, of activations a sample of all batches.

    Those that nothing passes are left out; all are on afterwards.
    """
    quantizers = list(fake_quantizers(model).values())
    given = {}
    try:
        for quantizer in quantizers:
            quantizer.enabled = False
            one_range = quantizer.kind != "weight" and quantizer.row_blocks == 1
            quantizer.sample = Sample() if one_range else First()
        for batch in batches:
            run(model, batch)
        for quantizer in quantizers:
            if quantizer.sample:
                given[quantizer] = quantizer.sample.entries()
            quantizer.sample = None  # else every sample would be there twice
        return given
    finally:
        for quantizer in quantizers:
            quantizer.enabled, quantizer.sample = True, None


def _joined(batches: Sequence[Any]) -> Tensor:
    if not all(isinstance(b, Tensor) and b.shape[1:] == batches[0].shape[1:] for b in batches):
        raise InputError('bounds_inputs="quantized" needs images of one size: use "float"')
    return torch.cat(list(batches))
