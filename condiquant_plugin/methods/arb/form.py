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

    def flags(self, packed: Tensor, dtype: torch.dtype = torch.bool) -> Tensor:
        """One for every feature."""
        return unpack_bits(packed, self.features, dtype)

    def element_groups(self) -> Sequence[tuple[Tensor | None, Tensor | None, int]]:
        """Columns ``(groups, 1, features)`` and elements ``(groups, rows, features)`` of each group, 0 and
        1, None for all; and its planes."""
        large: list[Tensor | None] = [None]
        if self.large is not None:
            is_large = self.flags(self.large, torch.float32)
            large = [is_large, 1 - is_large]
        if self.salient is None:
            return [(None, elements, 1) for elements in large]
        inside = self.flags(self.salient, torch.float32)[:, None]
        salient = large if self.splits_salient else [None]
        return [(1 - inside, m, 1) for m in large] + [(inside, m, 2) for m in salient]

    def matrices(self) -> Tensor:
        """See :class:`CompressedWeight`."""
        packed = [self.signs] if self.second_signs is None else [self.signs, self.second_signs]
        signs = [self._blocks(self.flags(p, torch.float32) * 2 - 1) for p in packed]
        offsets = torch.zeros_like(signs[0])
        scales = [torch.zeros_like(signs[0]) for _ in signs]
        plane = 0
        for index, (columns, elements, planes) in enumerate(self.element_groups()):
            terms = [] if self.offsets is None else [(offsets, self.offsets[..., index], columns)]
            for order in range(planes):
                by_column = columns
                if self.column_scales is not None:
                    scale = self.column_scales[:, None, plane].float()
                    by_column = scale if columns is None else scale * columns
                terms.append((scales[order], self.row_scales[..., plane], by_column))
                plane += 1
            for total, by_row, by_column in terms:
                part = by_row.float()[..., None]
                if by_column is not None:
                    part = part * self._blocks(by_column)
                total += part if elements is None else part * self._blocks(elements)
        for scale, sign in zip(scales, signs, strict=True):
            offsets += scale.mul_(sign)
        dense = offsets.flatten(-2)
        return dense if self.kept is None else dense * self.flags(self.kept, torch.float32)

    def _blocks(self, x: Tensor) -> Tensor:
        """``(..., features)`` as ``(..., blocks, features of a block)``."""
        return x.unflatten(-1, (self.blocks, -1))

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
