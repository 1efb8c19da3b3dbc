"""What a run is to reach, as a user says it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import mean
from typing import Any, Literal, get_args

from condiquant_plugin.errors import InputError

Aim = Literal["fidelity", "drop", "size", "latency"]
_PADDING = 4096
"""Bytes of an IR between its constants, which begin at multiples of 64."""
_WORST = {"fidelity": 1 / 8}
"""Of held-out crops, whose mean is promised so that other images keep it; else the mean of all: in one of
drops, small smooth crops weigh more than in any image, which errs to the safe side by itself."""
_MEANINGS = {
    "fidelity": "PSNR to the float network's output in dB, at least",
    "drop": "dB of PSNR against HR below the float network, at most",
    "size": "bytes of the IR's .bin over the float network's, at most",
    "latency": "of the float network's on this CPU, at most",
}


@dataclass(frozen=True)
class Target:
    """A promise about the quantized network."""

    aim: Aim
    value: float

    @classmethod
    def parse(cls, text: str) -> Target:
        """From ``aim=value``.

        Raises:
            InputError: anything else.
        """
        aim, _, value = text.partition("=")
        if aim not in get_args(Aim):
            known = "; ".join(f"{name}=VALUE ({what})" for name, what in _MEANINGS.items())
            raise InputError(f"--target {text!r} is not known: use {known}")
        try:
            number = float(value)
        except ValueError:
            number = float("nan")
        if not 0 < number < float("inf"):
            raise InputError(f"--target {text!r}: {value or 'nothing'} is no number above 0")
        return cls(aim, number)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"{self.aim}={self.value:g}"

    def promised(self, crops: Iterable[float]) -> float:
        """What is said of a network with these figures of crops: the mean of the worst, or of all."""
        ordered = sorted(crops)
        return mean(ordered[: max(int(len(ordered) * _WORST.get(self.aim, 1)), 1)])

    def missed(self, ir: Mapping[str, Any]) -> str | None:
        """What a written IR has beyond the promise, of those that it alone can tell; None if it is kept.

        Args:
            ir: its ``bin_bytes``, ``float_bin_bytes`` and ``latency_ratio``.
        """
        if self.aim == "size":
            reached, spare = (
                ir["bin_bytes"] / ir["float_bin_bytes"],
                _PADDING / ir["float_bin_bytes"],
            )
        elif self.aim == "latency":
            reached, spare = ir["latency_ratio"], 0.0
        else:
            return None
        if reached <= self.value + spare:
            return None
        return f"--target {self}: the IR has {self.aim}={reached:.5g}"

    @property
    def label(self) -> str:
        """For names of folders."""
        return f"{self.aim}{self.value:g}"

    @property
    def meaning(self) -> str:
        """What the value is."""
        return _MEANINGS[self.aim]


def decibels(error: float) -> float:
    """PSNR of a mean squared error of images from 0 to 1, at most 120 dB."""
    return -10 * math.log10(max(error, 1e-12))
