"""What places quantizers for CondiQuantModel, and the checkpoints that remember it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from condiquant_basicsr.checkpoints import read_checkpoint
from condiquant_basicsr.weights import resolve
from condiquant_plugin.distillation import DistillationConfig
from condiquant_plugin.errors import InputError

ENTRY = "condiquant"
"""Of a checkpoint: the settings of its quantizers."""


@dataclass(frozen=True)
class QuantizedNetwork:
    """A network with fake quantizers, and what of it is trained and compared."""

    model: nn.Module
    trainable_weights: list[nn.Parameter]
    blocks: list[str]
    """Modules whose outputs the feature loss compares, present in the float network too."""
    summary: str = ""
    """One line for the log."""


class Quantizer(Protocol):
    """What places quantizers: BasicSR's side knows no other host."""

    distillation: DistillationConfig
    calibration_images: int
    autocast: bool

    def quantize(self, network: nn.Module, crops: Tensor) -> QuantizedNetwork:
        """Recondition, insert quantizers and search their bounds on crops ``(count, C, h, w)``."""

    def rebuild(self, network: nn.Module, example: Tensor) -> QuantizedNetwork:
        """The same structure, weights and bounds yet to be loaded; ``example`` is ``(1, C, h, w)``."""

    def record(self) -> dict[str, Any]:
        """The settings as plain values, for checkpoints."""

    def check(self, record: Mapping[str, Any], source: str) -> None:
        """Raise InputError if a checkpoint's record gives another structure."""


def read_quantized(file: Path) -> Mapping[str, Any]:
    """Content of a checkpoint that CondiQuantModel saved.

    Raises:
        InputError: unreadable, or of a float network.
    """
    content = read_checkpoint(resolve(str(file)))
    if ENTRY not in content:
        raise InputError(
            f"{file} holds a float network: quantize it with `condiquant train`, then give "
            "experiments/<name>/models/net_g_latest.pth"
        )
    return content
