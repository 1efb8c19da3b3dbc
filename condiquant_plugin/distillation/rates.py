"""What every host's optimizer trains, and how fast."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from torch import nn

from condiquant_plugin.distillation.settings import DistillationConfig
from condiquant_plugin.errors import InputError
from condiquant_plugin.uniform.fake_quantizer import FakeQuantizer, fake_quantizers


def parameter_groups(
    student: nn.Module, config: DistillationConfig, weights: Sequence[nn.Parameter]
) -> list[dict[str, Any]]:
    """Adam's groups: the bounds of each fake quantizer at a rate of their own, then the weights.

    Args:
        student: network with fake quantizers.
        weights: trained if ``config.weights``.
    """
    groups: list[dict[str, Any]] = []
    for quantizer in fake_quantizers(student).values():
        rate = config.bounds_rate
        if rate is None:
            rate = config.rate / (2**quantizer.bits - 1)
        rate *= _width(quantizer)
        groups.append({"params": list(quantizer.parameters()), "lr": rate, "weight_decay": 0.0})
    if config.weights and weights:
        rate = config.weights_rate
        if rate is None:
            rate = config.rate * _step_of_weights(student, config)
        groups.append({"params": list(weights), "lr": rate})
    return groups


def _step_of_weights(student: nn.Module, config: DistillationConfig) -> float:
    """Of the usual weight's grid, or with the bits of inputs where those are fewer and decide."""
    rounding = [q for q in fake_quantizers(student).values() if not q.in_float]
    weights = [q for q in rounding if q.kind == "weight"]
    inputs = [q.bits for q in rounding if q.kind != "weight"]
    if not weights:
        raise InputError(
            f"distillation.rate={config.rate} is in grid steps, and no weight has a grid: give weights_rate"
        )
    bits = min(median(q.bits for q in weights), *([median(inputs)] if inputs else []))
    return median(_width(q) for q in weights) / (2**bits - 1)


def _width(quantizer: FakeQuantizer) -> float:
    return float((quantizer.upper - quantizer.lower).detach().abs().mean())
