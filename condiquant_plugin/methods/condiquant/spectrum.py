"""Condition number, CondiQuant's proxies for it and their proximal operators (arXiv 2502.15478, section 3).

Every function takes a batch of matrices ``(..., rows, columns)``; ``n = min(rows, columns)`` is the number
of singular values ``sigma``.
"""

from __future__ import annotations

import torch
from torch import Tensor

# p(x) = ax + bx^3 + cx^5. The first polynomial lifts small singular values fast but stops in
# [0.68, 1.27]; the second is the quintic Newton-Schulz iteration, which converges to 1 from there.
_LIFT = (3.4445, -4.7750, 2.0315)
_CONVERGE = (15 / 8, -10 / 8, 3 / 8)
_MOST_ITERATIONS = 40


def condition_number(weight: Tensor) -> Tensor:
    """Largest over smallest singular value, shape ``(...)``, float64; ``inf`` for rank-deficient matrices.

    Rank-deficient means, as in ``torch.linalg.matrix_rank``: the smallest singular value is not above
    ``max(rows, columns) * eps`` of the largest.
    """
    sigma = torch.linalg.svdvals(weight.double())
    largest, smallest = sigma[..., 0], sigma[..., -1]
    resolution = max(weight.shape[-2:]) * torch.finfo(weight.dtype).eps
    ratio = largest / smallest.clamp_min(torch.finfo(torch.float64).tiny)
    return torch.where(smallest > largest * resolution, ratio, torch.inf)


def spread(weight: Tensor) -> Tensor:
    """The differentiable proxy ``G(W) = 1/2 sum (sigma_i - mean sigma)^2``, shape ``(...)``."""
    sigma = torch.linalg.svdvals(weight)
    return 0.5 * (sigma - sigma.mean(-1, keepdim=True)).square().sum(-1)


def log_condition(weight: Tensor) -> Tensor:
    """The alternative proxy ``log kappa(W)``, shape ``(...)``; ``inf`` for rank-deficient matrices."""
    return condition_number(weight).log()


def prox_spread_svd(weight: Tensor, tau: Tensor | float) -> Tensor:
    """``argmin_V 1/2 |V - W|^2 + tau G(V)``: ``sigma+ = mean + (sigma - mean) / (1 + tau)``.

    Args:
        tau: non-negative, a scalar or one per matrix, shape ``(..., 1, 1)``.
    """
    u, sigma, vh = torch.linalg.svd(weight, full_matrices=False)
    mean = sigma.mean(-1, keepdim=True)
    shrink = 1 + torch.as_tensor(tau, dtype=weight.dtype, device=weight.device)
    shrink = shrink.squeeze(-1) if shrink.ndim else shrink
    return (u * (mean + (sigma - mean) / shrink).unsqueeze(-2)) @ vh


def prox_spread(
    weight: Tensor, tau: Tensor | float, *, tolerance: float = 1e-5, lifts: int = 8
) -> tuple[Tensor, int]:
    """The same operator without an SVD: ``(W + tau mean(sigma) Q) / (1 + tau)``, ``Q`` the polar factor.

    Returns:
        The result, and the number of lifting steps to pass on for a similar matrix.
    """
    factor, lifts = polar_factor(weight, tolerance=tolerance, lifts=lifts)
    mean = (weight * factor).sum((-2, -1), keepdim=True) / min(weight.shape[-2:])
    return (weight + tau * mean * factor) / (1 + tau), lifts


def polar_factor(weight: Tensor, *, tolerance: float = 1e-5, lifts: int = 8) -> tuple[Tensor, int]:
    """``U V^T`` by matrix products alone: lifting steps, then quintic Newton-Schulz.

    Matrices that do not reach ``max |Q^T Q - I| <= tolerance`` (rank-deficient or extremely
    ill-conditioned ones) get an SVD instead.

    Args:
        weight: shape ``(..., rows, columns)``.
        lifts: lifting steps to start with; each multiplies small singular values by 3.4.

    Returns:
        The factor, and the number of lifting steps that would have served best.
    """
    shape = weight.shape
    tall = weight.reshape(-1, *shape[-2:])
    if wide := shape[-1] > shape[-2]:
        tall = tall.mT
    # |W^T W|_F bounds the largest squared singular value more tightly than |W|_F^2.
    bound = torch.linalg.matrix_norm(tall.mT @ tall).sqrt()
    x = tall / bound.clamp_min(torch.finfo(weight.dtype).tiny)[:, None, None]
    identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    settled = 0
    for iteration in range(_MOST_ITERATIONS):
        gram = x.mT @ x
        if iteration >= lifts:
            settled += 1
            residue = (gram - identity).abs().amax((1, 2))
            if bool((residue <= tolerance).all()):
                break
        a, b, c = _LIFT if iteration < lifts else _CONVERGE
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, polynomial, beta=a)
    else:
        stuck = (x.mT @ x - identity).abs().amax((1, 2)) > tolerance
        u, _, vh = torch.linalg.svd(tall[stuck], full_matrices=False)
        x = x.index_put((stuck,), u @ vh)
    if settled > 4:
        lifts = min(lifts + 1, _MOST_ITERATIONS // 2)
    elif settled < 4:
        lifts = max(lifts - 1, 0)
    return (x.mT if wide else x).reshape(shape), lifts


def prox_log_condition(weight: Tensor, tau: Tensor | float) -> Tensor:
    """Proximal operator of ``tau log kappa``: shrinks the largest singular values, lifts the smallest.

    A singular value moves by ``(sigma -/+ sqrt(sigma^2 -/+ 4 tau)) / 2``; values that would overtake
    their neighbours move together with them (their mean, ``tau`` shared among them).

    Args:
        tau: non-negative, a scalar or one per matrix, shape ``(..., 1, 1)``.
    """
    tau = tau.squeeze(-1) if isinstance(tau, Tensor) and tau.ndim else tau
    u, sigma, vh = torch.linalg.svd(weight, full_matrices=False)
    top, top_size = _pooled_extreme(sigma, -tau, shrinks=True)
    bottom, bottom_size = _pooled_extreme(sigma.flip(-1), tau, shrinks=False)
    rank = torch.arange(sigma.shape[-1], device=sigma.device)
    result = torch.where(rank < top_size, top, sigma)
    result = torch.where(rank >= sigma.shape[-1] - bottom_size, bottom, result)
    mean = sigma.mean(-1, keepdim=True)
    result = torch.where(top <= bottom, mean, result)
    return (u * result.unsqueeze(-2)) @ vh


def _pooled_extreme(
    sigma: Tensor, signed_tau: Tensor | float, *, shrinks: bool
) -> tuple[Tensor, Tensor]:
    """Value and size of the group that the first of sorted ``sigma`` moves with, ``(..., 1)`` each."""
    count = torch.arange(1, sigma.shape[-1] + 1, dtype=sigma.dtype, device=sigma.device)
    mean = sigma.cumsum(-1) / count
    discriminant = mean.square() + 4 * signed_tau / count
    value = 0.5 * (mean + discriminant.clamp_min(0).sqrt())
    neighbour = torch.cat([sigma[..., 1:], value[..., -1:]], -1)
    ordered = value >= neighbour if shrinks else value <= neighbour
    fits = ordered & (discriminant >= 0)
    fits[..., -1] = True
    size = fits.to(torch.uint8).argmax(-1, keepdim=True)
    return value.gather(-1, size), size + 1
