"""Crops mirrored and turned, by a generator whose state a checkpoint keeps."""

from __future__ import annotations

import torch
from torch import Tensor


def augmented(crops: Tensor, generator: torch.Generator) -> Tensor:
    """Each crop of ``(count, channels, height, width)`` mirrored and turned at random.

    That gives one of eight forms; of crops that are no squares one of the four with their height and width.
    """
    forms = 8 if crops.shape[-2] == crops.shape[-1] else 4
    chosen = torch.randint(forms, (len(crops),), generator=generator)
    return torch.stack([_form(*pair) for pair in zip(crops, chosen.tolist(), strict=True)])


def _form(crop: Tensor, number: int) -> Tensor:
    crop = crop.flip(-1) if number & 1 else crop
    crop = crop.flip(-2) if number & 2 else crop
    return crop.transpose(-2, -1) if number & 4 else crop
