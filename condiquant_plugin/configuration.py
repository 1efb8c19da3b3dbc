"""What to quantize and how: the one list of keys, choices and defaults, which every host reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Self, TypeVar, get_args

from condiquant_plugin.errors import InputError, check_choice
from condiquant_plugin.layerwise.precision import (
    LayerBits,
    LayerRule,
    RuledBits,
    as_rules,
    rule_for,
)
from condiquant_plugin.layerwise.scope import Scope
from condiquant_plugin.methods.alignment.transform import TransformKind
from condiquant_plugin.methods.condiquant.reconditioning import ReconditioningConfig, default_config
from condiquant_plugin.uniform.bits import FLOAT_BITS
from condiquant_plugin.uniform.bounds import Side
from condiquant_plugin.uniform.grid import DEFAULT_OVERFLOW, MAX_BITS, Overflow, check_bits

BoundsInputs = Literal["quantized", "float"]
Granularity = Literal["tensor", "channel"]
Rounding = Literal["gptq", "nearest"]
Equalize = Literal["auto", True, False]
Transform = Literal["auto", "none", "rotation", "alignment"]
SoftmaxScale = Literal["auto", "row", "tensor"]
_Layer = TypeVar("_Layer")
_MOST_TRANSFORMED = 4
"""Bits: above, rounding costs less than what a float product would take at run time."""
_CHOICES = {
    "scope": Scope,
    "weight_granularity": Granularity,
    "activation_side": Side,
    "overflow": Overflow,
    "bounds_inputs": BoundsInputs,
    "equalize": Equalize,
    "transform": Transform,
    "softmax_scale": SoftmaxScale,
    "rounding": Rounding,
}


def check_reconditioning(value: Any, name: str) -> Any:
    """Return what can stand for reconditioning.

    Raises:
        InputError: naming ``name`` and the value.
    """
    if not isinstance(value, ReconditioningConfig | None):
        check_choice(name, value, ("auto", None, "a ReconditioningConfig"))
    return value


def _check_rule(pattern: str, rule: LayerRule) -> None:
    given = {"weight_bits": rule.weight_bits, "activation_bits": rule.activation_bits}
    for key, bits in given.items():
        if bits not in (None, "float"):
            check_bits(bits, f"layers[{pattern!r}].{key}")  # type: ignore[arg-type]
    if rule.weight_bits == "float" != rule.activation_bits:
        raise InputError(_half_float(f"layers[{pattern!r}]"))


def _half_float(what: str) -> str:
    # Such a layer runs in a float kernel at the size of float: rounding its inputs would only cost.
    return (
        f"{what} leaves a weight float but not its inputs, which saves nothing: give "
        "activation_bits: float too, or weight_bits of 2 to 8"
    )


def _most_bits(choice: str) -> int:
    """That something which costs time at run time is for."""
    return _MOST_TRANSFORMED if choice == "auto" else MAX_BITS


def _ruled(bits: RuledBits, otherwise: int) -> int:
    if bits is None:
        return otherwise
    return FLOAT_BITS if bits == "float" else bits


@dataclass(frozen=True)
class QuantizationConfig:
    """What to quantize and how.

    Raises:
        InputError: bits outside 2-8, or a choice that is not known.
    """

    weight_bits: int = 4
    activation_bits: int = 4
    scope: Scope = "transformer"
    other_bits: int | None = None
    """Bits of weights and activations of the layers outside the scope; ``None`` leaves them float."""
    layers: Mapping[str, LayerRule] = field(default_factory=dict)
    """Bits of single layers, by shell-style patterns of their names (``"*.qkv"``); later ones win."""
    weight_granularity: Granularity = "tensor"
    """Bounds per tensor (per row block of a fused qkv) as in 2DQuant, or per output channel."""
    activation_side: Side = "auto"
    """How ranges of activations are shrunk."""
    zero_on_grid: bool = False
    """Zero is a level of every grid and weights are symmetric, as NPUs need it; costs accuracy."""
    overflow: Overflow = DEFAULT_OVERFLOW
    """``"safe"``: exact on every x86-64 CPU; 8-bit weights have wider steps, operands of products 7 bits.
    ``"vnni"``: all 8 bits, exact only on CPUs with VNNI."""
    bounds_inputs: BoundsInputs = "float"
    """Search activation bounds on the float network, or on one that is quantized up to that layer.

    ``"float"`` measured better at every bit-width, with and without reconditioning (docs/results.md).
    Only :func:`condiquant_nncf.quantize_network` does the other.
    """
    recondition: ReconditioningConfig | Literal["auto"] | None = "auto"
    """``"auto"`` chooses on held-out images between the weights as trained and least squares with the
    default of the activations' bit-width; ``None`` keeps the weights as trained."""
    equalize: Equalize = "auto"
    """Whether to give the channels of layers' inputs like ranges, by factors that the layers around take
    up, if that is closer to the float network on held-out images. ``"auto"``: where ``recondition`` is
    ``"auto"`` too. Not for an ``ov.Model``."""
    transform: Transform = "none"
    """A matrix in front of each linear layer in scope, undone in its weight: ``"alignment"`` makes rounding
    cost the output least, ``"rotation"`` only shares wide channels out. A small float product more at
    run time (docs/method.md), which ``"auto"`` finds worth it for inputs of 2 to 4 bits. Only
    :func:`condiquant_nncf.quantize_network` and what is built on it have them."""
    softmax_scale: SoftmaxScale = "tensor"
    """Of softmax maps that products of attention take: ``"row"`` brings the largest entry of each row to 1
    before it is rounded and the row's sum to 1 behind, ``"tensor"`` rounds entries as they are. Rows take
    longer at run time (docs/method.md), which ``"auto"`` finds worth it for factors of 2 to 4 bits. Only
    where there are transforms."""
    rounding: Rounding = "gptq"
    """``"gptq"``: weights in scope are rounded so that their layer's output stays. ``"nearest"``: every
    entry to its nearest level."""

    def __post_init__(self) -> None:
        check_bits(self.weight_bits, "weight_bits")
        check_bits(self.activation_bits, "activation_bits")
        if self.other_bits is not None:
            check_bits(self.other_bits, "other_bits")
        object.__setattr__(self, "layers", as_rules(self.layers))
        for pattern, rule in self.layers.items():
            _check_rule(pattern, rule)
        for name, kind in _CHOICES.items():
            check_choice(name, getattr(self, name), get_args(kind))
        check_reconditioning(self.recondition, "recondition")

    def changed(self, changes: dict[str, Any]) -> Self:
        """With other values of some keys.

        Raises:
            InputError: an unknown key, or a value that cannot be.
        """
        known = [field.name for field in fields(self)]
        for key in changes:
            if key not in known:
                raise InputError(f"{key} is no key of the quantization: use {', '.join(known)}")
        return replace(self, **changes)

    def bits(self, name: str, in_scope: bool = True) -> LayerBits:
        """Of a layer or product in scope, or outside it; see :class:`LayerBits`."""
        weight, activation = self.weight_bits, self.activation_bits
        if not in_scope and self.other_bits is not None:
            weight = activation = self.other_bits
        rule = rule_for(name, self.layers)
        return LayerBits(_ruled(rule.weight_bits, weight), _ruled(rule.activation_bits, activation))

    def quantizes(self, name: str, has_weight: bool) -> bool:
        """Whether rules of ``layers`` leave a layer, or a product, more than floats.

        Raises:
            InputError: rules that together leave its weight float, but not its inputs.
        """
        weight, activation = self.bits(name)
        if has_weight and weight == FLOAT_BITS != activation:
            raise InputError(_half_float(f"of layers, what is for {name}"))
        return activation != FLOAT_BITS or (has_weight and weight != FLOAT_BITS)

    def quantized_of(
        self,
        layers: Sequence[_Layer],
        name: Callable[[_Layer], str],
        has_weight: Callable[[_Layer], bool],
    ) -> list[_Layer]:
        """Those of ``layers`` that rules do not leave float.

        Raises:
            InputError: if that is none; as :meth:`quantizes`.
        """
        kept = [layer for layer in layers if self.quantizes(name(layer), has_weight(layer))]
        if not kept:
            raise InputError("the rules of layers leave everything float: quantize a layer")
        return kept

    @property
    def tries_equalizing(self) -> bool:
        """Whether the channels of layers' inputs may get factors."""
        return self.recondition == "auto" if self.equalize == "auto" else self.equalize

    @property
    def transform_kind(self) -> TransformKind:
        """Of the inputs that :meth:`transforms` says."""
        return "rotation" if self.transform == "rotation" else "alignment"

    def transforms(self, activation_bits: int) -> bool:
        """Whether an input of so many bits is transformed, if it is one of a linear layer in scope."""
        return self.transform != "none" and activation_bits <= _most_bits(self.transform)

    def scales_rows(self, activation_bits: int) -> bool:
        """Whether a softmax map of so many bits gets a scale for each row."""
        return self.softmax_scale != "tensor" and activation_bits <= _most_bits(self.softmax_scale)

    def check_no_transform(self, instead: str) -> None:
        """Refuse a transform, or scales of rows, that were asked for.

        Raises:
            InputError: ``instead`` says where there are some.
        """
        for key, allowed in {"transform": "none", "softmax_scale": "tensor"}.items():
            if (value := getattr(self, key)) not in ("auto", allowed):
                raise InputError(f"{key}={value!r} {instead}: leave it out")

    def reconditioning(self) -> ReconditioningConfig | None:
        """Settings of reconditioning, the default of the bit-width filled in."""
        if self.recondition == "auto":
            return default_config(self.activation_bits)
        return self.recondition
