"""What a parity check found, and its verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from condiquant_openvino.parity.bisection import Difference
from condiquant_openvino.parity.example import (
    END_TO_END_TOLERANCE,
    LAYER_TOLERANCE,
    TIE_TOLERANCE,
)
from condiquant_openvino.parity.layers import F32, LayerParity
from condiquant_openvino.running.instruction_sets import VARIABLE
from condiquant_openvino.writing.overflow import LARGEST_SUM


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class InputParity:
    """What arrives at a quantizer, in a stretch that starts from the tensors torch saw."""

    name: str
    """Label of the quantizer, or ``the output``."""
    error: float
    """Mean absolute difference over the value range."""
    tolerance: float


@dataclass(frozen=True)
class Parity:
    """Differences relative to the value range of what torch computes."""

    mean_abs: float
    """End to end, mean over all inputs."""
    max_abs: float
    """End to end, maximum over all inputs."""
    code_flip_rate: float | None
    """Share of the codes of all activation quantizers that differ, end to end; None if not counted."""
    stretch_mean_abs: float
    """As ``mean_abs``, with the tensors torch saw put in wherever that leads back to no residual path."""
    stretch_max_abs: float
    """As ``max_abs``, likewise."""
    tie_rate: float
    """Share of the codes that differ, likewise: little more than ties is left of it."""
    inputs: list[InputParity] = field(default_factory=list)
    """Every activation quantizer and the output; of all stretches and inputs the worst by its tolerance."""
    layers: list[LayerParity] = field(default_factory=list)
    """Every quantized product checked, on the first input."""
    properties: Mapping[str, Any] = field(default_factory=lambda: F32)
    """What the IR was compiled with, all others at their defaults."""
    precision: str = "f32"
    """What the device computes float operators in: ``f32``, ``bf16`` or ``f16``."""
    end_to_end_tolerance: float = END_TO_END_TOLERANCE
    """Of ``mean_abs``."""
    tie_tolerance: float = TIE_TOLERANCE
    layer_tolerance: float = LAYER_TOLERANCE
    largest_pair_sum: tuple[str, int] = ("", 0)
    """Product whose neighbouring terms may come to most, and how much; 0 where ``overflow`` is ``vnni``."""
    instruction_set: str = ""
    """The lowered one, as ``ONEDNN_MAX_CPU_ISA`` has it; empty for the CPU's own."""
    bisect: Callable[[], Difference | None] = field(default=_nothing, repr=False, compare=False)
    """Looks for the first layer that differs; runs the network some ten times."""

    @property
    def ok(self) -> bool:
        """Whether every layer agrees, and the whole up to rounding."""
        return self.complaint() is None

    def complaint(self) -> str | None:
        """What is wrong; None if nothing is."""
        product, most = self.largest_pair_sum
        if most > LARGEST_SUM:
            return (
                f"two neighbouring terms of {product} may come to {most}, more than the {LARGEST_SUM} that "
                "int8 kernels hold on CPUs without VNNI"
            )
        if (layer := next(self._wrong_layers(), None)) is not None:
            place = f"in {layer.name}, given torch's tensors"
            return self._complaint(place, layer.error, self.layer_tolerance)
        for entry in self.inputs:
            if not entry.error <= entry.tolerance:
                place = f"in front of {entry.name}, given what torch has before it"
                return self._complaint(place, entry.error, entry.tolerance)
        if not self.tie_rate <= self.tie_tolerance:
            return self._complaint("in rounding", self.tie_rate, self.tie_tolerance, "all codes")
        if not self.mean_abs <= self.end_to_end_tolerance:
            return self._complaint("end to end", self.mean_abs, self.end_to_end_tolerance)
        return None

    def _wrong_layers(self) -> Iterator[LayerParity]:
        return (layer for layer in self.layers if not layer.error <= self.layer_tolerance)

    def _complaint(
        self, place: str, error: float, allowed: float, whole: str = "the value range"
    ) -> str:
        given = ", ".join(f"{name}={value}" for name, value in self.properties.items())
        lowered = f" and {VARIABLE}={self.instruction_set}" if self.instruction_set else ""
        return (
            f"with {given or 'default'} properties{lowered} the IR differs from the simulation {place}: "
            f"{error:.1e} of {whole}, allowed {allowed:.1e}"
        )

    def raise_if_broken(self) -> None:
        """Raises RuntimeError with the complaint and the first layer that differs, if there is one."""
        if (complaint := self.complaint()) is not None:
            # A layer that is wrong by itself is the answer; a search would weigh what it does further on.
            first = None if any(self._wrong_layers()) else self.bisect()
            raise RuntimeError(complaint if first is None else f"{complaint}; {first}")
