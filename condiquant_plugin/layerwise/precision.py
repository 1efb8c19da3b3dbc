"""Which bits a layer's weight and inputs have: as asked for, and read from a network's quantizers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from condiquant_plugin.errors import InputError
from condiquant_plugin.uniform.bits import FLOAT_BITS

if TYPE_CHECKING:
    from torch import nn

RuledBits = int | Literal["float"] | None


class LayerBits(NamedTuple):
    """Of a layer's weight and of its inputs; :data:`.uniform.bits.FLOAT_BITS` where they stay float."""

    weight: int
    activation: int

    @property
    def label(self) -> str:
        """For names of files and rows.

        >>> LayerBits(4, 8).label
        'w4a8'
        """
        return f"w{self.weight}a{self.activation}"


@dataclass(frozen=True)
class LayerRule:
    """Bits of the layers that a pattern matches."""

    weight_bits: RuledBits = None
    """2 to 8, or ``"float"``; ``None``: as without the rule. Products of activations have no weight."""
    activation_bits: RuledBits = None
    """Likewise, of inputs and of both factors of a product. A float weight has float inputs."""


def as_rules(given: Any) -> dict[str, LayerRule]:
    """Rules by pattern, from what a user or a file gives.

    Raises:
        InputError: anything else.
    """
    if not isinstance(given, Mapping):
        raise InputError(
            f"layers={given!r}: give rules by pattern, as {{'*.qkv': {{weight_bits: 8}}}}"
        )
    rules: dict[str, LayerRule] = {}
    for pattern, rule in given.items():
        if isinstance(rule, Mapping):
            known = {"weight_bits", "activation_bits"}
            if unknown := sorted(map(str, rule.keys() - known)):
                raise InputError(
                    f"layers[{pattern!r}] has no {unknown[0]}: give weight_bits or activation_bits"
                )
            rule = LayerRule(**rule)
        if not isinstance(rule, LayerRule):
            raise InputError(f"layers[{pattern!r}]={rule!r}: give weight_bits or activation_bits")
        rules[str(pattern)] = rule
    return rules


def rule_for(name: str, rules: Mapping[str, LayerRule]) -> LayerRule:
    """What all rules say of a layer; of two that say something of the same bits, the later one.

    Args:
        rules: by shell-style pattern of layer names.
    """
    found = LayerRule()
    for pattern, rule in rules.items():
        if fnmatchcase(_first_use(name), pattern):
            found = LayerRule(
                found.weight_bits if rule.weight_bits is None else rule.weight_bits,
                found.activation_bits if rule.activation_bits is None else rule.activation_bits,
            )
    return found


def check_rules_match(
    rules: Mapping[str, LayerRule], inside: Collection[str], outside: Collection[str], scope: str
) -> None:
    """Every rule has a layer.

    Args:
        inside: names of the layers that are quantized.
        outside: names of the others that a wider scope takes in.

    Raises:
        InputError: naming a pattern that has none.
    """
    for pattern in rules:
        if any(fnmatchcase(_first_use(name), pattern) for name in inside):
            continue
        if out := next((n for n in outside if fnmatchcase(_first_use(n), pattern)), None):
            raise InputError(
                f"layers[{pattern!r}] is for {out}, which is outside scope={scope!r}: "
                'use scope="all" or other_bits, or leave the rule out'
            )
        example = next(iter(inside), "")
        raise InputError(
            f"layers[{pattern!r}] matches no layer: names are like {example}, "
            "and * stands for any part of one"
        )


def layer_bits(model: nn.Module) -> dict[str, LayerBits]:
    """Bits of every quantized layer with a weight, by its name.

    Args:
        model: with fake quantizers named after their layer, ``<layer>.weight`` and ``<layer>.input``, or
            binarized convolutions.
    """
    from condiquant_plugin.binary.convolution import binarized_convolutions

    binarized = dict.fromkeys(binarized_convolutions(model), LayerBits(1, 1))
    weights, inputs = _bits_by_owner(model, "weight"), _bits_by_owner(model, "activation")
    return binarized | {
        layer: LayerBits(weights.get(_first_use(layer), FLOAT_BITS), inputs.get(layer, FLOAT_BITS))
        for layer in dict.fromkeys((*inputs, *weights))
    }


def product_bits(model: nn.Module) -> dict[str, int]:
    """Bits of the operands of every quantized product of activations, by its name."""
    return _bits_by_owner(model, "operand")


def _bits_by_owner(model: nn.Module, kind: str) -> dict[str, int]:
    from condiquant_plugin.uniform.fake_quantizer import fake_quantizers

    bits: dict[str, int] = {}
    for quantizer in fake_quantizers(model).values():
        if quantizer.kind == kind:
            owner, _, _ = quantizer.name.rpartition(".")
            bits[owner] = min(quantizer.bits, bits.get(owner, quantizer.bits))
    return bits


def _first_use(layer: str) -> str:
    """The layer whose weight a further use of it, ``<layer>#1``, has."""
    name, separator, use = layer.rpartition("#")
    return name if separator and use.isdecimal() else layer


def usual(bits: Mapping[str, LayerBits]) -> LayerBits:
    """The bits that most layers have; of equally many, the lower ones."""
    return LayerBits(
        _most(b.weight for b in bits.values()), _most(b.activation for b in bits.values())
    )


def _most(bits: Iterable[int]) -> int:
    counts = Counter(bits)
    return min(counts, key=lambda b: (-counts[b], b), default=FLOAT_BITS)


def others(bits: Mapping[str, LayerBits]) -> dict[str, int]:
    """How many layers have which other bits than the usual ones, by label."""
    labels = Counter(b.label for b in bits.values())
    labels.pop(usual(bits).label, None)
    return dict(sorted(labels.items()))
