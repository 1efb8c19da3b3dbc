"""Which elements share scales: column and group bitmaps, found block by block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ErrorOf = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``sum_ij M w_j (W - Q)_ij^2`` by block, for ``W``, a mask ``M`` of its shape and ``w``."""

_SAMPLE = 4096
"""Elements of a block that a quantile is taken of."""


@dataclass(frozen=True)
class Bitmaps:
    """Of a batch of blocks."""

    columns: Tensor
    """Candidates for salient columns, best first, ``(batch, most)``."""
    salient: Tensor
    """1 for those of them that are, ``(batch, 1, most)``."""
    large: Tensor
    """1 for elements of large magnitude, ``(batch, rows, columns)``."""

    def among(self, x: Tensor) -> Tensor:
        """The candidates' columns of ``(batch, rows, columns)``."""
        return x.gather(-1, self.columns[:, None].expand(-1, x.shape[-2], -1))

    def spread(self, x: Tensor, width: int) -> Tensor:
        """Inverse of :meth:`among`, zero elsewhere."""
        zeros = x.new_zeros(*x.shape[:-1], width)
        return zeros.scatter(-1, self.columns[:, None].expand(-1, x.shape[-2], -1), x)

    def salient_columns(self, width: int) -> Tensor:
        """1 for salient columns, ``(batch, 1, columns)``."""
        return self.spread(self.salient, width)


def search_bitmaps(
    W: Tensor,
    sensitivity: Tensor,
    first: ErrorOf,
    second: ErrorOf,
    *,
    shares: Sequence[float],
    quantiles: Sequence[float],
    splits_salient: bool,
) -> Bitmaps:
    """Bitmaps of least error ``sum_ij (W - Q)_ij^2 s_j``, ``s_j = 1 / [U]_jj^2``.

    First how many of the best columns by ``sum_i W_ij^2 s_j`` are salient, then above which quantile of
    ``|W|`` of the others a magnitude is large.

    Args:
        W: ``(batch, rows, columns)``.
        sensitivity: ``s``, ``(batch, 1, columns)``.
        first: of what elements outside salient columns become.
        second: of what those in salient columns become.
        shares: of the columns, to choose from.
        quantiles: to choose from.
        splits_salient: whether salient columns are split by magnitude too (CGB), or not (BiLLM).
    """
    width = W.shape[-1]
    counts = [min(max(round(share * width), 1), width - 1) for share in shares]
    scores = (W.square() * sensitivity).sum(-2)
    columns = scores.topk(max(counts), dim=-1).indices
    found = Bitmaps(columns, torch.ones_like(columns[:, None], dtype=W.dtype), torch.ones_like(W))
    inner, weights = found.among(W), found.among(sensitivity)
    best, salient = None, found.salient
    for count in counts:
        chosen = torch.zeros_like(found.salient)
        chosen[..., :count] = 1
        outer = 1 - found.spread(chosen, width)
        error = first(W, outer.expand_as(W), sensitivity)
        error = error + second(inner, chosen.expand_as(inner), weights)
        best, salient = _better(best, error, salient, chosen)
    outer = 1 - found.spread(salient, width)
    sizes = W.abs()
    thresholds = _quantiles(sizes, outer, quantiles)
    best, large = None, found.large
    for threshold in thresholds:
        chosen = (sizes >= threshold).to(W.dtype)
        outside = outer * chosen
        error = first(W, outside, sensitivity) + first(W, outer - outside, sensitivity)
        if splits_salient:
            part = found.among(chosen)
            for mask in (salient * part, salient * (1 - part)):
                error = error + second(inner, mask, weights)
        best, large = _better(best, error, large, chosen)
    return Bitmaps(columns, salient, large)


def _better(
    best: Tensor | None, error: Tensor, before: Tensor, new: Tensor
) -> tuple[Tensor, Tensor]:
    """Of each block the choice of less error; the earlier of two equal ones."""
    if best is None:
        return error, new
    better = error < best
    share = better.to(new.dtype)[:, None, None]
    return torch.where(better, error, best), before * (1 - share) + new * share


def _quantiles(sizes: Tensor, mask: Tensor, quantiles: Sequence[float]) -> Tensor:
    """Of the masked elements, each ``(batch, 1, 1)``."""
    rows = max(_SAMPLE // sizes.shape[-1], 1)
    every = max(sizes.shape[-2] // rows, 1)
    some = torch.where(mask > 0, sizes, torch.nan)[:, ::every].flatten(1)
    at = torch.tensor(quantiles, dtype=sizes.dtype, device=sizes.device)
    return torch.nanquantile(some, at, dim=-1)[..., None, None]
