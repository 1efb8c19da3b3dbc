"""The low-rank weight that keeps a layer's output best: AdaSVD's alternation and where it goes.

The loss of ``Q = U V^T`` is ``tr((Q - W) G (Q - W)^T)``, ``W`` of shape ``(rows, features)`` and ``G`` the
mean of ``x x^T``. All functions take batches of matrices, float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_CUTOFF = 1e-12
"""Of singular values, relative to the largest, in pseudo-inverses."""


def plain_start(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """AdaSVD's start, ``(U, V^T)``: the SVD of ``W`` cut at ``rank``, ``sqrt(S)`` on each side."""
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    root = values[..., :rank].sqrt()
    return left[..., :rank] * root[..., None, :], root[..., None] * right[..., :rank, :]


def left_step(weight: Tensor, gram: Tensor, right: Tensor) -> Tensor:
    """adaComp's first step: ``U = W G V (V^T G V)^+``, the minimum of the loss over ``U``."""
    seen = gram @ right.mT
    inverse = torch.linalg.pinv(right @ seen, rtol=_CUTOFF, hermitian=True)
    return (weight @ seen) @ inverse


def right_step(weight: Tensor, left: Tensor) -> Tensor:
    """adaComp's second step: ``V^T = U^+ W``, the minimum of the loss over ``V``, whatever ``G``."""
    return torch.linalg.pinv(left, rtol=_CUTOFF) @ weight


def alternation(weight: Tensor, gram: Tensor, rank: int, rounds: int) -> tuple[Tensor, Tensor]:
    """adaComp (AdaSVD, arXiv 2502.01403): both steps in turns, ``(U, V^T)``.

    It is subspace iteration on ``W G W^T`` and goes to :class:`ClosedForm`.
    """
    left, right = plain_start(weight, rank)
    for _ in range(rounds):
        left = left_step(weight, gram, right)
        right = right_step(weight, left)
    return left, right


@dataclass(frozen=True)
class ClosedForm:
    """The minimum of the loss for every rank, from one eigendecomposition.

    With ``P`` the leading eigenvectors of ``W G W^T``: ``U = P``, ``V^T = P^T W``. Where there are more
    rows than features, its smaller twin: ``G = S S^T``, ``P`` those of ``S^T W^T W S``, ``U = W S P`` and
    ``V^T = P^T S^-1``.
    """

    weight: Tensor
    basis: Tensor
    """Eigenvectors, largest eigenvalue first, ``(batch, size, size)``."""
    energies: Tensor
    """Eigenvalues, ``(batch, size)``: of the output's energy, what each rank keeps."""
    root: tuple[Tensor, Tensor] | None
    """``S`` and its pseudo-inverse, where the twin was taken."""

    @classmethod
    def of(cls, weight: Tensor, gram: Tensor) -> ClosedForm:
        """Decompose; ``gram`` positive semidefinite."""
        rows, features = weight.shape[-2:]
        if rows <= features:
            values, vectors = torch.linalg.eigh(weight @ gram @ weight.mT)
            return cls(weight, vectors.flip(-1), values.flip(-1), None)
        values, vectors = torch.linalg.eigh(gram)
        scales = values.clamp_min(0).sqrt()[..., None, :]
        some = scales > _CUTOFF * scales.amax(-1, keepdim=True)
        root = vectors * scales
        inverse = (vectors * torch.where(some, 1 / scales, 0 * scales)).mT
        values, vectors = torch.linalg.eigh((weight @ root).mT @ (weight @ root))
        return cls(weight, vectors.flip(-1), values.flip(-1), (root, inverse))

    def cut(self, rank: int) -> tuple[Tensor, Tensor]:
        """``(U, V^T)`` of a rank."""
        basis = self.basis[..., :rank]
        if self.root is None:
            return basis, basis.mT @ self.weight
        root, inverse = self.root
        return self.weight @ root @ basis, basis.mT @ inverse


def balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same product, columns of ``U`` and rows of ``V^T`` of one norm: both fit in float16."""
    norms = (left.norm(dim=-2), right.norm(dim=-1))
    shift = torch.where(norms[0] > 0, (norms[1] / norms[0]).sqrt(), torch.ones_like(norms[0]))
    shift = torch.where(shift > 0, shift, torch.ones_like(shift))
    return left * shift[..., None, :], right / shift[..., None]
