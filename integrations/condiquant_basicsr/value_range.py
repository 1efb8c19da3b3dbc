"""Networks trained on images of another range than 0 to 1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class InRange(nn.Module):
    """A network that takes and gives other values, made one for images in 0 to 1.

    ``network((image - mean) * img_range) / img_range + mean``, as BasicSR's own networks do inside.

    Args:
        img_range: what white is to the network, such as 255.
        mean: of each channel, in units of 0 to 1.
    """

    mean: Tensor

    def __init__(self, network: nn.Module, img_range: float, mean: Sequence[float]) -> None:
        super().__init__()
        self.network, self.img_range = network, img_range
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """``(1, 3, H, W)`` to ``(1, 3, scale * H, scale * W)``."""
        output: Tensor = self.network((image - self.mean) * self.img_range)
        return output / self.img_range + self.mean


def in_range(network: nn.Module, img_range: float, mean: Sequence[float] | None) -> nn.Module:
    """The network, in an :class:`InRange` where it needs one."""
    if img_range == 1 and not mean:
        return network
    return InRange(network, img_range, mean or (0.0,)).eval()


def bare(network: nn.Module) -> nn.Module:
    """The network without its :class:`InRange`."""
    return network.network if isinstance(network, InRange) else network
