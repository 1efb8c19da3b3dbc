"""Sums of two neighbouring products, which int8 kernels keep in 16 bits on CPUs without VNNI.

Kernels for SSE4.1, AVX2 and AVX-512 multiply unsigned by signed bytes and add pairs of products in int16,
saturating; signed inputs are shifted by 128 first. Which entries of a row are neighbours is the kernel's
choice: the bounds here hold for any two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from condiquant_openvino.markers import (
    EXITS,
    PRODUCTS,
    Role,
    encoder_of,
    only_rearranges,
    origin,
    output_channel_axes,
    role_of,
)
from condiquant_openvino.running.reading import core_of_process
from condiquant_openvino.writing.quantizer_graphs import Quantizer

LARGEST_SUM = 2**15 - 1
_SHIFT = 128


def largest_pair_sum(inputs: tuple[int, int], rows: NDArray[Any]) -> int:
    """Largest magnitude of two products of one sign.

    Args:
        inputs: lowest and highest integer of the first factor.
        rows: integers of the second factor, ``(rows, entries)``; two of a row may be neighbours.
    """
    low, high = inputs
    byte = high + _SHIFT if low < 0 else high
    sides = [np.sort(side.clip(min=0), 1)[:, -2:].sum(1) for side in (rows, -rows)]
    return byte * int(np.max(sides))


def inexact_in_int8(model: ov.Model, quantizers: Mapping[str, Quantizer]) -> set[str]:
    """Labels of quantizers of activations of which an int8 product may be wrong on some CPU.

    It may overflow; and deconvolutions of signed inputs halve their weights with AVX-512 without VNNI,
    which takes even ones only.

    Args:
        model: has a node with the quantizer's ``label`` in the place of each.
    """
    found: set[str] = set()
    for product in _products(model):
        nodes = [origin(value) for value in product.input_values()[:2]]
        factors = [quantizers.get(getattr(node, "label", "")) for node in nodes]
        first, second = factors
        if first is None or second is None or first.lower.size > 1:
            continue
        constant = nodes[1].input_value(0).get_node()
        if constant.get_type_name() == "Constant":
            rows = _rows(second.integers(constant.data), product)
        else:
            rows = _any_two(second.extent())
        halved = product.get_type_name() == "ConvolutionBackpropData" and first.is_signed
        if largest_pair_sum(first.extent(), rows) > LARGEST_SUM or (halved and (rows % 2).any()):
            found |= {q.label for q in factors if q is not None and q.kind != "weight"}
    return found


def largest_pair_sums(ir: ov.Model) -> dict[str, int]:
    """Of every int8 product of a written IR, by its friendly name, from the integers that it holds."""
    products = _products(ir)
    weights = {
        node.get_friendly_name(): node
        for product in products
        if role_of(node := origin(product.input_value(1))) is Role.MAIN
    }
    integers = _weight_integers(weights)
    sums = {}
    for product in products:
        first, second = (origin(value) for value in product.input_values()[:2])
        inputs, name = _input_extent(first), second.get_friendly_name()
        if name in integers:
            rows = _rows(integers[name], product)
        elif name not in weights and (others := _input_extent(second)) is not None:
            rows = _any_two(others)
        else:
            continue
        if inputs is not None:
            sums[product.get_friendly_name()] = largest_pair_sum(inputs, rows)
    return sums


def _products(model: ov.Model) -> list[ov.Node]:
    return [node for node in model.get_ordered_ops() if node.get_type_name() in PRODUCTS]


def _rows(integers: NDArray[Any], product: ov.Node) -> NDArray[Any]:
    """By output channel; all in one row where they come rearranged."""
    axes = sorted(output_channel_axes(product))
    source = product.input_value(1)
    while source.get_node().get_type_name() == "Reshape":
        source = source.get_node().input_value(0)
    if only_rearranges(source.get_node()):
        return integers.reshape(1, -1)
    shaped = integers.reshape(tuple(product.input_value(1).get_shape()))
    moved = np.moveaxis(shaped, axes, range(len(axes)))
    return moved.reshape(int(np.prod(moved.shape[: len(axes)])), -1)


def _any_two(extent: tuple[int, int]) -> NDArray[Any]:
    # No int8 kernel takes an unsigned second factor that is no weight.
    return np.array([[*extent, *extent]]) if extent[0] < 0 else np.zeros((1, 1), int)


def _input_extent(exit_node: ov.Node) -> tuple[int, int] | None:
    """Of the bytes that a quantizer of activations gives; None for floats."""
    if role_of(exit_node) not in EXITS or (encoder := encoder_of(exit_node)) is None:
        return None
    low, high = (encoder.input_value(i).get_node().data for i in (3, 4))
    return int(low.min()), int(high.max())


def _weight_integers(weights: Mapping[str, ov.Node]) -> dict[str, NDArray[Any]]:
    """Of weights by name; nothing for one in float form."""
    integers = {
        name: node.input_value(0)
        for name, node in weights.items()
        if node.input_value(0).get_node().get_type_name() == "Convert"
    }
    if not integers:
        return {}
    compiled = core_of_process().compile_model(ov.Model(list(integers.values()), []), "CPU")
    found = compiled([]).to_tuple()
    return {name: values.astype(int) for name, values in zip(integers, found, strict=True)}
