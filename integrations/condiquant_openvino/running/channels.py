"""Grey pictures and alpha channels through a network that takes RGB."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Part = NDArray[np.float32] | float
"""What is computed at once, ``(channels of the network, height, width)``; a number is a constant alpha."""
_WITH_ALPHA = (2, 4)


def split(tile: NDArray[np.float32], channels: int) -> list[Part]:
    """Tiles of as many channels as a network takes: the colours, and the alpha channel if there is one."""
    if len(tile) == channels:
        return [tile]
    colours = tile[:-1] if len(tile) in _WITH_ALPHA else tile
    parts: list[Part] = [colours if len(colours) == channels else colours.repeat(channels, axis=0)]
    if len(tile) in _WITH_ALPHA:
        alpha = tile[-1:]
        constant = alpha.min() == alpha.max()
        parts.append(float(alpha.flat[0]) if constant else alpha.repeat(channels, axis=0))
    return parts


def join(outputs: Sequence[Part], tile: NDArray[np.float32]) -> NDArray[np.float32]:
    """The enlargement of a tile, from those of its parts.

    Alpha stays between the least and the most of the input around it: what is opaque remains so.

    Args:
        tile: that was split.
    """
    colours = outputs[0]
    assert not isinstance(colours, float)
    wanted = len(tile) - (len(outputs) - 1)
    found = [colours if len(colours) == wanted else colours.mean(axis=0, keepdims=True)]
    for alpha in outputs[1:]:
        if isinstance(alpha, float):
            found.append(np.full((1, *colours.shape[1:]), alpha, np.float32))
        else:
            scale = colours.shape[1] // tile.shape[1]
            least, most = (bound.repeat(scale, 0).repeat(scale, 1) for bound in _around(tile[-1]))
            found.append(alpha.mean(axis=0, keepdims=True).clip(least, most))
    return np.concatenate(found) if len(found) > 1 else found[0]


def _around(plane: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Least and most of each pixel and its eight neighbours."""
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(plane, 1, "edge"), (3, 3))
    return windows.min(axis=(2, 3)), windows.max(axis=(2, 3))
