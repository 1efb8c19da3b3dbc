"""Whether a network's output looks like an enlargement: where its values have another range it does not."""

from __future__ import annotations

from statistics import mean

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import condiquant_basicsr as basicsr_host
from condiquant_recipes.recipe import Recipe

_CROPS = 8
_USUAL_RANGES = (1.0, 255.0)
_CLEARLY_CLOSER = 3.0
"""In dB."""
_NEAR, _FAR = 31.0, 20.0
"""In dB. DAT-light x4 is 33.7 dB from bicubic, 29.4 where it is given 0 to 1 for 0 to 255."""


def range_warning(network: nn.Module, recipe: Recipe, crops: Tensor) -> str | None:
    """What is wrong with the range of a network's values, in one line with the remedy, if something is.

    Its output is compared with the bicubic enlargement, in dB (Y, border cropped), also at the usual other
    ranges. A network that is near enough at its own may be nearer at another, where all it adds is small.

    Args:
        crops: of photographs, shape ``(count, 3, height, width)``, range 0 to 1.
    """
    crops, bare = crops[:_CROPS], basicsr_host.bare(network)
    found = _from_bicubic(network, crops, recipe.scale)
    if found > _NEAR:
        return None
    at_others = {
        each: _from_bicubic(basicsr_host.in_range(bare, each, recipe.mean), crops, recipe.scale)
        for each in _USUAL_RANGES
        if each != recipe.img_range
    }
    better = max(at_others, key=at_others.__getitem__)
    start = f"the network's output on photographs is {found:.1f} dB from their bicubic enlargement"
    if at_others[better] > found + _CLEARLY_CLOSER:
        return (
            f"{start}, and {at_others[better]:.1f} dB with values of another range: if it was trained on"
            f" them, use --set img_range={better:g}"
        )
    if found < _FAR:
        return (
            f"{start}: check that the weights are this network's, and the range of its values"
            " (img_range, mean)"
        )
    return None


@torch.no_grad()
def _from_bicubic(network: nn.Module, crops: Tensor, scale: int) -> float:
    scores = []
    for crop in crops.split(1):
        enlarged = F.interpolate(crop, scale_factor=scale, mode="bicubic", align_corners=False)
        scores.append(basicsr_host.psnr(network(crop)[0], enlarged[0], scale))
    return mean(scores)
