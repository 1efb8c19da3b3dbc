"""LCR, BR and BiDRB of BiDRN, and the blocks of other methods on the same convolution.

All blocks take and give ``(N, C, H, W)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condiquant_plugin.binary.binarizers import Gradient
from condiquant_plugin.binary.convolution import BinarizedConv2d, RPReLU
from condiquant_plugin.errors import InputError, check_choice

Form = Literal["same", "down", "fusion_up", "fusion_down"]
"""Of an LCR: ``"same"`` keeps the shape, ``"down"`` halves height and width and doubles the channels,
``"fusion_up"`` doubles the channels, ``"fusion_down"`` halves them."""
BlockName = Literal["bidrb", "plain", "e2fif", "bbcu", "float"]


class LCR(nn.Module):
    """Local convolution residual: ``RPReLU(BiConv(x)) + x``, whatever changes in between.

    The four forms (those of BiSRNet, arXiv 2305.10299, figure 2, which BiDRN generalizes), with
    ``f(x) = RPReLU(BiConv(x)) + x`` of as many channels as its input has:

    - ``same``: ``f(x)``
    - ``down``: ``[f1(p), f2(p)]`` of the average ``p`` of every 2x2 pixels
    - ``fusion_up``: ``[f1(x), f2(x)]``
    - ``fusion_down``: ``(f1(first half of x) + f2(second half)) / 2``

    Args:
        channels: of the input.
        form: see :data:`Form`.
        gradient: that of the sign of activations.

    Raises:
        InputError: a form that is not known, or an odd number of channels to halve.
    """

    def __init__(
        self, channels: int, form: Form = "same", *, gradient: Gradient = "hardtanh"
    ) -> None:
        super().__init__()
        self.form, self.out_channels = form, channels_after(form, channels)
        width = min(channels, self.out_channels)
        count = 1 if form == "same" else 2
        self.convolutions = nn.ModuleList(
            BinarizedConv2d(width, width, gradient=gradient) for _ in range(count)
        )
        self.activations = nn.ModuleList(RPReLU(width) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        """``(N, out_channels, H, W)``; of ``down`` half the height and width, rounded down."""
        if self.form == "same":
            return self._unit(0, x)
        if self.form == "fusion_down":
            first, second = x.chunk(2, 1)
            return (self._unit(0, first) + self._unit(1, second)) / 2
        if self.form == "down":
            x = F.avg_pool2d(x, 2)
        return torch.cat([self._unit(0, x), self._unit(1, x)], 1)

    def _unit(self, index: int, x: Tensor) -> Tensor:
        activated: Tensor = self.activations[index](self.convolutions[index](x))
        return activated + x


def channels_after(form: Form, channels: int) -> int:
    """Of the output of an LCR.

    Raises:
        InputError: a form that is not known, or an odd number of channels to halve.

    >>> channels_after("down", 32), channels_after("fusion_down", 32)
    (64, 16)
    """
    check_choice("form", form, get_args(Form))
    if form == "fusion_down" and channels % 2:
        raise InputError(
            f"fusion_down halves the channels, of which there are {channels}: use an even number"
        )
    return {"same": channels, "fusion_down": channels // 2}.get(form, 2 * channels)


class BiDRB(nn.Module):
    """LCRs in a row, and the block residual beside them: ``LCR_n(... LCR_1(x)) + BR(x)``.

    BR is a 1x1 convolution in float from the block's input to its output, behind as many averages of 2x2
    pixels as there are ``down`` forms; it starts at zero, so that a block begins as its LCRs.

    Args:
        channels: of the input.
        forms: of the LCRs, at least one.
        gradient: that of the sign of activations.
        residual: False leaves BR out, for ablation.

    Raises:
        InputError: no forms, or those of :class:`LCR`.
    """

    def __init__(
        self,
        channels: int,
        forms: Sequence[Form] = ("same", "same"),
        *,
        gradient: Gradient = "hardtanh",
        residual: bool = True,
    ) -> None:
        super().__init__()
        if not forms:
            raise InputError(f"forms={forms!r}: give at least one of {', '.join(get_args(Form))}")
        width, steps = channels, []
        for form in forms:
            steps.append(LCR(width, form, gradient=gradient))
            width = steps[-1].out_channels
        self.steps, self.out_channels = nn.Sequential(*steps), width
        self.halvings = list(forms).count("down")
        self.residual = nn.Conv2d(channels, width, 1, bias=False) if residual else None
        if self.residual is not None:
            nn.init.zeros_(self.residual.weight)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, out_channels, H', W')``, halved by every ``down``."""
        result: Tensor = self.steps(x)
        if self.residual is None:
            return result
        for _ in range(self.halvings):
            x = F.avg_pool2d(x, 2)
        return result + self.residual(x)


class PlainBlock(nn.Module):
    """SRResNet's block without normalization, binarized: ``x + BiConv(ReLU(BiConv(x)))``."""

    def __init__(self, channels: int, gradient: Gradient = "hardtanh") -> None:
        super().__init__()
        self.first, self.second = (
            BinarizedConv2d(channels, channels, gradient=gradient, learned_threshold=False)
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(F.relu(self.first(x)))
        return x + result


class FloatBlock(nn.Module):
    """SRResNet's block without normalization: ``x + conv(ReLU(conv(x)))``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(F.relu(self.first(x)))
        return x + result


class E2FIFBlock(nn.Module):
    """E2FIF's (arXiv 2207.06893): LeakyReLU between two units ``BatchNorm(BiConv(x)) + x``, no scales."""

    def __init__(self, channels: int, gradient: Gradient = "polynomial") -> None:
        super().__init__()
        self.first, self.second = (
            BinarizedConv2d(
                channels, channels, gradient=gradient, learned_threshold=False, scaled=False
            )
            for _ in range(2)
        )
        self.first_norm, self.second_norm = (nn.BatchNorm2d(channels) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.first_norm(self.first(x)) + x, 0.1)
        result: Tensor = self.second_norm(self.second(x))
        return result + x


class BBCUBlock(nn.Module):
    """BBCU's (ICML 2022): two units ``RPReLU(BiConv(x)) + x``, nothing beside them.

    Its residual alignment is the network's: the image times ``k`` in front, the output divided by it.
    """

    def __init__(self, channels: int, gradient: Gradient = "polynomial") -> None:
        super().__init__()
        self.units = nn.Sequential(*(LCR(channels, gradient=gradient) for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.units(x)
        return result


BLOCKS: dict[str, Callable[..., nn.Module]] = {
    "bidrb": BiDRB,
    "plain": PlainBlock,
    "e2fif": E2FIFBlock,
    "bbcu": BBCUBlock,
    "float": FloatBlock,
}
"""By :data:`BlockName`; each takes the number of channels."""
