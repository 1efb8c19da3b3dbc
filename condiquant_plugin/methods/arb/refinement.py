"""Signs and scales of a block of weights: BiLLM's plain form and ARB-LLM's refinements of it.

``W`` has shape ``(batch, rows, columns)``; ``M``, of a shape that broadcasts against it or several of
those, is 1 for the elements of a group and 0 elsewhere, ``n_i = sum_j M_ij``. Scales and offsets are of
each row and group.
Names of functions are those of ARB-LLM (arXiv 2410.03129); sign(0) is 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from condiquant_plugin.methods.compression.form import FRACTION

_TINY = 1e-20


@dataclass(frozen=True)
class Plane:
    """``rows * columns * signs``."""

    signs: Tensor
    """-1 and 1."""
    rows: Tensor
    """``(batch, rows, 1)``"""
    columns: Tensor | None = None
    """``(batch, 1, columns)``; None is 1."""

    def dense(self) -> Tensor:
        """The product."""
        scaled = self.signs * self.rows
        return scaled if self.columns is None else scaled * self.columns


@dataclass(frozen=True)
class Group:
    """The elements of a mask: one plane or two, and an offset, ``(batch, rows, 1)``, or none."""

    mask: Tensor
    planes: tuple[Plane, ...]
    offset: Tensor | None

    def dense(self) -> Tensor:
        """Zero outside the mask."""
        total = sum((plane.dense() for plane in self.planes[1:]), self.planes[0].dense())
        return self.mask * (total if self.offset is None else total + self.offset)

    def unbind(self) -> list[Group]:
        """A group each, of several masks."""

        def of(index: int, plane: Plane) -> Plane:
            columns = None if plane.columns is None else plane.columns[index]
            signs = plane.signs  # of W alone, they are those of all masks
            signs = signs[index] if signs.ndim == self.mask.ndim else signs
            return Plane(signs, plane.rows[index], columns)

        return [
            Group(
                mask,
                tuple(of(index, plane) for plane in self.planes),
                None if self.offset is None else self.offset[index],
            )
            for index, mask in enumerate(self.mask)
        ]

    def stored(self) -> Group:
        """Scales and offsets as they are kept."""
        planes = tuple(
            replace(p, rows=_kept(p.rows), columns=None if p.columns is None else _kept(p.columns))
            for p in self.planes
        )
        return replace(
            self, planes=planes, offset=None if self.offset is None else _kept(self.offset)
        )


def _kept(x: Tensor) -> Tensor:
    return x.to(FRACTION).to(x.dtype)


def signs_of(x: Tensor) -> Tensor:
    """-1 and 1; 1 for 0."""
    return torch.ge(x, 0, out=torch.empty_like(x)).mul_(2).sub_(1)


def _row_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Of the masked elements; 0 where there are none."""
    counts = mask.expand(*mask.shape[:-1], x.shape[-1]).sum(-1, keepdim=True)
    return (mask * x).sum(-1, keepdim=True) / counts.clamp_min(1)


def rounded(W: Tensor, M: Tensor) -> Group:
    """Signs and one scale, ``alpha = mean |W|``, no offset."""
    return Group(M, (Plane(signs_of(W), _row_mean(W.abs(), M)),), None)


def binarized(W: Tensor, M: Tensor) -> Group:
    """BiLLM's: ``mu = mean W``, ``B = sign(W - mu)``, ``alpha = mean |W - mu|``."""
    mu = _row_mean(W, M)
    return Group(M, (Plane(signs_of(W - mu), _row_mean((W - mu).abs(), M)),), mu)


def residual_binarized(W: Tensor, M: Tensor) -> Group:
    """BiLLM's for salient columns: :func:`binarized`, twice."""
    first = binarized(W, M)
    assert first.offset is not None
    second = binarized(W - first.offset - first.planes[0].dense(), M)
    assert second.offset is not None
    return Group(M, first.planes + second.planes, first.offset + second.offset)


def arb(W: Tensor, M: Tensor, rounds: int) -> Group:
    """Alternating refined binarization, first order: ``Q = alpha B + mu``, from :func:`binarized`.

    A round: ``mu = sum M (W - alpha B) / n``, ``alpha = sum M B (W - mu) / n``, ``B = sign(W - mu)``: each
    the minimum of ``|M (W - Q)|^2`` over it.
    """
    group = binarized(W, M)
    for _ in range(rounds):
        group = arb_round(W, group)
    return group


def arb_round(W: Tensor, group: Group) -> Group:
    """One round of :func:`arb`."""
    (plane,), M = group.planes, group.mask
    mu = _row_mean(W - plane.rows * plane.signs, M)
    alpha = _row_mean(plane.signs * (W - mu), M).abs()
    return Group(M, (Plane(signs_of(W - mu), alpha),), mu)


def arb_second_order(W: Tensor, M: Tensor, rounds: int) -> Group:
    """``Q = alpha_1 B_1 + alpha_2 B_2 + mu``, from :func:`residual_binarized`.

    A round: ``mu``, ``alpha_1``, ``alpha_2`` as in :func:`arb`, each with the others fixed; then ``B_1``
    and ``B_2`` for the nearest of the four values.
    """
    group = residual_binarized(W, M)
    for _ in range(rounds):
        group = arb_second_order_round(W, group)
    return group


def arb_second_order_round(W: Tensor, group: Group) -> Group:
    """One round of :func:`arb_second_order`."""
    (first, second), M = group.planes, group.mask
    mu = _row_mean(W - first.dense() - second.dense(), M)
    alpha_1 = _row_mean(first.signs * (W - mu - second.dense()), M)
    alpha_2 = _row_mean(second.signs * (W - mu - alpha_1 * first.signs), M)
    # With alpha_1 >= alpha_2 >= 0 the nearest is found sign by sign.
    sizes = torch.cat([alpha_1, alpha_2], -1).abs()
    alpha_1, alpha_2 = sizes.amax(-1, keepdim=True), sizes.amin(-1, keepdim=True)
    B_1 = signs_of(W - mu)
    B_2 = signs_of(W - mu - alpha_1 * B_1)
    return Group(M, (Plane(B_1, alpha_1), Plane(B_2, alpha_2)), mu)


def arb_rc(W: Tensor, M: Tensor, rounds: int) -> Group:
    """``Q_ij = alpha_i^r alpha_j^c B_ij``, no offset, ``B = sign W``.

    Start: ``alpha^r`` the row means of ``|W|``, ``alpha^c`` the column means of ``|W| / alpha^r``. A
    round: ``alpha^r = sum_j M alpha^c |W| / sum_j M (alpha^c)^2``, ``alpha^c`` likewise: the power
    iteration for the rank-one approximation of ``|W|`` on the mask.
    """
    M = M.expand(*M.shape[:-2], *W.shape[-2:])
    rows, columns = row_column_scales(W.abs() * M, M, rounds)
    return Group(M, (normalized(Plane(signs_of(W), rows, columns)),), None)


def row_column_scales(sizes: Tensor, M: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """``alpha^r`` and ``alpha^c`` of :func:`arb_rc`; ``sizes`` is ``M |W|``."""
    rows = sizes.sum(-1, keepdim=True) / M.sum(-1, keepdim=True).clamp_min(1)
    columns = rows.clamp_min(_TINY).reciprocal().mT @ sizes
    columns = columns / _by_column(torch.ones_like(rows), M).clamp_min(1)
    for _ in range(rounds):
        rows, columns = arb_rc_round(sizes, M, columns)
    return rows, columns


def arb_rc_error(W: Tensor, M: Tensor, weights: Tensor, rounds: int, planes: int) -> Tensor:
    """``sum_ij M w_j (W - Q)_ij^2`` of :func:`arb_rc` or, of two planes, its second order.

    Products with vectors in the place of ``Q``: of signs that agree only ``|W|`` counts.

    Args:
        M: ``(..., batch, rows or 1, columns)``.
        weights: ``w``, ``(batch, 1, columns)``.
    """
    if M.shape[-2] == 1 and planes == 1:
        return _error_of_columns(W.abs(), M, weights, rounds)
    sizes = W.abs() * M
    for plane in range(planes):
        rows, columns = row_column_scales(sizes, M, rounds)
        if plane < planes - 1:
            sizes = (sizes - rows * columns * M).abs()
    by_column = sizes.square().sum(-2, keepdim=True) - 2 * columns * (rows.mT @ sizes)
    by_column = by_column + columns.square() * _by_column(rows.square(), M)
    return (by_column * weights).sum((-2, -1))


def _error_of_columns(sizes: Tensor, M: Tensor, weights: Tensor, rounds: int) -> Tensor:
    """:func:`arb_rc_error` of masks of whole columns, all of them in one product.

    Args:
        sizes: ``|W|``.
        M: ``(count, batch, 1, columns)``.
    """
    masks = M.squeeze(-2).transpose(0, 1)  # (batch, count, columns)
    rows = (masks @ sizes.mT) / masks.sum(-1, keepdim=True).clamp_min(1)
    columns = masks * (rows.clamp_min(_TINY).reciprocal() @ sizes) / sizes.shape[-2]
    for _ in range(rounds):
        squares = columns.square().sum(-1, keepdim=True).clamp_min(_TINY)
        rows = (columns @ sizes.mT) / squares
        squares = rows.square().sum(-1, keepdim=True)
        columns = masks * (rows @ sizes) / squares.clamp_min(_TINY)
    products = masks * (rows @ sizes)
    by_column = masks * sizes.square().sum(-2, keepdim=True) - 2 * columns * products
    by_column = by_column + columns.square() * rows.square().sum(-1, keepdim=True)
    return (by_column * weights).sum(-1).mT


def arb_rc_round(sizes: Tensor, M: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """``alpha^r`` and ``alpha^c`` after one round; ``sizes`` is ``M |W|``."""
    # A row times a transposed matrix is faster than the matrix times a column.
    rows = (columns @ sizes.mT) / (columns.square() @ M.mT).clamp_min(_TINY)
    columns = (rows @ sizes) / _by_column(rows.mT.square(), M).clamp_min(_TINY)
    return rows.mT, columns


def _by_column(rows: Tensor, M: Tensor) -> Tensor:
    """``sum_i M_ij r_i``, ``(..., 1, columns)``, of ``(..., rows, 1)``; ``M`` of one row stands for all."""
    return rows.mT @ M if M.shape[-2] > 1 else rows.sum(-2, keepdim=True) * M


def arb_rc_second_order(W: Tensor, M: Tensor, rounds: int) -> Group:
    """:func:`arb_rc` of ``W`` and of what it leaves."""
    first = arb_rc(W, M, rounds)
    second = arb_rc(W - first.dense(), M, rounds)
    return Group(M, first.planes + second.planes, None)


def normalized(plane: Plane) -> Plane:
    """Column scales of mean 1 (where there are any), so that float16 holds them."""
    assert plane.columns is not None
    some = (plane.columns > 0).sum(-1, keepdim=True).clamp_min(1)
    mean = plane.columns.sum(-1, keepdim=True) / some
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    return replace(plane, rows=plane.rows * mean, columns=plane.columns / mean)


def arb_x(W: Tensor, G: Tensor, groups: Sequence[Group], rounds: int) -> list[Group]:
    """ARB-X: offsets and scales by the loss ``tr((W - Q) G (W - Q)^T)``, the signs as they are.

    Every term ``t``, ``M`` for an offset and ``M B`` for a scale, gets ``c += t G (W - Q)^T / (t G t^T)``
    in turn: coordinate descent on a quadratic, row by row.

    Args:
        G: ``(batch, columns, columns)``, positive definite.
        groups: without column scales.
    """
    terms, coefficients = terms_of(groups, W)
    coefficients = coordinate_descent(terms, coefficients, W, G, rounds)
    return with_coefficients(groups, coefficients)


def terms_of(groups: Sequence[Group], W: Tensor) -> tuple[Tensor, Tensor]:
    """Terms ``(count, batch, rows, columns)`` and coefficients ``(count, batch, rows, 1)`` of a sum."""
    terms, coefficients = [], []
    for group in groups:
        mask = group.mask.expand_as(W)
        if group.offset is not None:
            terms.append(mask)
            coefficients.append(group.offset)
        for plane in group.planes:
            terms.append(mask * plane.signs)
            coefficients.append(plane.rows)
    return torch.stack(terms), torch.stack(coefficients)


def with_coefficients(groups: Sequence[Group], coefficients: Tensor) -> list[Group]:
    """The groups of :func:`terms_of` with other coefficients."""
    rest = iter(coefficients)
    result = []
    for group in groups:
        offset = None if group.offset is None else next(rest)
        planes = tuple(replace(plane, rows=next(rest)) for plane in group.planes)
        result.append(replace(group, planes=planes, offset=offset))
    return result


def coordinate_descent(
    terms: Tensor, coefficients: Tensor, W: Tensor, G: Tensor, rounds: int
) -> Tensor:
    """ARB-X's update of every coefficient in turn; no step raises the loss."""
    seen = terms @ G
    by_row = terms.permute(1, 2, 3, 0)
    normal = seen.permute(1, 2, 0, 3) @ by_row  # (batch, rows, count, count)
    target = (seen * W).sum(-1).permute(1, 2, 0)
    found = coefficients.squeeze(-1).permute(1, 2, 0).clone()
    diagonal = normal.diagonal(dim1=-2, dim2=-1)
    # A term without elements, or one that G does not see, stays.
    inverse = torch.where(diagonal > _TINY, 1 / diagonal.clamp_min(_TINY), 0.0)
    for _ in range(rounds):
        for k in range(found.shape[-1]):
            gradient = target[..., k] - (normal[..., k, :] * found).sum(-1)
            found[..., k] += gradient * inverse[..., k]
    return found.permute(2, 0, 1)[..., None]
