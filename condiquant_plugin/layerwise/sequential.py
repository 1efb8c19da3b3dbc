"""Layers solved in the order of computation, each on the inputs that the compressed network gives it.

Of the float network and of the compressed one, all batches pass through together: both stand still in
front of a layer, which is solved, and go on through its new weight. So one pass of each is enough, whatever
the structure of the network, and beside both networks memory holds what is alive in a pass, the layer's
inputs of all batches, and one layer's moments.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from condiquant_plugin.errors import InputError
from condiquant_plugin.layerwise import distributed
from condiquant_plugin.layerwise.moments import Moments, no_moments
from condiquant_plugin.layerwise.passes import PausedPass, paused
from condiquant_plugin.layerwise.problem import LayerReport
from condiquant_plugin.layerwise.quantized import QuantizedLayer, quantized_input
from condiquant_plugin.uniform.fake_quantizer import fake_quantizers


@torch.no_grad()
def solve_in_sequence(
    model: nn.Module,
    layers: Sequence[QuantizedLayer],
    batches: Sequence[Any],
    solve: Callable[[QuantizedLayer, Moments], LayerReport],
    known: Mapping[str, Moments] | None = None,
) -> list[LayerReport]:
    """Solve layers in place, in the order in which the network computes them.

    Under ``torch.distributed`` all processes call this with the same network and batches; each runs its
    part of them.

    Args:
        model: a quantized network, all its bounds known. What it does with a batch depends on its
            shape only.
        layers: some of its layers, each called once in a pass.
        batches: a tensor, or a tuple of positional or a dict of keyword arguments of ``model`` each.
        solve: is given a layer and the moments of its inputs, the float network's and, as quantized
            ones, the compressed network's; changes the layer and says how.
        known: moments of the float network's inputs from just these batches, by layer, if there are any;
            of one process alone.

    Returns:
        One report per layer, in the order of ``layers``.

    Raises:
        InputError: a layer that is not called, or twice; NaN or Inf in an input.
        DistributedError: another process ended or failed.
    """
    modules = {id(q): name for name, q in fake_quantizers(model).items()}
    places = {modules[id(q)]: layer for layer in layers for q in layer.input_quantizers}
    mine = distributed.share(batches)
    counts = bool(mine)
    mine = mine or batches[:1]  # a process without batches of its own has to take part
    reports: dict[str, LayerReport] = {}
    original = copy.deepcopy(model)
    for quantizer in fake_quantizers(original).values():
        quantizer.enabled = False
    with paused(original, mine, places) as floats, paused(model, mine, places) as followers:
        made = [_weights(each, layers, modules) for each in followers]
        while True:
            with distributed.failing_together("collecting moments in sequence"):
                place = _together(floats)
                reached = _together(followers)
                if place is None or reached is None:
                    break
                layer = places[place[0]]
                if reached[0] != place[0] or layer.name in reports:
                    raise InputError(f"{layer.name} is called twice: it has no place in a sequence")
                before = known.get(layer.name) if known else None
                moments = _moments(layer, place[1], reached[1], counts, before)
            distributed.all_reduce([moments])
            reports[layer.name] = solve(layer, moments)
            for weights in made:
                # Some hosts quantize a weight before the input, so it is there already.
                if (weight := weights.pop(layer.name, None)) is not None:
                    weight.copy_(layer.weight_quantizer(layer.weight))
    for layer in layers:
        if layer.name not in reports:
            raise InputError(f"{layer.name} is not called: leave it out")
    return [reports[layer.name] for layer in layers]


def _together(passes: Sequence[PausedPass]) -> tuple[str, list[Tensor]] | None:
    """All of them at their next stop."""
    stops = [stop for each in passes if (stop := each.resume()) is not None]
    if not stops:
        return None
    names, inputs = zip(*stops, strict=True)
    return names[0], list(inputs)


def _moments(
    layer: QuantizedLayer,
    floats: list[Tensor],
    reached: list[Tensor],
    counts: bool,
    known: Moments | None,
) -> Moments:
    if not counts:
        weight = layer.rows_first(layer.weight)
        return no_moments(weight, layer.geometry, quantized=True)
    sums = layer.moment_sums(torch.float64, known)
    while floats:
        x, codes = (
            layer.input_quantizers[0].transformed(each.pop(0)) for each in (floats, reached)
        )
        codes = quantized_input(layer.input_quantizers[0], codes)
        layer.add_to(sums, x, codes)
    return sums.moments()


def _weights(
    each: PausedPass, layers: Sequence[QuantizedLayer], modules: Mapping[int, str]
) -> dict[str, Tensor]:
    """Quantized weights, by layer, that a pass has made and not yet used."""
    made: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _, __, output: made.update({name: output})

    for layer in layers:
        quantizer = each.model.get_submodule(modules[id(layer.weight_quantizer)])
        quantizer.register_forward_hook(keep(layer.name))
    return made
