"""From a recipe's sections to the settings of the method and its hosts."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import nncf

from condiquant_nncf import QuantizationConfig
from condiquant_plugin.errors import InputError
from condiquant_plugin.methods.condiquant.reconditioning import (
    KEYS_OF_OBJECTIVE,
    ReconditioningConfig,
    default_config,
)
from condiquant_recipes.recipe import (
    BOUNDS_KEYS,
    QUANTIZATION_KEYS,
    Recipe,
    ReconditionSection,
)


def quantization(recipe: Recipe) -> QuantizationConfig:
    """Settings of :func:`condiquant_nncf.quantize_network`."""
    section = recipe.condiquant
    ignored = section.ignored_scope
    names_any = ignored.names or ignored.patterns or ignored.types
    return QuantizationConfig(
        **{key: getattr(section, key) for key in QUANTIZATION_KEYS},
        **{key: getattr(section.bounds, name) for key, name in BOUNDS_KEYS.items()},
        ignored_scope=nncf.IgnoredScope(**ignored.model_dump()) if names_any else None,
        zero_on_grid=recipe.export.device == "NPU",
        recondition=_reconditioning(recipe),
    )


def _reconditioning(recipe: Recipe) -> ReconditioningConfig | Literal["auto"] | None:
    section = recipe.condiquant.recondition
    if not section.enabled:
        return None
    if section == ReconditionSection():
        return "auto"
    config = replace(default_config(recipe.condiquant.activation_bits), **section.given())
    plain = ReconditionSection()
    (other,) = KEYS_OF_OBJECTIVE.keys() - {config.objective}
    for key in KEYS_OF_OBJECTIVE[other]:
        if getattr(section, key) != getattr(plain, key):
            raise InputError(
                f"condiquant.recondition.{key} has no effect with objective={config.objective}: "
                f"leave it out, or set condiquant.recondition.objective={other}"
            )
    return config
