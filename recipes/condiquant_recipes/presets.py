"""Bits that users ask for by a word, as overrides of a recipe's keys."""

from __future__ import annotations

from enum import StrEnum


class Preset(StrEnum):
    """Names."""

    int8 = "int8"
    small = "small"
    four_bit = "4bit"


def _bits(weight: int, activation: int) -> tuple[str, ...]:
    return (
        f"condiquant.weight_bits={weight}",
        f"condiquant.activation_bits={activation}",
    )


PRESETS: dict[Preset | None, tuple[str, ...]] = {
    # Rounding to 8 bits leaves training nothing to gain.
    Preset.int8: (*_bits(8, 8), "condiquant.distillation.iterations=0"),
    Preset.small: _bits(4, 8),
    Preset.four_bit: _bits(4, 4),
}
