"""Errors of a block of columns, made up for by the columns after it.

``H = G + damping mean(diag G) I``, ``H^-1 = U^T U`` with ``U`` upper triangular (GPTQ, arXiv 2210.17323).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor

Compensation = Literal["exact", "billm", "none"]
"""How the error of a block reaches later columns: see :func:`change_of_later`."""
_SMALL = 128
"""Features of a matrix that is inverted at once."""


class Fitted(Protocol):
    """What a block of columns became."""

    def dense(self) -> Tensor:
        """``(batch, rows, columns)``."""


FittedT = TypeVar("FittedT", bound=Fitted)


@dataclass(frozen=True)
class Block:
    """Columns to compress, with what later ones will make up for taken into account."""

    weight: Tensor
    """``(batch, rows, columns)``"""
    gram: Tensor
    """``(batch, columns, columns)``, damped."""
    sensitivity: Tensor
    """``1 / [U]_jj^2``, ``(batch, 1, columns)``: of column j's error when later ones make up for it."""


def damped(gram: Tensor, damping: float) -> Tensor:
    """``H``, positive definite: ``gram`` where it is zero becomes the identity."""
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    added = torch.where(mean > 0, damping * mean, torch.ones_like(mean))
    result = gram.clone(memory_format=torch.contiguous_format)
    result.diagonal(dim1=-2, dim2=-1).add_(added[:, None])
    return result


def compensation_factor(hessian: Tensor) -> Tensor:
    """``U``, upper triangular, of ``H^-1 = U^T U``; shapes ``(batch, features, features)``.

    The Cholesky decomposition from the last row up gives ``H = R R^T`` with ``R`` upper triangular, so
    ``U = R^-1``.
    """
    return _inverse_of_upper(torch.linalg.cholesky(hessian.flip(-1, -2)).flip(-1, -2))


def _inverse_of_upper(R: Tensor) -> Tensor:
    """By halves, in two thirds of the operations of solving for the identity."""
    size = R.shape[-1]
    if size <= _SMALL:
        identity = torch.eye(size, dtype=R.dtype, device=R.device).expand_as(R)
        return torch.linalg.solve_triangular(R, identity, upper=True)
    half = size // 2
    first, last = _inverse_of_upper(R[..., :half, :half]), _inverse_of_upper(R[..., half:, half:])
    result = torch.zeros_like(R)
    result[..., :half, :half], result[..., half:, half:] = first, last
    result[..., :half, half:] = -(first @ R[..., :half, half:] @ last)
    return result


def change_of_later(
    error: Tensor, factor: Tensor, start: int, end: int, kind: Compensation
) -> Tensor:
    """What is added to the columns from ``end`` on for the error ``W - Q`` of those before it.

    ``"exact"``: ``-E U_bb^-1 U_b,rest``, the minimum of ``tr(D H D^T)`` over all later columns.
    ``"billm"``: ``-E diag(U_bb)^-1 U_b,rest``, as the code of BiLLM has it, right for one column only.

    Args:
        error: ``(batch, rows, end - start)``.
        factor: :func:`compensation_factor`.
    """
    inside, after = factor[:, start:end, start:end], factor[:, start:end, end:]
    if kind == "none":
        return torch.zeros_like(error[..., :1]).expand(-1, -1, after.shape[-1])
    if kind == "exact":
        scaled = torch.linalg.solve_triangular(inside, error, upper=True, left=False)
    else:
        scaled = error / inside.diagonal(dim1=-2, dim2=-1)[:, None]
    return -scaled @ after


def compress_by_blocks(
    weight: Tensor,
    gram: Tensor,
    columns: int,
    fit: Callable[[Block], FittedT],
    *,
    compensation: Compensation,
    damping: float,
) -> list[FittedT]:
    """What each block of columns became, from left to right.

    Args:
        weight: ``(batch, rows, features)``, float64.
        gram: ``(batch, features, features)``, float64; decomposed once where it is one that was expanded.
        columns: in a block; divides the features.
        fit: compresses a block; computed in float32.
        damping: of the Gram matrix, in units of its mean diagonal.
    """
    hessian = damped(gram[:1] if gram.stride(0) == 0 else gram, damping)
    factor = compensation_factor(hessian).float().expand(gram.shape)
    hessian = hessian.float().expand(gram.shape)
    rest = weight.float().clone()
    fitted = []
    for start in range(0, weight.shape[-1], columns):
        end = start + columns
        pivots = factor[:, start:end, start:end].diagonal(dim1=-2, dim2=-1)
        block = Block(
            rest[..., start:end].contiguous(),
            hessian[:, start:end, start:end],
            pivots[:, None].square().reciprocal(),
        )
        fitted.append(fit(block))
        if end < weight.shape[-1] and compensation != "none":
            error = block.weight - fitted[-1].dense()
            rest[..., end:] += change_of_later(error, factor, start, end, compensation)
    return fitted
