"""Weights of one bit: signs, scales, and what says which scale is whose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from condiquant_plugin.methods.compression.form import (
    FRACTION_BITS,
    CompressedWeight,
    Layout,
    unpack_bits,
)


@dataclass(frozen=True)
class BinaryWeight(CompressedWeight):
    """Sums of signs times scales; ``(groups, rows, features)`` and blocks of consecutive features.

    A group of elements has an offset (or none) and one plane, in salient columns two. The order of groups:
    others large, others small, salient large, salient small; of planes: by group, a group's second behind
    its first. Without a bitmap there is no "small", without salient columns no "salient".
    """

    signs: Tensor
    """Whether positive; like all flags packed in bytes along the features, ``pack_bits``."""
    row_scales: Tensor
    """``(groups, rows, blocks, planes)``, float16."""
    column_scales: Tensor | None
    """``(groups, planes, features)``, float16; used where the plane has elements."""
    offsets: Tensor | None
    """``(groups, rows, blocks, element groups)``, float16."""
    salient: Tensor | None
    """Whether a column is, packed, ``(groups, features)``."""
    second_signs: Tensor | None
    """Of salient columns, packed, ``(groups, rows, features)``."""
    large: Tensor | None
    """Whether an element is, packed, ``(groups, rows, features)``."""
    kept: Tensor | None
    """Whether an element is not zero, packed, ``(groups, rows, features)``."""
    pattern: tuple[int, int] | None
    """N and M of ``kept``: N of every M elements of a row."""
    splits_salient: bool
    """Whether ``large`` splits salient columns too."""
    features: int
    layout: Layout

    @property
    def blocks(self) -> int:
        """Of each row."""
        return self.row_scales.shape[2]

    def flags(self, packed: Tensor) -> Tensor:
        """Bool, one for every feature."""
        return unpack_bits(packed, self.features)

    def element_groups(self) -> Sequence[tuple[Tensor | float, int]]:
        """Mask and number of planes of each group."""
        large: list[Tensor | float] = [1.0]
        if self.large is not None:
            is_large = self.flags(self.large)
            large = [is_large.float(), (~is_large).float()]
        if self.salient is None:
            return [(mask, 1) for mask in large]
        inside = self.flags(self.salient)[:, None].float()
        salient = large if self.splits_salient else [1.0]
        return [((1 - inside) * m, 1) for m in large] + [(inside * m, 2) for m in salient]

    def matrices(self) -> Tensor:
        """See :class:`CompressedWeight`."""
        per_block = self.features // self.blocks
        signs = [self.flags(self.signs).float() * 2 - 1]
        if self.second_signs is not None:
            signs.append(self.flags(self.second_signs).float() * 2 - 1)
        total = torch.zeros_like(signs[0])
        plane = 0
        for index, (mask, planes) in enumerate(self.element_groups()):
            part = torch.zeros_like(total)
            if self.offsets is not None:
                part += self.offsets[..., index].float().repeat_interleave(per_block, -1)
            for order in range(planes):
                scale = self.row_scales[..., plane].float().repeat_interleave(per_block, -1)
                if self.column_scales is not None:
                    scale = scale * self.column_scales[:, None, plane].float()
                part += scale * signs[order]
                plane += 1
            total += part * mask
        return total if self.kept is None else total * self.flags(self.kept)

    def stored_bits(self) -> dict[str, float]:
        """Signs and bitmaps of elements that are kept, masks at their entropy, all scales."""
        n, m = self.pattern or (1, 1)
        share = n / m
        (groups, rows), features = self.signs.shape[:2], self.features
        counts = {"signs": share * self.parameters}
        salient = 0
        if self.salient is not None:
            salient = int(self.flags(self.salient).sum())
            counts["salient columns"] = groups * features
            counts["second signs"] = share * salient * rows
        if self.large is not None:
            split = groups * features - (0 if self.splits_salient else salient)
            counts["group bitmap"] = share * split * rows
        if self.pattern is not None:
            counts["mask"] = self.parameters * math.log2(math.comb(m, n)) / m
        counts["row scales"] = FRACTION_BITS * self.row_scales.numel()
        if self.offsets is not None:
            counts["offsets"] = FRACTION_BITS * self.offsets.numel()
        if self.column_scales is not None:
            each = 1 if self.large is None else 2
            inside = 2 * (each if self.splits_salient else 1)
            columns = each * (groups * features - salient) + inside * salient
            counts["column scales"] = FRACTION_BITS * columns
        return counts

    @property
    def has_kernel(self) -> bool:
        """Whether it is one matrix of -1, 0 and 1 between scales of rows and columns."""
        return self.large is None and self.salient is None and self.offsets is None

    def codes(self) -> Tensor:
        """-1, 0 and 1, int8, ``(groups, rows, features)``; where there :attr:`has_kernel`."""
        signs = self.flags(self.signs).to(torch.int8) * 2 - 1
        return signs if self.kept is None else signs * self.flags(self.kept).to(torch.int8)
