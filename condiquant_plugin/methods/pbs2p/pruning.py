"""Stepwise pruning to N of every M weights, and the scales of what is kept (PBS2P).

A block ``W`` of shape ``(batch, rows, columns)`` becomes ``P * (alpha B) + mu``, ``B = sign W`` and ``P`` a
mask with N ones among every M consecutive elements of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from condiquant_plugin.methods.arb.refinement import (
    Group,
    coordinate_descent,
    terms_of,
    with_coefficients,
)


def pruning_score(W: Tensor, sensitivity: Tensor) -> Tensor:
    """``W_ij^2 / [U]_jj^2``: what the loss grows by when element j goes and later ones make up for it."""
    return W.square() * sensitivity


def nm_mask(score: Tensor, n: int, m: int) -> Tensor:
    """1 for the ``n`` largest of every ``m`` along a row, the earlier of equal ones first."""
    parts = score.unflatten(-1, (-1, m))
    largest = parts.sort(dim=-1, descending=True, stable=True).indices[..., :n]
    return torch.zeros_like(parts).scatter_(-1, largest, 1).flatten(-2)


def one_fewer(mask: Tensor, score: Tensor, m: int) -> Tensor:
    """A step: of the kept ones of every ``m`` the one of lowest score goes, the later of equal ones."""
    kept = torch.where(mask > 0, score, torch.inf).unflatten(-1, (-1, m)).flip(-1)
    lowest = m - 1 - kept.argmin(-1, keepdim=True)
    return mask.unflatten(-1, (-1, m)).scatter(-1, lowest, 0).flatten(-2)


def refitted(
    groups: Sequence[Group], mask: Tensor, W: Tensor, G: Tensor, rounds: int
) -> list[Group]:
    """Scales and offsets of the kept elements by the loss with ``G``, as ARB-X's; the signs stay."""
    masked = [replace(group, mask=group.mask * mask) for group in groups]
    terms, coefficients = terms_of(masked, W)
    return with_coefficients(masked, coordinate_descent(terms, coefficients, W, G, rounds))


def spbo(
    W: Tensor,
    G: Tensor,
    groups: Sequence[Group],
    score: Tensor,
    pattern: tuple[int, int],
    rounds: int,
) -> tuple[list[Group], Tensor]:
    """Stepwise pruning with binary optimization: M - N times :func:`one_fewer`, then :func:`refitted`.

    The score does not change on the way, so the last mask is :func:`nm_mask` of it; each step's scales
    start from those of the one before.

    Args:
        G: ``(batch, columns, columns)``, positive definite.
        groups: of the dense binarization.
        score: :func:`pruning_score`.

    Returns:
        The groups, and the mask.
    """
    n, m = pattern
    mask = torch.ones_like(W)
    found = list(groups)
    for _ in range(m - n):
        mask = one_fewer(mask, score, m)
        found = refitted(groups_like(groups, found), mask, W, G, rounds)
    return found, mask


def groups_like(masks: Sequence[Group], found: Sequence[Group]) -> list[Group]:
    """``found`` with the masks of ``masks``, as they were before any pruning."""
    return [replace(group, mask=whole.mask) for whole, group in zip(masks, found, strict=True)]
