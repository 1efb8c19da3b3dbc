"""What the methods of a comparison start from, and what they make of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import nncf
import openvino as ov
from torch import nn

from condiquant_plugin.layerwise.precision import LayerBits
from condiquant_plugin.layerwise.problem import LayerReport
from condiquant_recipes.precision.search import Precision, as_large_as
from condiquant_recipes.progress import Progress
from condiquant_recipes.recipe import Recipe
from condiquant_recipes.source import Source

MIXED = (3, 4)
"""Bits of weights whose bytes the rows with bits of their own for every layer keep to."""
Group = Literal[
    "float",
    "nncf-int8",
    "nncf-weights",
    "nncf-low-bit",
    "neural-compressor",
    "2dquant",
    "condiquant",
    "trained",
]


@dataclass(frozen=True)
class Job:
    """What every method starts from."""

    recipe: Recipe
    source: Source
    float_ir: ov.Model
    progress: Progress

    def dataset(self) -> nncf.Dataset:
        """The calibration crops, one by one."""
        return nncf.Dataset([crop[None].numpy() for crop in self.source.crops])

    @cached_property
    def mixed(self) -> dict[int, Precision]:
        """The most faithful bits for the bytes that weights of ``MIXED`` bits take, searched once."""
        return as_large_as(self.recipe, self.source, MIXED, self.progress)

    @property
    def model_type(self) -> nncf.ModelType | None:
        """What NNCF should be told about the network."""
        transformer = self.recipe.condiquant.scope == "transformer"
        return nncf.ModelType.TRANSFORMER if transformer else None


@dataclass(frozen=True)
class Calibrated:
    """What a method made of the float network."""

    model: ov.Model | nn.Module
    recipe: Recipe | None = None
    """How to export an ``nn.Module``."""
    layers: list[LayerReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    weight_bits: int | None = None
    """Where they are not those of the method."""
    precision: Precision | None = None
    """Of the search that gave every layer its bits."""


@dataclass(frozen=True)
class Contender:
    """A row of the comparison."""

    id: str
    label: str
    group: Group
    bits: LayerBits
    calibrate: Callable[[Job], Calibrated]
