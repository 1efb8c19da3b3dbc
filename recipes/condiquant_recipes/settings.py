"""From a recipe's sections to the settings of the method and its hosts."""

from __future__ import annotations

import nncf

from condiquant_nncf import QuantizationConfig
from condiquant_plugin.distillation import DistillationConfig
from condiquant_plugin.reconditioning import (
    DEFAULT_DAMPING,
    DEFAULT_STRENGTH,
    Objective,
    ReconditioningConfig,
    default_objective,
)
from condiquant_recipes.recipe import Recipe


def quantization(recipe: Recipe) -> QuantizationConfig:
    """Settings of :func:`condiquant_nncf.quantize_network`."""
    section = recipe.condiquant
    ignored = section.ignored_scope
    names_any = ignored.names or ignored.patterns or ignored.types
    return QuantizationConfig(
        weight_bits=section.weight_bits,
        activation_bits=section.activation_bits,
        scope=section.scope,
        ignored_scope=nncf.IgnoredScope(**ignored.model_dump()) if names_any else None,
        weight_granularity=section.weight_granularity,
        activation_side=section.bounds.side,
        bounds_inputs=section.bounds.inputs,
        recondition=_reconditioning(recipe),
    )


def _reconditioning(recipe: Recipe) -> ReconditioningConfig | None:
    section, bits = recipe.condiquant.recondition, recipe.condiquant.activation_bits
    if not section.enabled:
        return None
    objective: Objective = (
        default_objective(bits) if section.objective == "auto" else section.objective
    )
    strength, damping = section.strength, section.damping
    if strength is None:
        strength = DEFAULT_STRENGTH.get(bits, ReconditioningConfig.strength)
    if damping is None:
        damping = DEFAULT_DAMPING.get(bits, ReconditioningConfig.damping)
    return ReconditioningConfig(
        objective=objective,
        strength=strength,
        output_tolerance=section.output_tolerance,
        steps=section.steps,
        proxy=section.proxy,
        damping=damping,
    )


def distillation(recipe: Recipe) -> DistillationConfig:
    """Settings of :func:`condiquant_plugin.distillation.distill`."""
    return DistillationConfig(seed=recipe.seed, **recipe.condiquant.distillation.model_dump())
