"""What places quantizers for CondiQuantModel, and the checkpoints that remember it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from condiquant_basicsr.checkpoints import read_checkpoint
from condiquant_basicsr.weights import resolve
from condiquant_plugin.distillation import DistillationConfig
from condiquant_plugin.errors import InputError

MODEL_TYPE = "CondiQuantModel"
GROUP = "condiquant_basicsr.quantizers"
"""Entry points of functions that make a :class:`NetworkQuantizer` of BasicSR's options."""
ENTRY = "condiquant"
"""Of a checkpoint: the settings of its quantizers."""


@dataclass(frozen=True)
class TrainableNetwork:
    """A network with fake quantizers, and what of it is trained and compared."""

    model: nn.Module
    trainable_weights: list[nn.Parameter]
    blocks: list[str]
    """Modules whose outputs the feature loss compares, present in the float network too."""
    summary: str = ""
    """One line for the log."""


class NetworkQuantizer(Protocol):
    """What places quantizers: BasicSR's side knows no other host."""

    distillation: DistillationConfig
    calibration_images: int

    def quantize(self, network: nn.Module, crops: Tensor) -> TrainableNetwork:
        """Recondition, insert quantizers and search their bounds on crops ``(count, C, h, w)``."""

    def rebuild(self, network: nn.Module, example: Tensor) -> TrainableNetwork:
        """The same structure, weights and bounds yet to be loaded; ``example`` is ``(1, C, h, w)``."""

    def record(self) -> dict[str, Any]:
        """The settings as plain values, for checkpoints."""

    def check(self, record: Mapping[str, Any], source: str) -> None:
        """Raise InputError if a checkpoint's record gives another structure."""


def find_quantizer(opt: Mapping[str, Any]) -> NetworkQuantizer:
    """What an installed package makes of options that BasicSR has parsed, checked.

    Raises:
        InputError: options that cannot be used; none is installed, or several are.
    """
    found = {entry.value: entry for entry in entry_points(group=GROUP)}
    if len(found) > 1:
        raise InputError(
            f"several packages offer {GROUP} ({', '.join(found)}): uninstall all but one"
        )
    reason = "nothing offers one"
    for entry in found.values():
        try:
            make = entry.load()
        except ImportError as error:
            reason = " ".join(str(error).split())
            continue
        quantizer: NetworkQuantizer = make(opt)
        return quantizer
    raise InputError(
        f'{MODEL_TYPE} needs what places quantizers ({reason}): pip install "condiquant-plugin[recipes]"'
    )


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
