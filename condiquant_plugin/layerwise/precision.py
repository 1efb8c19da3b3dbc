"""Bits of a layer: what was asked for, and what its quantizers have."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from condiquant_plugin.uniform.fake_quantizer import FakeQuantizer


class LayerBits(NamedTuple):
    """Of a layer's weight and of its inputs."""

    weight: int
    activation: int


def quantized_bits(quantizers: Iterable[FakeQuantizer]) -> dict[str, list[int]]:
    """Bit-widths that occur, ascending: ``{"weight": [...], "activation": [...]}``.

    Operands of attention products are activations; what they keep for kernels that would overflow
    (7 bits of 8) counts as it is.
    """
    found: dict[str, set[int]] = {"weight": set(), "activation": set()}
    for quantizer in quantizers:
        found["weight" if quantizer.kind == "weight" else "activation"].add(quantizer.bits)
    return {kind: sorted(bits) for kind, bits in found.items()}
