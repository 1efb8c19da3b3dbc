"""Which bits a layer's weight and inputs have: as asked for, and read from a network's quantizers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import nn

FLOAT_BITS = 32


class LayerBits(NamedTuple):
    """Of a layer's weight and of its inputs; :data:`FLOAT_BITS` where they stay float."""

    weight: int
    activation: int

    @property
    def label(self) -> str:
        """For names of files and rows.

        >>> LayerBits(4, 8).label
        'w4a8'
        """
        return f"w{self.weight}a{self.activation}"


def layer_bits(model: nn.Module) -> dict[str, LayerBits]:
    """Bits of every quantized layer with a weight, by its name.

    Args:
        model: with fake quantizers named after their layer, ``<layer>.weight`` and ``<layer>.input``.
    """
    weights, inputs = _bits_by_owner(model, "weight"), _bits_by_owner(model, "activation")
    return {
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
