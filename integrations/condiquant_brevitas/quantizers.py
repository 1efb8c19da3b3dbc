"""2DQuant's learned bounds (arXiv 2406.06649) as Brevitas quantizers.

They replace any other quantizer: ``QuantLinear(..., weight_quant=LearnedBoundsWeightPerTensor,
weight_bit_width=3)``, or in the map of ``layerwise_quantize``. 2 to 8 bits, float zero point; the numbers
are those of :class:`condiquant_plugin.FakeQuantizer`.
"""

from __future__ import annotations

from typing import Any

from brevitas.inject import ExtendedInjector, value
from brevitas.inject.enum import FloatToIntImplType
from brevitas.proxy import ActQuantProxyFromInjector, WeightQuantProxyFromInjector
from torch import nn

from condiquant_brevitas.tensor_quant import LearnedBoundsQuant
from condiquant_plugin.uniform.grid import DEFAULT_OVERFLOW


class _LearnedBounds(ExtendedInjector):
    tensor_quant = LearnedBoundsQuant
    bit_width = 4
    signed = False
    narrow_range = False
    float_to_int_impl_type = FloatToIntImplType.ROUND
    side = "symmetric"
    zero_on_grid = False
    overflow = DEFAULT_OVERFLOW
    name = ""


class LearnedBoundsWeightPerTensor(_LearnedBounds):
    """4-bit weights, one pair of bounds; ``weight_row_blocks=3`` gives a fused qkv three.

    Example:
        >>> from brevitas.nn import QuantLinear
        >>> layer = QuantLinear(8, 4, weight_quant=LearnedBoundsWeightPerTensor, weight_bit_width=3)
    """

    proxy_class = WeightQuantProxyFromInjector
    kind = "weight"

    @value
    def axis(module: Any) -> int:  # one layer, or all that share the quantizer
        first: Any = module if isinstance(module, nn.Module) else module[0]
        return int(first.output_channel_dim)


class LearnedBoundsWeightPerChannel(LearnedBoundsWeightPerTensor):
    """4-bit weights, bounds per output channel."""

    @value
    def row_blocks(tracked_parameter_list: list[nn.Parameter], axis: int) -> int:
        return int(tracked_parameter_list[0].shape[axis])


class LearnedBoundsActPerTensor(_LearnedBounds):
    """4-bit activations, one pair of bounds.

    Example:
        >>> from brevitas.nn import QuantIdentity
        >>> stub = QuantIdentity(act_quant=LearnedBoundsActPerTensor, bit_width=4)
    """

    proxy_class = ActQuantProxyFromInjector
    kind = "activation"


class LearnedBoundsActPerTensorOneSided(LearnedBoundsActPerTensor):
    """As :class:`LearnedBoundsActPerTensor`, but only the upper bound is searched: softmax, ReLU, GELU."""

    side = "one_sided"
