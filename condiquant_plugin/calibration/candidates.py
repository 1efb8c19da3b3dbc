"""Ways to give a network's layers new weights, and what became of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from torch import Tensor

from condiquant_plugin.configuration import QuantizationConfig
from condiquant_plugin.layerwise.problem import LayerReport
from condiquant_plugin.methods.condiquant.reconditioning import ReconditioningConfig


@dataclass(frozen=True)
class Candidate:
    """A way to give the layers new weights; ``settings=None`` keeps them as trained."""

    settings: ReconditioningConfig | None

    @property
    def name(self) -> str:
        """For reports."""
        if self.settings is None:
            return "as trained"
        words = self.settings.objective.replace("_", " ")
        return f"{words}, in sequence" if self.settings.inputs == "compressed" else words


def candidates(config: QuantizationConfig, *, sequences: bool = True) -> list[Candidate]:
    """What is tried: with ``recondition="auto"`` least squares, the weights as trained, and in sequence.

    By the first one it is judged whether the network is better with equalized channels.

    Args:
        sequences: whether layers can be solved on the compressed network's inputs, and are a chain that
            gains by it; linear layers behind norms do not (docs/results.md).
    """
    settings = config.reconditioning()
    if config.recondition != "auto" or settings is None:
        return [Candidate(settings)]
    tried = [settings, None, replace(settings, inputs="compressed")]
    return [Candidate(each) for each in tried[: 3 if sequences else 2]]


@dataclass
class Calibration:
    """What became of a network's layers, and why."""

    reports: list[LayerReport]
    chosen: str
    """Name of the candidate."""
    fidelity: dict[str, float] = field(default_factory=dict)
    """Of every candidate, if there were several: ratio of the float output's variance to the squared
    error on held-out images, mean in dB."""
    equalized: dict[str, float] = field(default_factory=dict)
    """Layers whose input channels have been equalized, and the exponent of each."""
    rounding: list[LayerReport] = field(default_factory=list)
    """What rounding does to each layer's output, where it follows the moments."""
    seconds: dict[str, float] = field(
        default_factory=lambda: {"gram": 0.0, "recondition": 0.0, "bounds": 0.0}
    )


def fidelity_in_db(output: Tensor, target: Tensor) -> float:
    """Variance of ``target`` to squared error, at most 120 dB."""
    target = target.double()
    error = float((output.double() - target).square().mean())
    variance = float(target.var(correction=0))
    return min(10 * math.log10(max(variance, 1e-30) / max(error, 1e-30)), 120.0)
