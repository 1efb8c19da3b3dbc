"""Which elements share scales: column and group bitmaps, found block by block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

ErrorOf = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``sum_ij M w_j (W - Q)_ij^2`` by block, for ``W``, masks ``M``, ``(..., batch, rows or 1, columns)``, and
``w``."""

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
        """The candidates' columns of ``(..., batch, rows, columns)``, each one's numbers side by side: of
        few columns, sums and products are faster so."""
        chosen = x.gather(-1, self.columns[:, None].expand(*x.shape[:-1], -1))
        return chosen.mT.contiguous().mT

    def spread(self, x: Tensor, width: int) -> Tensor:
        """Inverse of :meth:`among`, zero elsewhere."""
        zeros = x.new_zeros(*x.shape[:-1], width)
        return zeros.scatter_(-1, self.columns[:, None].expand_as(x), x)

    def split(self, part: Tensor) -> Tensor:
        """Salient elements in a part and outside, ``(2, batch, rows, most)``."""
        inside = (self.salient * part).mT
        return torch.stack([inside, self.salient.mT - inside]).mT

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
    chosen = (torch.arange(max(counts)) < torch.tensor(counts)[:, None]).to(W)
    salient = chosen[:, None, None].expand(-1, *found.salient.shape)
    error = first(W, 1 - found.spread(salient, width), sensitivity)
    best = (error + second(inner, salient, weights)).argmin(0)
    found = replace(found, salient=chosen[best][:, None])
    outer, sizes = 1 - found.salient_columns(width), W.abs()
    thresholds = _quantiles(sizes, outer, quantiles)
    errors = []
    for threshold in thresholds:
        large = at_least(sizes, threshold)
        outside = outer * large
        error = first(W, torch.stack([outside, outer - outside]), sensitivity).sum(0)
        if splits_salient:
            error = error + second(inner, found.split(found.among(large)), weights).sum(0)
        errors.append(error)
    best = torch.stack(errors).argmin(0)
    chosen_threshold = thresholds[best, torch.arange(len(best))]
    return replace(found, large=at_least(sizes, chosen_threshold))


def at_least(sizes: Tensor, threshold: Tensor) -> Tensor:
    """1 and 0: in numbers several times as fast as in bools."""
    return torch.ge(sizes, threshold, out=torch.empty_like(sizes))


def _quantiles(sizes: Tensor, mask: Tensor, quantiles: Sequence[float]) -> Tensor:
    """Of the masked elements, each ``(batch, 1, 1)``."""
    rows = max(_SAMPLE // sizes.shape[-1], 1)
    every = max(sizes.shape[-2] // rows, 1)
    some = torch.where(mask > 0, sizes, torch.nan)[:, ::every].flatten(1)
    at = torch.tensor(quantiles, dtype=sizes.dtype, device=sizes.device)
    return torch.nanquantile(some, at, dim=-1)[..., None, None]
