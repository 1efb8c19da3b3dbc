"""What a distillation can be told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from condiquant_plugin.errors import InputError, check_choice

_OFTEN = 10
"""Times that a crop comes until other forms of it teach more than they cost (docs/results.md)."""


@dataclass(frozen=True)
class DistillationConfig:
    """Settings of :class:`~condiquant_plugin.distillation.DistillationLoss` and of the loop around it.

    Raises:
        InputError: a value out of range.
    """

    iterations: int = 480
    batch_size: int = 2
    rate: float = 0.01
    """Adam's rate: for a bound in steps of its grid, for weights in steps of their usual grid."""
    bounds_rate: float | None = None
    """Instead of ``rate``, in units of a bound's range."""
    weights: bool = True
    """Train weights and biases of the quantized layers too."""
    weights_rate: float | None = None
    """Instead of ``rate``, as Adam takes it."""
    feature_weight: float = 0.0
    """Factor of the per-block feature loss; 0 leaves it out and saves the teacher's forward pass."""
    augment: bool | Literal["auto"] = "auto"
    """Flip and rotate crops at random, as BasicSR's ``use_hflip`` and ``use_rot``; ``"auto"``: where each
    comes more than ten times."""
    validate_every: int = 40
    autocast: bool = False
    """Run both networks in bfloat16 where torch's autocast does; losses and validation stay in float32."""

    def __post_init__(self) -> None:
        for name, least in {"iterations": 0, "batch_size": 1, "validate_every": 1}.items():
            if getattr(self, name) < least:
                raise InputError(f"{name}={getattr(self, name)}: use at least {least}")
        check_choice("augment", self.augment, ("auto", True, False))
        for name in ("rate", "bounds_rate", "weights_rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"{name}={value}: use more than 0")
        if not self.feature_weight >= 0:
            raise InputError(f"feature_weight={self.feature_weight}: use 0 or more")

    def augments(self, crops: int) -> bool:
        """Whether so many crops are mirrored and turned."""
        if self.augment != "auto":
            return self.augment
        return self.iterations * self.batch_size > _OFTEN * crops
