"""ARB-LLM, BiLLM's plain form and rounding to signs as a method of layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from condiquant_plugin.errors import InputError, check_choice
from condiquant_plugin.layerwise.problem import LayerProblem, Solution
from condiquant_plugin.methods.adasvd.method import with_residual
from condiquant_plugin.methods.arb import refinement
from condiquant_plugin.methods.arb.bitmaps import Bitmaps, search_bitmaps
from condiquant_plugin.methods.arb.form import BinaryWeight
from condiquant_plugin.methods.arb.refinement import Group
from condiquant_plugin.methods.compression.feedback import Block
from condiquant_plugin.methods.compression.form import FRACTION, CompressedWeight, Layout, pack_bits
from condiquant_plugin.methods.compression.settings import BlockSettings
from condiquant_plugin.methods.compression.stacks import Stack, solve_in_stacks

Refinement = Literal["rounding", "billm", "arb", "arb_x", "arb_rc"]
"""How signs and scales are found: functions of :mod:`condiquant_plugin.methods.arb.refinement`."""
BitmapKind = Literal["none", "group", "column_group"]
"""Salient columns of two planes, and the others (``"group"``, BiLLM) or both (``"column_group"``, CGB)
split by magnitude."""
_ROUNDS, _RC_ROUNDS = 15, 6
_SEARCH_ROUNDS = 2
"""Of row and column scales while bitmaps are searched."""


@dataclass(frozen=True)
class ARB(BlockSettings):
    """One bit for every weight (arXiv 2410.03129; BiLLM: arXiv 2402.04291).

    Raises:
        InputError: a setting outside its range.
    """

    refinement: Refinement = "arb_rc"
    bitmaps: BitmapKind = "none"
    rounds: int | None = None
    """Of the refinement; by default the paper's 15, and 6 of the power iteration of ``"arb_rc"``."""
    salient_shares: tuple[float, ...] = (0.05, 0.1, 0.2)
    """Of a block's columns that may be salient."""
    quantiles: tuple[float, ...] = (0.6, 0.75, 0.9)
    """Of magnitudes that may split the others."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("refinement", self.refinement, get_args(Refinement))
        check_choice("bitmaps", self.bitmaps, get_args(BitmapKind))
        if self.rounds is not None and self.rounds < 0:
            raise InputError(f"rounds={self.rounds}: use 0 or more")
        for name in ("salient_shares", "quantiles"):
            values = getattr(self, name)
            if not values or not all(0 < value < 1 for value in values):
                raise InputError(f"{name}={values}: use numbers between 0 and 1")

    @property
    def refinements(self) -> int:
        """Rounds."""
        if self.rounds is not None:
            return self.rounds
        return _RC_ROUNDS if self.refinement == "arb_rc" else _ROUNDS

    def solve(self, problems: Sequence[LayerProblem]) -> list[Solution]:
        """Binary weights; biases stay.

        Raises:
            InputError: NaN or Inf in a weight; a group size or residual rank that does not fit a layer.
        """
        return solve_in_stacks(problems, self._solve)

    def _solve(self, stack: Stack) -> list[CompressedWeight]:
        columns = self.columns_of(stack)
        if self.bitmaps != "none" and columns < 2:
            raise InputError(f"group_size={self.group_size}: bitmaps need at least 2")
        blocks = self.compressed(stack, columns, self.fit)
        split = self.bitmaps == "column_group"
        return with_residual(
            stack, assembled(stack, blocks, splits_salient=split), self.residual_rank
        )

    def fit(self, block: Block) -> FittedBlock:
        """Groups of a block and their signs and scales."""
        W, whole = block.weight, torch.ones_like(block.weight[:, :1])
        if self.bitmaps == "none":
            return FittedBlock(self._refined(block, [self._first(W, whole)]))
        bitmaps = search_bitmaps(
            W,
            block.sensitivity,
            self._first_error,
            self._second_error,
            shares=self.salient_shares,
            quantiles=self.quantiles,
            splits_salient=self.bitmaps == "column_group",
        )
        large, salient = bitmaps.large, bitmaps.salient_columns(W.shape[-1])
        outer = (1 - salient) * large
        groups = self._first(W, torch.stack([outer, 1 - salient - outer])).unbind()
        inner = bitmaps.among(W)
        parts = bitmaps.salient.expand_as(inner)[None]
        if self.bitmaps == "column_group":
            parts = bitmaps.split(bitmaps.among(large))
        for group in self._second(inner, parts).unbind():
            groups.append(_spread(group, bitmaps, W.shape[-1]))
        return FittedBlock(self._refined(block, groups), salient, large)

    def _refined(self, block: Block, groups: list[Group]) -> list[Group]:
        if self.refinement == "arb_x":
            groups = refinement.arb_x(block.weight, block.gram, groups, self.refinements)
        return [group.stored() for group in groups]

    def _first(self, W: Tensor, M: Tensor) -> Group:
        if self.refinement == "rounding":
            return refinement.rounded(W, M)
        if self.refinement == "arb":
            return refinement.arb(W, M, self.refinements)
        if self.refinement == "arb_rc":
            return refinement.arb_rc(W, M, self.refinements)
        return refinement.binarized(W, M)

    def _second(self, W: Tensor, M: Tensor) -> Group:
        if self.refinement == "rounding":
            first = refinement.rounded(W, M)
            rest = refinement.rounded(W - first.dense(), M)
            return replace(first, planes=first.planes + rest.planes)
        if self.refinement == "arb":
            return refinement.arb_second_order(W, M, self.refinements)
        if self.refinement == "arb_rc":
            return refinement.arb_rc_second_order(W, M, self.refinements)
        return refinement.residual_binarized(W, M)

    def _first_error(self, W: Tensor, M: Tensor, weights: Tensor) -> Tensor:
        if self.refinement == "arb_rc":
            return refinement.arb_rc_error(W, M, weights, _SEARCH_ROUNDS, 1)
        quick = refinement.rounded if self.refinement == "rounding" else refinement.binarized
        return _weighted_error(W, quick(W, M), weights)

    def _second_error(self, W: Tensor, M: Tensor, weights: Tensor) -> Tensor:
        if self.refinement == "arb_rc":
            return refinement.arb_rc_error(W, M, weights, _SEARCH_ROUNDS, 2)
        if self.refinement == "rounding":
            return _weighted_error(W, self._second(W, M), weights)
        return _weighted_error(W, refinement.residual_binarized(W, M), weights)


def _weighted_error(W: Tensor, group: Group, weights: Tensor) -> Tensor:
    return ((W * group.mask - group.dense()).square() * weights).sum((-2, -1))


def _spread(group: Group, bitmaps: Bitmaps, width: int) -> Group:
    """A group of candidates' columns among all of a block."""
    planes = tuple(
        replace(
            plane,
            signs=bitmaps.spread(plane.signs, width),
            columns=None if plane.columns is None else bitmaps.spread(plane.columns, width),
        )
        for plane in group.planes
    )
    return Group(bitmaps.spread(group.mask, width), planes, group.offset)


@dataclass(frozen=True)
class FittedBlock:
    """Groups of a block of columns; which element is in which."""

    groups: list[Group]
    salient: Tensor | None = None
    """``(batch, 1, columns)``"""
    large: Tensor | None = None
    """``(batch, rows, columns)``"""
    kept: Tensor | None = None
    """``(batch, rows, columns)``"""

    def dense(self) -> Tensor:
        """``(batch, rows, columns)``"""
        return sum((group.dense() for group in self.groups[1:]), self.groups[0].dense())


def assembled(
    stack: Stack,
    blocks: Sequence[FittedBlock],
    *,
    splits_salient: bool,
    pattern: tuple[int, int] | None = None,
) -> list[BinaryWeight]:
    """The layers' weights from their blocks."""
    shape = stack.weight.shape
    two = any(len(group.planes) > 1 for group in blocks[0].groups)

    def joined(of: str) -> list[Tensor | None]:
        parts = [getattr(block, of) for block in blocks]
        if parts[0] is None:
            return [None] * len(stack.problems)
        whole = torch.cat(parts, -1)
        return [pack_bits(part) for part in stack.split(whole)]

    def signs(order: int) -> list[Tensor]:
        rows = []
        for block in blocks:
            found = [g for g in block.groups if len(g.planes) > order]
            parts = (group.mask * group.planes[order].signs for group in found)
            rows.append(sum(parts, torch.zeros(())).clamp_min(0))
        return [pack_bits(part) for part in stack.split(torch.cat(rows, -1).expand(shape))]

    def of_planes(name: str) -> Tensor:
        return torch.stack(
            [torch.cat([getattr(p, name) for g in b.groups for p in g.planes], -1) for b in blocks],
            2,
        )

    first, second = signs(0), signs(1) if two else [None] * len(stack.problems)
    salient, large, kept = joined("salient"), joined("large"), joined("kept")
    row_scales = stack.split(of_planes("rows").to(FRACTION))
    offsets: list[Tensor | None] = [None] * len(stack.problems)
    if blocks[0].groups[0].offset is not None:
        all_offsets = torch.stack(
            [torch.cat([g.offset for g in b.groups if g.offset is not None], -1) for b in blocks], 2
        )
        offsets = list(stack.split(all_offsets.to(FRACTION)))
    columns: list[Tensor | None] = [None] * len(stack.problems)
    if blocks[0].groups[0].planes[0].columns is not None:
        by_block = [
            torch.cat([p.columns for g in b.groups for p in g.planes if p.columns is not None], 1)
            for b in blocks
        ]
        columns = list(stack.split(torch.cat(by_block, -1).to(FRACTION)))
    return [
        BinaryWeight(
            first[i],
            row_scales[i],
            columns[i],
            offsets[i],
            None if (inside := salient[i]) is None else inside.squeeze(1),
            second[i],
            large[i],
            kept[i],
            pattern,
            splits_salient,
            shape[-1],
            Layout.of(problem),
        )
        for i, problem in enumerate(stack.problems)
    ]
