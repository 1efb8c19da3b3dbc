"""Bits by layer as a recipe says them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict

from condiquant_plugin.layerwise.precision import LayerBits, LayerRule, RuledBits, usual
from condiquant_plugin.uniform.bits import FLOAT_BITS
from condiquant_recipes.recipe import Recipe, with_condiquant


def with_bits(recipe: Recipe, bits: Mapping[str, LayerBits], products: Collection[str]) -> Recipe:
    """The recipe with the bits that most layers have, and a rule for every other layer or product.

    Args:
        products: which of the names in ``bits`` are products of activations, which have no weight.
    """
    common = usual({n: b for n, b in bits.items() if n not in products and b.weight != FLOAT_BITS})
    rules = {
        name: asdict(_rule(own))
        for name, own in bits.items()
        if own != common and not (name in products and own.activation == common.activation)
    }
    return with_condiquant(
        recipe, weight_bits=common.weight, activation_bits=common.activation, layers=rules
    )


def _rule(bits: LayerBits) -> LayerRule:
    return LayerRule(*map(_said, bits))


def _said(bits: int) -> RuledBits:
    return "float" if bits == FLOAT_BITS else bits
