"""From a recipe's sections to the settings of the method and its hosts."""

from __future__ import annotations

from dataclasses import replace

import nncf

from condiquant_nncf import QuantizationConfig
from condiquant_plugin.errors import InputError
from condiquant_plugin.methods.condiquant.reconditioning import ReconditioningConfig, default_config
from condiquant_recipes.recipe import Recipe, ReconditionSection


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
        other_bits=section.other_bits,
        weight_granularity=section.weight_granularity,
        activation_side=section.bounds.side,
        zero_on_grid=recipe.export.device == "NPU",
        overflow=section.overflow,
        bounds_inputs=section.bounds.inputs,
        recondition=_reconditioning(recipe),
    )


def _reconditioning(recipe: Recipe) -> ReconditioningConfig | None:
    section = recipe.condiquant.recondition
    if not section.enabled:
        return None
    given = section.model_dump(exclude={"enabled"}, exclude_none=True)
    if section.objective == "auto":
        del given["objective"]
    config = replace(default_config(recipe.condiquant.activation_bits), **given)
    plain = ReconditionSection()
    unused = {
        "condition": ("damping",),
        "least_squares": ("strength", "output_tolerance", "steps", "proxy"),
    }[config.objective]
    for key in unused:
        if getattr(section, key) != getattr(plain, key):
            other = "least_squares" if config.objective == "condition" else "condition"
            raise InputError(
                f"condiquant.recondition.{key} has no effect with objective={config.objective}: "
                f"leave it out, or set condiquant.recondition.objective={other}"
            )
    return config
