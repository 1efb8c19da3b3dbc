"""Weights of few bits in an ``ov.Model``, as its CPU kernels take them.

| form | in the model | in memory |
|---|---|---|
| -1, 0, 1 between scales | u2 codes 0, 1, 2, zero point 1, float16 scales | 2 bits |
| likewise, ``signs="u1"``: no 0 | u1 codes 0, 1, a Convert to u2, zero point 1/2 | 2 bits |
| integers | u2, u4 or u8 codes, zero points, float16 scales | 2, 4 or 8 bits; 3 bits as 4 |
| low rank | two products, float16 factors | 16 bits a number of the factors |
| pruned | float16 values | 16 or 32 bits a weight |
| any other | float16 values | **unfolded**: 16 or 32 bits a weight |
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import torch
from numpy.typing import NDArray

from condiquant_plugin.errors import InputError, check_choice
from condiquant_plugin.methods.arb.form import BinaryWeight
from condiquant_plugin.methods.compression.form import CompressedWeight, LowRank, Plain, Sum
from condiquant_plugin.methods.gptq.integers import IntegerWeight
from condiquant_plugin.methods.pbs2p.magnitude import PrunedWeight

_IN_KERNELS = ("u2", "u4", "u8")
PACKED = ("u1", *_IN_KERNELS)
"""Kinds of :func:`storage_of` that kernels keep, u1 as u2."""
Signs = Literal["u2", "u1"]
"""What signs are stored in: as kernels keep them, or in one bit, which becomes u2 when it is compiled."""
_ZERO_POINT = 1
_TINY = 1e-30
_EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}


def storage_of(form: CompressedWeight, signs: Signs = "u2") -> str:
    """``"u1"``, ``"u2"``, ``"u4"``, ``"u8"``, ``"low_rank"``, ``"float"``, ``"unfolded"``, or two with a
    ``+``."""
    if isinstance(form, Sum):
        return f"{storage_of(form.base, signs)}+{storage_of(form.residual)}"
    if isinstance(form, LowRank):
        return "low_rank"
    if isinstance(form, Plain | PrunedWeight):
        return "float"
    if isinstance(form, IntegerWeight):
        return f"u{_code_bits(form.bits)}"
    if not isinstance(form, BinaryWeight) or not form.has_kernel:
        return "unfolded"
    return signs if form.kept is None else "u2"


def write_compressed(
    model: Any, forms: Mapping[str, CompressedWeight], *, signs: Signs = "u2"
) -> dict[str, str]:
    """Put forms into the matrix products of a model, in place.

    Args:
        model: an ``ov.Model``, as converted from the torch model whose layers ``forms`` names.
        forms: by layer; :func:`condiquant_plugin.compression.compressed_weights`.
        signs: see :data:`Signs`; pruned weights are u2 either way.

    Returns:
        How each layer is stored, see :func:`storage_of`.

    Raises:
        InputError: a layer that the model does not have; an unknown ``signs``.
    """
    check_choice("signs", signs, get_args(Signs))
    products = dict(_products(model))
    for name in forms:
        if name not in products:
            raise InputError(f"the IR has no matrix product of {name}: convert the same model")
    stored = {}
    for name, form in forms.items():
        replace_weight(products[name], form, signs)
        stored[name] = storage_of(form, signs)
    model.validate_nodes_and_infer_types()
    return stored


def packed_products(model: Any) -> int:
    """How many matrix products of a model keep u2, u4 or u8 weights when the CPU plugin compiles it.

    Args:
        model: an ``ov.Model``, or the path of one.
    """
    compiled = ov.Core().compile_model(model, "CPU", _EXACT)
    nodes = [dict(n.get_rt_info()) for n in compiled.get_runtime_model().get_ordered_ops()]
    kinds = [(str(n["layerType"].value), str(n["runtimePrecision"].value)) for n in nodes]
    return sum(kinds.count(("FullyConnected", kind)) for kind in _IN_KERNELS)


def ir_bits_per_weight(model: Any) -> float:
    """Of all matrix products with constant weights but the last: codes, scales and zero points as stored.

    Args:
        model: an ``ov.Model``, of ``nncf.compress_weights`` for example.

    Raises:
        InputError: a model with fewer than two such products.
    """
    stored = [
        _bits_of(node) for node in model.get_ordered_ops() if node.get_type_name() == "MatMul"
    ]
    layers = [each for each in stored if each is not None][:-1]
    if not layers:
        raise InputError("the IR has no matrix products beside its last: give a language model's")
    return sum(bits for bits, _ in layers) / sum(weights for _, weights in layers)


def _bits_of(product: Any) -> tuple[int, int] | None:
    """Bits of the constants that a product's weight is computed from, and its entries; None for others."""
    port = product.input_value(1)
    if not port.get_partial_shape().is_static or len(port.get_shape()) != 2:
        return None
    bits, rest = 0, [port]
    while rest:
        node = rest.pop().get_node()
        kind = node.get_type_name()
        if kind == "Constant":
            bits += node.get_element_type().bitwidth * math.prod(node.get_output_shape(0))
        elif kind in ("Convert", "Reshape"):  # of which the second input is a shape
            rest.append(node.input_value(0))
        elif kind in ("Multiply", "Subtract"):
            rest += [node.input_value(0), node.input_value(1)]
        else:
            return None
    return bits, math.prod(port.get_shape())


def product_errors(
    forms: Mapping[str, CompressedWeight], *, signs: Signs = "u2"
) -> dict[str, float]:
    """What the products of :func:`write_compressed` compute, each compiled for itself, against torch.

    Returns:
        By layer, the largest difference for random inputs, relative to the largest output.
    """
    generator = torch.Generator().manual_seed(0)
    errors = {}
    for name, form in forms.items():
        x = torch.randn(8, form.layout.shape[1], generator=generator)
        parameter = ops.parameter([-1, x.shape[1]], ov.Type.f32)
        if isinstance(form, Plain):
            continue
        model = ov.Model([_apply(parameter.output(0), form, signs)], [parameter])
        expected = (x @ form.dense().float().mT).numpy()
        found = ov.compile_model(model, "CPU", _EXACT)(x.numpy())[0]
        errors[name] = float(np.abs(found - expected).max() / max(np.abs(expected).max(), _TINY))
    return errors


def _products(model: Any) -> Iterator[tuple[str, Any]]:
    """Matrix products with a constant weight ``(rows, features)``, by the module that they come from."""
    for node in model.get_ordered_ops():
        if node.get_type_name() != "MatMul" or not node.get_attributes()["transpose_b"]:
            continue
        source = node.input_value(1).get_node()
        while source.get_type_name() == "Convert":
            source = source.input_value(0).get_node()
        if source.get_type_name() != "Constant" or len(source.get_output_shape(0)) != 2:
            continue
        found = re.match(r"__module\.(.+?)/", node.get_friendly_name())
        if found:
            yield found.group(1), node


def replace_weight(product: Any, form: CompressedWeight, signs: Signs = "u2") -> None:
    """Of a matrix product the weight, and what its input passes."""
    if isinstance(form, Plain):
        return
    x, name = product.input_value(0), product.get_friendly_name()
    new = _apply(x, form, signs)
    product.output(0).replace(new.output(0))
    product.set_friendly_name(f"{name}/float")
    new.set_friendly_name(name)


def _apply(x: Any, form: CompressedWeight, signs: Signs) -> Any:
    if isinstance(form, Sum):
        return ops.add(_apply(x, form.base, signs), _apply(x, form.residual, signs))
    if isinstance(form, LowRank):
        inner = ops.matmul(x, _half(form.right[0]), False, True)
        return ops.matmul(inner, _half(form.left[0]), False, True)
    if isinstance(form, BinaryWeight) and form.has_kernel:
        if form.column_scales is not None:
            x = _scaled(x, form.column_scales[0].float().numpy())
        scales = form.row_scales[0, ..., 0]
        if storage_of(form, signs) == "u1":
            return ops.matmul(x, _one_bit(form.codes()[0] > 0, scales), False, True)
        codes = (form.codes()[0] + _ZERO_POINT).to(torch.uint8)
        zero_points = torch.full_like(scales, _ZERO_POINT, dtype=torch.uint8)
        return ops.matmul(x, _integers(codes, scales, zero_points, 2), False, True)
    if isinstance(form, IntegerWeight):
        parts = form.codes[0], form.scales[0], form.zero_points[0]
        return ops.matmul(x, _integers(*parts, _code_bits(form.bits)), False, True)
    return ops.matmul(x, _half(form.matrices()[0].half()), False, True)


def _scaled(x: Any, scales: NDArray[np.float32]) -> Any:
    """``x`` times ``(1, features)``."""
    rank = x.get_partial_shape().rank
    if rank.is_static and rank.get_length() > 2:
        return ops.multiply(x, ops.constant(scales)).output(0)
    # OpenVINO multiplies the weight of a product of two matrices instead, which unfolds it.
    return ops.add(x, ops.multiply(x, ops.constant(scales - 1))).output(0)


def _half(values: torch.Tensor) -> Any:
    return ops.convert(ops.constant(values.contiguous().numpy()), ov.Type.f32)


def _code_bits(bits: int) -> int:
    """Of the narrowest codes that have a kernel."""
    return next(width for width in (2, 4, 8) if bits <= width)


def _integers(
    codes: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor, bits: int
) -> Any:
    """``(code - zero point) * scale`` as the plugin keeps it packed.

    Args:
        codes: uint8, ``(rows, features)``.
        scales, zero_points: float16 and uint8, ``(rows, blocks)``.
        bits: 2, 4 or 8, of a code.
    """
    each = _by_block(scales)
    constant = _packed(_split(codes, scales).numpy(), bits)
    zero = ops.convert(ops.constant(_by_block(zero_points)), ov.Type.f16)
    return _dequantized(constant, zero, each, codes.shape)


def _one_bit(positive: torch.Tensor, scales: torch.Tensor) -> Any:
    """``(code - 1/2) * 2 scale`` for codes 0 and 1, u2 once the first Convert is folded."""
    split = _split(positive, scales)
    tensor = ov.Tensor(ov.Type.u1, ov.Shape(split.shape))
    packed = np.packbits(split.numpy().reshape(-1))  # a Convert takes the highest bit first
    tensor.data.reshape(-1).view(np.uint8)[: packed.size] = packed
    codes = ops.convert(ov.op.Constant(tensor), ov.Type.u2)
    half = ops.constant(np.float16(0.5))
    return _dequantized(codes, half, 2 * _by_block(scales), positive.shape)


def _dequantized(codes: Any, zero: Any, scales: NDArray[np.float16], shape: Sequence[int]) -> Any:
    weight = ops.multiply(ops.subtract(ops.convert(codes, ov.Type.f16), zero), ops.constant(scales))
    if scales.ndim > 2:
        weight = ops.reshape(weight, ops.constant(np.array(shape, np.int64)), False)
    return ops.convert(weight, ov.Type.f32)


def _split(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """``(rows, features)`` as ``(rows, blocks, features of a block)`` where there are several blocks."""
    blocks = scales.shape[1]
    return values if blocks == 1 else values.unflatten(1, (blocks, -1))


def _by_block(values: torch.Tensor) -> NDArray[Any]:
    """``(rows, blocks)`` as it broadcasts against :func:`_split`."""
    found: NDArray[Any] = (
        (values if values.shape[1] == 1 else values[..., None]).contiguous().numpy()
    )
    return found


def _packed(codes: NDArray[np.uint8], bits: int) -> Any:
    """As many to a byte as fit, the first in the lowest bits."""
    if bits == 8:
        return ops.constant(codes)
    tensor = ov.Tensor(getattr(ov.Type, f"u{bits}"), ov.Shape(codes.shape))
    each = 8 // bits
    parts = np.pad(codes.reshape(-1), (0, -codes.size % each)).reshape(-1, each)
    packed = np.bitwise_or.reduce(parts << (bits * np.arange(each, dtype=np.uint8)), axis=1)
    tensor.data.reshape(-1).view(np.uint8)[: packed.size] = packed
    return ov.op.Constant(tensor)
