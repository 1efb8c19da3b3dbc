"""What a layer-wise method is given and gives back; knows no method.

A method sees a layer as its weight and the moments of its inputs, and answers with a weight in a form of
its own: dense, low-rank, binary, sparse. Hosts write back what the form is worth as a dense tensor, or
the form itself where they can hold it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol, Self

import torch
from torch import Tensor

from condiquant_plugin.errors import InputError
from condiquant_plugin.layerwise.moments import LayerGeometry, Moments, weight_matrix
from condiquant_plugin.uniform.grid import SnappedGrid


@dataclass(frozen=True)
class LayerProblem:
    """One layer as a method sees it."""

    name: str
    weight: Tensor
    bias: Tensor | None
    moments: Moments
    geometry: LayerGeometry = LayerGeometry()
    row_blocks: int = 1
    """Blocks of rows that are matrices of their own: 3 for a fused qkv."""
    grid: SnappedGrid | None = None
    """Levels that the weight will be rounded to, of a shape that broadcasts against it."""


class WeightForm(ABC):
    """How a method represents a weight; a frozen dataclass, whose tensors are among its fields."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The weight, in the shape and dtype of the one it stands for."""

    def tensors(self) -> dict[str, Tensor]:
        """Fields that are tensors, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def with_tensors(self, tensors: dict[str, Tensor]) -> Self:
        """The same form of other tensors."""
        return replace(self, **tensors)  # type: ignore[type-var]


@dataclass(frozen=True)
class Dense(WeightForm):
    """A plain tensor."""

    values: Tensor

    def dense(self) -> Tensor:
        """The tensor."""
        return self.values


@dataclass(frozen=True)
class LayerReport:
    """What became of a layer; a method adds what it measures as fields."""

    name: str


@dataclass(frozen=True)
class Solution:
    """A layer's new weight."""

    form: WeightForm
    bias: Tensor | None
    report: LayerReport

    @property
    def weight(self) -> Tensor:
        """Dense."""
        return self.form.dense()


class Method(Protocol):
    """Settings of a method that solves layers independently of one another."""

    @property
    def needs_quantized_inputs(self) -> bool:
        """Whether the moments must hold those of inputs behind their quantizers."""

    @property
    def moments_dtype(self) -> torch.dtype:
        """In what the moments are summed; a Gram matrix of float32 takes half the room of float64."""

    @property
    def is_batch_dependent(self) -> bool:
        """Whether a layer's solution depends on which others of its shape are solved with it."""

    def cost(self, problem: LayerProblem) -> int:
        """Of a solution, in any unit; sharding goes by it."""

    def solve(self, problems: Sequence[LayerProblem]) -> list[Solution]:
        """One solution per problem, in order.

        Raises:
            InputError: a weight with NaN or Inf; moments that lack what the method needs.
        """


class OnGramMatrices:
    """What methods that invert or decompose Gram matrices have in common; see :class:`Method`."""

    @property
    def moments_dtype(self) -> torch.dtype:
        """Float32 does not hold what inverses and small eigenvalues need."""
        return torch.float64

    @property
    def is_batch_dependent(self) -> bool:
        """Each matrix is solved as if alone, up to the last bits."""
        return True


def block_shape(problem: LayerProblem) -> tuple[int, int]:
    """Rows and features of the matrices that a layer consists of."""
    _, rows, features = weight_matrix(problem.weight, problem.geometry).shape
    return rows // problem.row_blocks, features


def check_weight(name: str, weight: Tensor) -> None:
    """Raise :class:`InputError` for NaN or Inf."""
    if not torch.isfinite(weight).all():
        raise InputError(f"NaN or Inf in the weight of {name}: check the checkpoint")


def fused_blocks(name: str, rows: int) -> int:
    """Row blocks of a layer by its name: 3 for a fused query-key-value projection, whatever its kind."""
    return 3 if name.rpartition(".")[2] == "qkv" and rows % 3 == 0 else 1
