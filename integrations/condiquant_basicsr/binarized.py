"""Binarized super-resolution networks among BasicSR's architectures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn

from condiquant_plugin.binary.binarizers import Gradient
from condiquant_plugin.binary.blocks import BLOCKS, BlockName, Form
from condiquant_plugin.errors import InputError, check_choice, check_count
from condiquant_plugin.uniform.fake_quantizer import FakeQuantizer

Base = Literal["bicubic", "bilinear", "nearest"]
_UPSCALES, _TAIL_BITS = (2, 3, 4), (32, 8)
_ALIGNMENT_PER_CHANNEL = {"bbcu": 130 / 64, "bidrb": 1 / 2}
"""Of BBCU, ``k`` of its option files, which are of 64 channels; of BiDRB, the best of four in a pilot."""


@ARCH_REGISTRY.register()
class BiDRNSR(nn.Module):
    """Head and tail of one convolution each around a body of binarized blocks, on top of interpolation.

    ``interpolate(x) + PixelShuffle(tail(body(head(x))))``, for images ``(N, num_in_ch, H, W)`` in 0 to 1.

    Args:
        num_in_ch, num_out_ch: channels of the images, the same.
        num_feat: of the features.
        num_block: blocks of the body.
        upscale: 2, 3 or 4.
        block: ``bidrb`` (BiDRN), ``plain``, ``e2fif``, ``bbcu`` or ``float``; see
            :mod:`condiquant_plugin.binary.blocks`.
        forms: of the LCRs of every ``bidrb``, which have to come back to ``num_feat`` channels:
            ``[same, same]`` unless given, or such as ``[fusion_up, fusion_down]``.
        gradient: of the sign of activations; the method's own unless given.
        tail_bits: 32 for float, 8 for a tail of 8-bit weights and inputs.
        base: the interpolation: ``bicubic``, ``bilinear`` or ``nearest``.
        alignment: BBCU's ``k``, by which the image is multiplied in front of the head and the output of
            the tail divided, so that features and sums of ±1 have one range; unless given,
            ``130 * num_feat / 64`` of ``bbcu``, ``num_feat / 2`` of ``bidrb``, else 1.

    Raises:
        InputError: what cannot be built; names the value and the remedy.
    """

    def __init__(
        self,
        num_in_ch: int = 3,
        num_out_ch: int = 3,
        num_feat: int = 64,
        num_block: int = 8,
        upscale: int = 4,
        block: BlockName = "bidrb",
        forms: Sequence[Form] | None = None,
        gradient: Gradient | None = None,
        tail_bits: int = 32,
        base: Base = "bicubic",
        alignment: float | None = None,
    ) -> None:
        super().__init__()
        for name, count in (("num_feat", num_feat), ("num_block", num_block)):
            check_count(name, count)
        check_choice("block", block, get_args(BlockName))
        check_choice("upscale", upscale, _UPSCALES)
        check_choice("tail_bits", tail_bits, _TAIL_BITS)
        check_choice("base", base, get_args(Base))
        if num_in_ch != num_out_ch:
            raise InputError(
                f"num_in_ch={num_in_ch} and num_out_ch={num_out_ch}: the interpolated image is added to"
                " the output, use the same"
            )
        if forms is not None and block != "bidrb":
            raise InputError(f"forms are those of block bidrb: leave them out with block={block!r}")
        if gradient is not None and block == "float":
            raise InputError("block='float' has no signs: leave out gradient")
        self.upscale, self.base = upscale, base
        if alignment is None:
            per_channel = _ALIGNMENT_PER_CHANNEL.get(block)
            alignment = per_channel * num_feat if per_channel else 1.0
        if not alignment > 0:
            raise InputError(f"alignment={alignment}: use a positive number, 1 for none")
        self.alignment = float(alignment)
        options: dict[str, object] = {} if forms is None else {"forms": tuple(forms)}
        if gradient is not None:
            options["gradient"] = gradient
        self.head = nn.Conv2d(num_in_ch, num_feat, 3, padding=1)
        self.body = nn.Sequential(*(BLOCKS[block](num_feat, **options) for _ in range(num_block)))
        _check_keeps_shape(self.body[0], num_feat, forms)
        tail = _EightBitConv2d if tail_bits == 8 else nn.Conv2d
        self.tail: nn.Conv2d = tail(num_feat, num_out_ch * upscale**2, 3, padding=1)
        with torch.no_grad():  # it begins near the interpolated image
            self.tail.weight.mul_(0.1)
            assert self.tail.bias is not None
            self.tail.bias.zero_()
        self.shuffle = nn.PixelShuffle(upscale)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, num_out_ch, upscale * H, upscale * W)``."""
        aligned = x if self.alignment == 1 else x * self.alignment
        details = self.shuffle(self.tail(self.body(self.head(aligned))))
        if self.alignment != 1:
            details = details / self.alignment
        corners = None if self.base == "nearest" else False
        base = F.interpolate(x, scale_factor=self.upscale, mode=self.base, align_corners=corners)
        return base + details


def _check_keeps_shape(block: nn.Module, channels: int, forms: Sequence[Form] | None) -> None:
    found = getattr(block, "out_channels", channels)
    if getattr(block, "halvings", 0):
        raise InputError(f"forms={list(forms or ())} halve the image: leave out 'down'")
    if found != channels:
        raise InputError(
            f"forms={list(forms or ())} lead from {channels} channels to {found}: a block has to come back"
            " to num_feat, as [fusion_up, fusion_down] does"
        )


class _EightBitConv2d(nn.Conv2d):
    """A convolution of 8-bit weights and inputs, with learned bounds, searched on the first batch."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, padding: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=padding)
        self.input_quantizer = FakeQuantizer(8, "activation", name="tail.input")
        self.weight_quantizer = FakeQuantizer(
            8, "weight", row_blocks=out_channels, name="tail.weight"
        )
        self.searched: Tensor
        self.register_buffer("searched", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not self.searched:
            self.input_quantizer.search_bounds(x)
            self.weight_quantizer.search_bounds(self.weight)
            self.searched.fill_(True)
        if not self.searched:  # built, and not trained yet
            return super().forward(x)
        weight = self.weight_quantizer(self.weight)
        return F.conv2d(self.input_quantizer(x), weight, self.bias, padding=self.padding)
