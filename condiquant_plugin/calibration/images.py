"""Which calibration images pass a network together, and which are held out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

_SEQUENCE_PIXELS = 2**16
"""Of the images that stand still inside a network at once; 64 crops of 32x32."""
_AT_ONCE = 16
"""Crops of one size in one pass of a sequence."""
_PIXELS_AT_ONCE = 2**13
"""Of small images that pass a network together, where nothing depends on which they are."""
_HELD_OUT = 8
"""Every eighth image is held out if there are candidates to choose from."""


def held_out(count: int) -> tuple[list[int], list[int]]:
    """Places of the images that are calibrated with, and of those held out; the only one is both.

    >>> held_out(9)
    ([0, 1, 2, 3, 4, 5, 6, 8], [7])
    >>> held_out(3)
    ([0, 1], [2])
    """
    chosen = list(range(_HELD_OUT - 1, count, _HELD_OUT)) or [count - 1]
    return [i for i in range(count) if i not in chosen] or chosen, chosen


def together(images: Sequence[Any], size: int) -> list[Any]:
    """Batches of up to ``size`` neighbouring tensors of one shape; all else as it is."""
    batches: list[Any] = []
    pending: list[Tensor] = []
    for image in images:
        if pending and (not _alike(pending[0], image) or len(pending) == size):
            batches.append(torch.cat(pending))
            pending = []
        if isinstance(image, Tensor):
            pending.append(image)
        else:
            batches.append(image)
    return [*batches, torch.cat(pending)] if pending else batches


def few_at_once(images: Sequence[Any], least: int = 1) -> list[Any]:
    """Batches of small neighbours, which many operators on little data would keep waiting one by one.

    Args:
        least: tensors in a batch, however large.
    """
    pixels = max((_pixels(image) for image in images), default=1)
    return together(images, max(_PIXELS_AT_ONCE // pixels, least))


def _alike(first: Tensor, second: Any) -> bool:
    return isinstance(second, Tensor) and first.shape[1:] == second.shape[1:]


def sequence_of(images: Sequence[Any]) -> list[Any]:
    """As many of the first images as may stand still in a network, at least one."""
    return together(images[: sequence_length(images)], _AT_ONCE)


def sequence_length(images: Sequence[Any]) -> int:
    """How many that are."""
    pixels = 0
    for count, image in enumerate(images):
        pixels += _pixels(image)
        if count and pixels > _SEQUENCE_PIXELS:
            return count
    return len(images)


def _pixels(image: Any) -> int:
    sizes = (t.shape[0] * t[0, 0].numel() for t in tree_leaves(image) if _is_image(t))
    return max(sizes, default=1)


def _is_image(x: Any) -> bool:
    return isinstance(x, Tensor) and x.ndim > 2 and x.numel() > 0
