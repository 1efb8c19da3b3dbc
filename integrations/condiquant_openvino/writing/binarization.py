"""Signs and ±1 weights of binarized convolutions, in forms that the CPU plugin computes exactly.

Signs are a FakeQuantize of two levels, whose input bounds are neighbouring floats: at or below the lower
one -1, from the upper one on +1, as in torch. Equal bounds give NaN on the plugin. Weights keep one bit
each, looked up in a table.

In front of a convolution whose weights are exactly ±1 the plugin makes of such signs a BinaryConvolution of
one bit. That takes one fixed size alone, where height or width are open it does not compile; and float
operators in f32, as in bfloat16 OpenVINO 2026.4 refuses it, or gives NaN. A second FakeQuantize of 256
levels, which changes nothing, leads to int8 kernels instead, which know neither limit. In both forms sums
are whole numbers, and a scale has to stand behind the convolution: in the weights it would leave float
kernels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import openvino as ov
import openvino.opset13 as ops
from numpy.typing import NDArray

from condiquant_openvino.markers import constant_values
from condiquant_openvino.writing.quantizer_graphs import redirect

BinaryKernel = Literal["u1", "int8"]
"""``"int8"``: right with all properties, at any size. ``"u1"``: XNOR and popcount, for IRs of a fixed size
that are compiled with float operators in f32."""
SIGNS = "signs"
"""How friendly names of FakeQuantize nodes of two levels begin, before a slash and the label."""
_SMALLEST = np.float32(1e-30)
"""Of the distance of the bounds: its reciprocal has to be finite."""


@dataclass(frozen=True)
class Binarizer:
    """A traced ``condiquant::binarize``: +1 above a threshold, else -1."""

    label: str
    threshold: NDArray[np.float32]
    """One, or one for each channel."""


def write_binarizers(
    placeholders: Iterable[tuple[ov.Node, Binarizer]], kernel: BinaryKernel
) -> None:
    """Replace what stands for signs, in place.

    Args:
        placeholders: what stands for each binarizer, of activations and of weights.
    """
    for node, binarizer in placeholders:
        values = constant_values(node.input_value(0))
        if values is None:
            redirect(node.output(0), _signs(node.input_value(0), binarizer, kernel))
        else:
            weight = _weight(values, binarizer, kernel)
            _move_scales_behind(node.output(0))
            redirect(node.output(0), weight)


def _signs(x: ov.Output, binarizer: Binarizer, kernel: BinaryKernel) -> ov.Output:
    lower = binarizer.threshold.reshape(1, -1, 1, 1).astype(np.float32)
    upper = np.maximum(np.nextafter(lower, np.float32(np.inf)), lower + _SMALLEST)
    levels = [ops.constant(np.full((1, 1, 1, 1), level, np.float32)) for level in (-1, 1)]
    signs = ops.fake_quantize(x, ops.constant(lower), ops.constant(upper), *levels, 2)
    signs.set_friendly_name(f"{SIGNS}/{binarizer.label}")
    if kernel == "u1":
        return signs.output(0)
    ends = [ops.constant(np.float32(end)) for end in (-128, 127)] * 2
    return ops.fake_quantize(signs, *ends, 256).output(0)


def _weight(values: NDArray, binarizer: Binarizer, kernel: BinaryKernel) -> ov.Output:
    bits = ops.constant((values > binarizer.threshold.reshape(-1)[0]).astype(np.uint8), ov.Type.u1)
    entry = np.float32 if kernel == "u1" else np.int8
    table = ops.constant(np.array([-1, 1], entry))
    found = ops.gather(table, ops.convert(bits, np.int32), ops.constant(np.int64(0)))
    if kernel == "int8":
        scale = ops.constant(np.ones((len(values), 1, 1, 1), np.float32))
        found = ops.multiply(ops.convert(found, np.float32), scale)
    found.set_friendly_name(f"weight/{binarizer.label}")
    return found.output(0)


def _move_scales_behind(weight: ov.Output) -> None:
    """OpenVINO's conversion takes a product behind a convolution into its weights."""
    for port in weight.get_target_inputs():
        product = port.get_node()
        if product.get_type_name() != "Multiply":
            continue
        scale = constant_values(product.input_value(1 - port.get_index()))
        assert scale is not None
        for taken in product.output(0).get_target_inputs():
            convolution = taken.get_node()
            targets = convolution.output(0).get_target_inputs()
            taken.replace_source_output(weight)
            behind = ops.multiply(
                convolution, ops.constant(scale.reshape(1, -1, 1, 1).astype(np.float32))
            )
            for target in targets:
                target.replace_source_output(behind.output(0))
