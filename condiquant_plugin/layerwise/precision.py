"""Bits of a layer."""

from __future__ import annotations

from typing import NamedTuple


class LayerBits(NamedTuple):
    """Of a layer's weight and of its inputs."""

    weight: int
    activation: int
