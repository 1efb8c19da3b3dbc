"""The binarized convolution of BiDRN, and what stands behind it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condiquant_plugin.binary.binarizers import (
    ActivationBinarizer,
    Gradient,
    weight_scale,
    weight_signs,
)
from condiquant_plugin.errors import InputError


class BinarizedConv2d(nn.Module):
    """``scale * (sign(weight) conv sign(x - threshold))``, same height and width.

    The scale stands behind the convolution, whose sums are whole numbers and so exact in any order.
    Outside the image there are zeros, as the convolution of OpenVINO has them: they add nothing, and what
    is trained is what is exported.

    Args:
        in_channels, out_channels: of ``(N, C, H, W)``.
        kernel_size: odd.
        gradient: that of the sign of activations.
        learned_threshold: of activations.
        scaled: False leaves the sums as they are, for a normalization behind (E2FIF).

    Raises:
        InputError: an even kernel, or none of the gradients.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        gradient: Gradient = "hardtanh",
        learned_threshold: bool = True,
        scaled: bool = True,
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise InputError(f"kernel_size={kernel_size}: use an odd one, such as 3")
        self.padding, self.scaled = kernel_size // 2, scaled
        self.name = ""
        """Label of its signs and its weight in exported graphs."""
        self.binarizer = ActivationBinarizer(in_channels, gradient, learned=learned_threshold)
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size, kernel_size))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        signs = self.binarizer(x, self.name)
        sums = F.conv2d(
            signs, weight_signs(self.weight, f"{self.name}.weight"), padding=self.padding
        )
        return sums * weight_scale(self.weight).view(1, -1, 1, 1) if self.scaled else sums


def binarized_convolutions(model: nn.Module) -> dict[str, BinarizedConv2d]:
    """Every binarized convolution of a model by module name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, BinarizedConv2d)}


class RPReLU(nn.Module):
    """``PReLU(y - shift) + offset``, all three per channel (ReActNet, arXiv 2003.03488)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(channels))
        self.slope = nn.Parameter(torch.full((channels,), 0.25))
        self.offset = nn.Parameter(torch.zeros(channels))

    def forward(self, y: Tensor) -> Tensor:
        """Of the shape of ``y``, ``(N, channels, H, W)``."""
        shifted = F.prelu(y - self.shift.view(1, -1, 1, 1), self.slope)
        return shifted + self.offset.view(1, -1, 1, 1)
