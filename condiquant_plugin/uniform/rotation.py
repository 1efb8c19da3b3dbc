"""Orthogonal matrices that spread what a few channels carry over all of them.

``x W^T = (x R)(W R)^T``: the product stays, and ``x R`` has no wide channels that would take the levels of
all others (QuIP#, arXiv 2402.04396, section 3; QuaRot, arXiv 2404.00456).
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor


@cache
def orthogonal(features: int) -> Tensor:
    """A dense orthogonal matrix, shape ``(features, features)``, float32; the same at every call.

    A Hadamard matrix where Sylvester's and Paley's constructions give one, so that all entries are of one
    magnitude; else the cosine transform behind random signs.
    """
    matrix = _hadamard(features)
    if matrix is None:
        matrix = _cosines(features) * _signs(features)[:, None]
    return (matrix / matrix.norm(dim=0)).float()


def _hadamard(order: int) -> Tensor | None:
    """Of entries 1 and -1, float64; ``None`` for an order that the two constructions do not reach."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if order % 4 == 0 and _is_prime(order - 1):
        return _paley(order)
    half = _hadamard(order // 2) if order % 2 == 0 else None
    if half is None:
        return None
    return torch.cat([torch.cat([half, half], 1), torch.cat([half, -half], 1)])


def _paley(order: int) -> Tensor:
    """Paley's first construction: ``order - 1`` is a prime of the form 4k + 3."""
    prime = order - 1
    places = torch.arange(prime)
    legendre = torch.full((prime,), -1.0, dtype=torch.float64)
    legendre[places**2 % prime] = 1
    legendre[0] = 0
    matrix = torch.ones(order, order, dtype=torch.float64)
    matrix[1:, 0] = -1
    matrix[1:, 1:] = legendre[(places[:, None] - places) % prime] + torch.eye(prime)
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % i for i in range(2, math.isqrt(number) + 1))


def _cosines(order: int) -> Tensor:
    places = torch.arange(order, dtype=torch.float64)
    return torch.cos(torch.pi / order * (places[:, None] + 0.5) * places)


def _signs(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(2, (count,), generator=generator).double() * 2 - 1
