"""Weights that know their dense form and the bits that they take."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from condiquant_plugin.layerwise.moments import LayerGeometry, weight_from_matrix
from condiquant_plugin.layerwise.problem import LayerProblem, WeightForm

FRACTION = torch.float16
"""What scales, offsets and factors are kept in."""
FRACTION_BITS = 16

_BITS_OF_BYTES = torch.arange(256)[:, None] >> torch.arange(8) & 1
_GATHER = 0x0102040810204080
"""Times eight bytes of 0 or 1, the highest byte has their bits, the first lowest."""


def pack_bits(flags: Tensor) -> Tensor:
    """0 and 1 of any dtype, ``(..., n)``, as bytes ``(..., ceil(n / 8))``, the first in the lowest bit."""
    eights = F.pad(flags.to(torch.uint8), (0, -flags.shape[-1] % 8)).contiguous().view(torch.int64)
    return (eights * _GATHER >> 56).to(torch.uint8)


def unpack_bits(packed: Tensor, count: int, dtype: torch.dtype = torch.bool) -> Tensor:
    """Inverse of :func:`pack_bits`; ``count`` is ``n``."""
    table = _BITS_OF_BYTES.to(packed.device, dtype)  # several times as fast as shifts
    bits = table.index_select(0, packed.flatten().int())
    return bits.view(*packed.shape[:-1], -1)[..., :count]


@dataclass(frozen=True)
class Layout:
    """How the matrices of a layer make up its weight."""

    shape: torch.Size
    dtype: torch.dtype
    geometry: LayerGeometry

    @classmethod
    def of(cls, problem: LayerProblem) -> Layout:
        """That of a layer's weight."""
        return cls(problem.weight.shape, problem.weight.dtype, problem.geometry)

    def restored(self, matrices: Tensor) -> Tensor:
        """The weight of ``(groups, rows, features)``."""
        like = torch.empty(self.shape, dtype=self.dtype, device="meta")
        if matrices.device.type != "meta":
            like = torch.empty(self.shape, dtype=self.dtype, device=matrices.device)
        return weight_from_matrix(matrices, like, self.geometry)


class CompressedWeight(WeightForm):
    """A weight of few bits; nothing that is needed to compute it is left out of the count."""

    layout: Layout

    @abstractmethod
    def matrices(self) -> Tensor:
        """Dense, ``(groups, rows, features)``, float32."""

    @abstractmethod
    def stored_bits(self) -> dict[str, float]:
        """Bits of each part on disk."""

    def dense(self) -> Tensor:
        """The weight."""
        return self.layout.restored(self.matrices())

    @property
    def parameters(self) -> int:
        """Entries of the dense weight."""
        return self.layout.shape.numel()

    @property
    def bits_per_weight(self) -> float:
        """All that is stored, per entry of the dense weight."""
        return sum(self.stored_bits().values()) / self.parameters


@dataclass(frozen=True)
class Plain(CompressedWeight):
    """A weight that stays as it is."""

    values: Tensor
    layout: Layout

    def matrices(self) -> Tensor:
        """See :class:`CompressedWeight`."""
        return self.values.float()

    def stored_bits(self) -> dict[str, float]:
        """Of float16, as factors are counted."""
        return {"weights": FRACTION_BITS * self.parameters}


@dataclass(frozen=True)
class LowRank(CompressedWeight):
    """``U V^T``: shapes ``(groups, rows, rank)`` and ``(groups, rank, features)``."""

    left: Tensor
    right: Tensor
    layout: Layout

    @property
    def rank(self) -> int:
        """Columns of ``U``."""
        return self.left.shape[-1]

    def matrices(self) -> Tensor:
        """See :class:`CompressedWeight`."""
        return self.left.float() @ self.right.float()

    def stored_bits(self) -> dict[str, float]:
        """See :class:`CompressedWeight`."""
        return {"factors": FRACTION_BITS * (self.left.numel() + self.right.numel())}


@dataclass(frozen=True)
class Sum(CompressedWeight):
    """A form, and a low-rank one of what it leaves."""

    base: CompressedWeight
    residual: LowRank

    @property
    def layout(self) -> Layout:  # type: ignore[override]
        """That of both."""
        return self.base.layout

    def matrices(self) -> Tensor:
        """See :class:`CompressedWeight`."""
        return self.base.matrices() + self.residual.matrices()

    def stored_bits(self) -> dict[str, float]:
        """See :class:`CompressedWeight`."""
        return {**self.base.stored_bits(), **self.residual.stored_bits()}

    def tensors(self) -> dict[str, Tensor]:
        """Those of both, ``"residual."`` in front of the second's."""
        residual = {f"residual.{name}": t for name, t in self.residual.tensors().items()}
        return {**self.base.tensors(), **residual}

    def with_tensors(self, tensors: dict[str, Tensor]) -> Self:
        """See :class:`condiquant_plugin.layerwise.problem.WeightForm`."""
        second = {n.removeprefix("residual."): t for n, t in tensors.items() if "." in n}
        first = {n: t for n, t in tensors.items() if "." not in n}
        return type(self)(self.base.with_tensors(first), self.residual.with_tensors(second))
