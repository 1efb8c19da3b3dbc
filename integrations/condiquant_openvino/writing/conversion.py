"""Torch network with fake quantizers to ``ov.Model`` with packed weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import Enum, auto
from typing import Literal, get_args

import openvino as ov
import openvino.opset13 as ops
from torch import Tensor, nn

from condiquant_openvino import markers
from condiquant_openvino.running.reading import set_metadata
from condiquant_openvino.writing import quantizer_graphs
from condiquant_openvino.writing.binarization import Binarizer, BinaryKernel, write_binarizers
from condiquant_openvino.writing.overflow import inexact_in_int8
from condiquant_openvino.writing.passes.compaction import compact
from condiquant_openvino.writing.passes.factors import move_factors_behind_products
from condiquant_openvino.writing.passes.joining import join
from condiquant_openvino.writing.passes.propagation import propagate
from condiquant_openvino.writing.passes.rearranging import collapse
from condiquant_openvino.writing.passes.separating import separate
from condiquant_openvino.writing.passes.simplification import simplify
from condiquant_openvino.writing.passes.softmax_rows import write_softmax_rows
from condiquant_openvino.writing.quantizer_graphs import Quantizer, redirect
from condiquant_openvino.writing.tracing import (
    Placeholder,
    Traced,
    trace,
    transform_of,
    without_placeholders,
)
from condiquant_plugin.errors import InputError, check_choice
from condiquant_plugin.uniform import grid

InstructionSet = Literal["vnni", "avx2"]
"""What the kernels that are meant are fast on: with VNNI or without."""


class _Form(Enum):
    """How a fake quantizer is written; see the functions of :mod:`quantizer_graphs`."""

    ACTIVATION = auto()
    ELEMENTWISE = auto()
    INT8_WEIGHT = auto()
    FLOAT_WEIGHT = auto()


def convert(
    model: nn.Module,
    example_input: Tensor,
    *,
    static: bool = False,
    isa: InstructionSet = "vnni",
    binary_kernel: BinaryKernel = "int8",
    input_names: Sequence[str] = ("image",),
    output_names: Sequence[str] = ("upscaled",),
) -> ov.Model:
    """Convert so that the CPU plugin computes what ``model`` simulates.

    Compile with ``INFERENCE_PRECISION_HINT=f32``; every other property may stay at its default.

    Args:
        model: contains :class:`condiquant_plugin.FakeQuantizer` modules.
        example_input: shape ``(batch, channels, height, width)``; the result has
            batch 1. For a result of any height and width trace at a size other than the network's
            ``img_size``, where attention masks are constants. Inputs that are not images keep their
            shape.
        static: keep the example's height and width.
        isa: instruction set that the graph is fast on; it is right on all.
        binary_kernel: of binarized convolutions; ``"u1"`` needs ``static``, and to be compiled with
            ``INFERENCE_PRECISION_HINT=f32`` or ``EXECUTION_MODE_HINT=ACCURACY``.

    Raises:
        InputError: if OpenVINO cannot convert the model, or it is not float32 with one output.
    """
    check_choice("binary_kernel", binary_kernel, get_args(BinaryKernel))
    if binary_kernel == "u1" and not static:
        raise InputError(
            "binary_kernel='u1' takes images of one size alone: set static, or use 'int8'"
        )
    traced = trace(model, example_input, static, input_names, output_names)
    return _written(traced, isa, binary_kernel)


def convert_beside_float(
    model: nn.Module,
    example_input: Tensor,
    *,
    static: bool = False,
    isa: InstructionSet = "vnni",
    input_names: Sequence[str] = ("image",),
    output_names: Sequence[str] = ("upscaled",),
) -> tuple[ov.Model, ov.Model]:
    """As :func:`convert`, and from the same trace the network without quantizers, transforms and signs.

    Behind a transform that one has the products of the network as trained, though not its values.
    """
    traced = trace(model, example_input, static, input_names, output_names)
    in_float = without_placeholders(traced.graph)
    return _written(traced, isa, "int8"), in_float


def _written(traced: Traced, isa: InstructionSet, binary_kernel: BinaryKernel) -> ov.Model:
    return write_quantizers(
        traced.graph, traced.quantizers, traced.overflow, isa, traced.binarizers, binary_kernel
    )


def write_quantizers(
    model: ov.Model,
    quantizers: dict[str, Quantizer],
    overflow: grid.Overflow,
    isa: InstructionSet,
    binarizers: Mapping[str, Binarizer] | None = None,
    binary_kernel: BinaryKernel = "int8",
) -> ov.Model:
    """Replace placeholders by what int8 kernels compute, weights packed; ``model`` is used up.

    Args:
        quantizers: by the labels of the placeholders.
        overflow: ``"safe"`` leaves products to float kernels whose integers might overflow in int8.
        isa: without VNNI linear layers are faster in float, and a whole attention is one kernel in
            float only; convolutions are int8 in both.
        binarizers: of binarized convolutions, by the labels of their placeholders.
        binary_kernel: for them.

    Raises:
        InputError: an instruction set that is not known.
    """
    check_choice("isa", isa, get_args(InstructionSet))
    name = model.get_friendly_name()
    simplify(model)
    move_factors_behind_products(model)
    write_softmax_rows(model)
    write_binarizers(_binarizers(model, binarizers or {}), binary_kernel)
    _absorb_transposes(model, quantizers)
    _replace_placeholders(model, quantizers, overflow, linear_in_float=isa == "avx2")
    model = propagate(model)
    collapse(model)
    join(model)
    separate(model)
    compact(model)
    model.validate_nodes_and_infer_types()
    model.set_friendly_name(name)
    _name_reproducibly(model)
    _keep_names_apart(model)
    markers.set_version(model)
    set_metadata(model, {"overflow": overflow, "isa": isa})
    return model


def _binarizers(
    model: ov.Model, binarizers: Mapping[str, Binarizer]
) -> list[tuple[ov.Node, Binarizer]]:
    """With the placeholders that stand for them."""
    return [
        (node, binarizers[node.label])
        for node in model.get_ordered_ops()
        if isinstance(node, Placeholder) and node.label in binarizers
    ]


def _keep_names_apart(model: ov.Model) -> None:
    """Runtime graphs and reports tell nodes by name: quantizers keep theirs."""
    nodes = model.get_ops()
    taken = {n.get_friendly_name() for n in nodes if markers.marker_of(n) is not None}
    for node in nodes:
        if markers.marker_of(node) is None and node.get_friendly_name() in taken:
            node.set_friendly_name(f"original/{node.get_friendly_name()}")


def _name_reproducibly(model: ov.Model) -> None:
    """Number what OpenVINO named with a counter that goes on over the whole process."""
    numbers: dict[str, int] = {}
    for index, node in enumerate(model.get_ordered_ops()):
        name = node.get_friendly_name()
        if re.fullmatch(r"[A-Z][A-Za-z0-9]*_\d+", name):
            node.set_friendly_name(f"{node.get_type_name()}_{index}")
        elif expanded := re.fullmatch(r"([A-Za-z]+)(_\d+)(/.+)", name):
            operator, counter, part = expanded.groups()
            number = numbers.setdefault(operator + counter, len(numbers))
            node.set_friendly_name(f"{operator}_{number}{part}")


def _absorb_transposes(model: ov.Model, quantizers: dict[str, Quantizer]) -> None:
    """Let products transpose their quantized operands: 8-bit kernels take no Transpose in front."""
    for product in model.get_ordered_ops():
        if product.get_type_name() != "MatMul":
            continue
        flags = product.get_attributes()
        sources = product.input_values()
        for operand, flag in enumerate(("transpose_a", "transpose_b")):
            placeholder = sources[operand].get_node()
            if not isinstance(placeholder, Placeholder):
                continue
            if quantizers[placeholder.label].kind != "operand":
                continue
            straight = quantizer_graphs.without_last_swap(placeholder.input_value(0).get_node())
            if straight is not None and len(placeholder.output(0).get_target_inputs()) == 1:
                quantizer = replace(quantizers[placeholder.label], transposed=True)
                quantizers[placeholder.label] = quantizer
                moved = Placeholder([straight], placeholder.label)
                sources[operand] = moved.output(0)
                flags[flag] = not flags[flag]
        if any(new != old for new, old in zip(sources, product.input_values(), strict=True)):
            absorbed = ops.matmul(*sources, flags["transpose_a"], flags["transpose_b"])
            absorbed.set_friendly_name(product.get_friendly_name())
            redirect(product.output(0), absorbed.output(0))


def _replace_placeholders(
    model: ov.Model,
    quantizers: dict[str, Quantizer],
    overflow: grid.Overflow,
    linear_in_float: bool,
) -> None:
    placeholders = [node for node in model.get_ordered_ops() if isinstance(node, Placeholder)]
    in_float = inexact_in_int8(model, quantizers) if overflow == "safe" else set()
    if linear_in_float:
        in_float |= _inputs_of_linear_layers(model, quantizers)
        in_float |= {n.label for n in placeholders if _source_type(n) == "Softmax"}
    # All decisions come first: they look at the placeholders around.
    forms = [_form(node, quantizers, in_float) for node in placeholders]
    for node, form in zip(placeholders, forms, strict=True):
        quantizer, source = quantizers[node.label], node.input_value(0)
        if form is _Form.ACTIVATION:
            if transform_of(node) is not None:
                source = quantizer_graphs.apart(source, quantizer)
            codes = quantizer_graphs.encode(source, quantizer)
            # Queries, keys and values are moved as bytes all the same; the softmax map stays in its kernel.
            operand = linear_in_float and quantizer.kind == "operand"
            values = quantizer_graphs.decode(codes, quantizer, in_float=operand)
            redirect(node.output(0), values)
        elif form is _Form.ELEMENTWISE:
            redirect(node.output(0), quantizer_graphs.elementwise(source, quantizer))
        else:
            values, replaced = source.get_node().data, _after_reshape(node)
            shape, int8 = tuple(replaced.get_shape()), form is _Form.INT8_WEIGHT
            redirect(replaced, quantizer_graphs.weight(values, quantizer, shape, int8=int8))


def _source_type(node: Placeholder) -> str:
    return str(node.input_value(0).get_node().get_type_name())


def _inputs_of_linear_layers(model: ov.Model, quantizers: dict[str, Quantizer]) -> set[str]:
    """Labels of their quantizers."""
    sources = [
        markers.origin(node.input_value(0))
        for node in model.get_ordered_ops()
        if node.get_type_name() == "MatMul"
    ]
    labels = {node.label for node in sources if isinstance(node, Placeholder)}
    return {label for label in labels if quantizers[label].kind == "activation"}


def _form(node: Placeholder, quantizers: dict[str, Quantizer], in_float: set[str]) -> _Form:
    quantizer, constant = quantizers[node.label], _source_type(node) == "Constant"
    if quantizer.kind != "weight":
        fits_bytes = quantizer.lower.size == 1 and not constant and node.label not in in_float
        if fits_bytes and _feeds_products_only(node.output(0)):
            return _Form.ACTIVATION
        return _Form.ELEMENTWISE
    if not constant:
        return _Form.ELEMENTWISE
    replaced = _after_reshape(node)
    shape = node.input_value(0).get_shape()
    scales = quantizer_graphs.per_row(quantizer.step, tuple(shape), tuple(replaced.get_shape()))
    rows = {axis for axis, size in enumerate(scales.shape) if size > 1}
    for port in replaced.get_target_inputs():
        product = port.get_node()
        if product.get_type_name() not in markers.PRODUCTS or port.get_index() != 1:
            return _Form.FLOAT_WEIGHT
        source = markers.origin(product.input_value(0))
        if (
            not rows <= markers.output_channel_axes(product)
            or not isinstance(source, Placeholder)
            or _form(source, quantizers, in_float) is not _Form.ACTIVATION
        ):
            return _Form.FLOAT_WEIGHT
    return _Form.INT8_WEIGHT


def _feeds_products_only(values: ov.Output) -> bool:
    """Whether all uses are products with a constant or with something else quantized, or sums of rows."""
    for port in values.get_target_inputs():
        node = port.get_node()
        if markers.only_rearranges(node):
            if not _feeds_products_only(node.output(0)):
                return False
        elif node.get_type_name() == "ReduceSum":
            continue
        elif node.get_type_name() in markers.PRODUCTS:
            other = markers.origin(node.input_value(1 - port.get_index()))
            if not (isinstance(other, Placeholder) or _is_constant(other)):
                return False
        else:
            return False
    return True


def _is_constant(node: ov.Node) -> bool:
    return bool(node.get_type_name() == "Constant")


def _after_reshape(node: Placeholder) -> ov.Output:
    """Grouped convolutions reshape their weight; the packed codes take that shape at once."""
    consumers = [port.get_node() for port in node.output(0).get_target_inputs()]
    if len(consumers) == 1 and consumers[0].get_type_name() == "Reshape":
        reshaped = consumers[0].output(0)
        if reshaped.get_partial_shape().is_static:
            return reshaped
    return node.output(0)
