"""Chains of Reshape and Transpose as one Transpose between two Reshapes.

Window attention partitions, shifts and splits heads in many small steps; each Transpose moves all data.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd, prod

import numpy as np
import openvino as ov
import openvino.opset13 as ops

from condiquant_openvino.markers import constant_values

_VIEWS = {"Reshape", "Squeeze", "Unsqueeze"}


@dataclass
class _Factor:
    """Part of an axis of the chain's input."""

    size: int


def collapse(model: ov.Model) -> None:
    """Simplify every chain of a static shape, in place."""
    for node in reversed(model.get_ordered_ops()):
        chain = _chain_ending_at(node)
        transposes = sum(n.get_type_name() == "Transpose" for n in chain)
        if not transposes or (len(chain) == 1 and not _feeds_product(node)):
            continue
        result = _collapsed(chain)
        if result is not None:
            result.get_node().set_friendly_name(node.get_friendly_name())
            for port in node.output(0).get_target_inputs():
                port.replace_source_output(result)


def _chain_ending_at(node: ov.Node) -> list[ov.Node]:
    """Rearrangements from the first to ``node``; empty if ``node`` is inside a longer chain."""
    consumers = [port.get_node() for port in node.output(0).get_target_inputs()]
    if not _is_static_rearrangement(node) or not consumers:
        return []
    if len(consumers) == 1 and _is_static_rearrangement(consumers[0]):
        return []
    chain = [node]
    above = node.input_value(0)
    while _is_static_rearrangement(above.get_node()) and len(above.get_target_inputs()) == 1:
        chain.append(above.get_node())
        above = above.get_node().input_value(0)
    return chain[::-1]


def _is_static_rearrangement(node: ov.Node) -> bool:
    if node.get_type_name() not in {*_VIEWS, "Transpose"}:
        return False
    if node.get_output_element_type(0) not in (ov.Type.i8, ov.Type.u8):
        return False
    shapes = node.get_input_partial_shape(0), node.get_output_partial_shape(0)
    return all(s.is_static for s in shapes) and constant_values(node.input_value(1)) is not None


def _feeds_product(node: ov.Node) -> bool:
    """Whether a node gives the integers of a product's operand; a bare Transpose would be made float."""
    consumers = [port.get_node() for port in node.output(0).get_target_inputs()]
    return bool(consumers) and all(
        n.get_type_name() == "Convert" and n.get_output_element_type(0) == ov.Type.f32
        for n in consumers
    )


def _collapsed(chain: list[ov.Node]) -> ov.Output | None:
    source, last = chain[0].input_value(0), chain[-1]
    factors = [_Factor(size) for size in source.get_shape()]
    axes = [[factor] for factor in factors]
    for node in chain:
        if node.get_type_name() == "Transpose":
            permutation = constant_values(node.input_value(1))
            assert permutation is not None  # a static rearrangement
            axes = [axes[int(axis)] for axis in permutation]
        else:
            regrouped = _regroup(axes, list(node.get_output_shape(0)), factors)
            if regrouped is None:
                return None
            axes = regrouped
    moved = [factor for axis in axes for factor in axis]
    before, order = _fewest_axes(factors, moved)
    shape = list(last.get_output_shape(0))
    result = source
    if order != sorted(order):
        after = [before[axis] for axis in order]
        if _feeds_product(last) and after == shape:
            before, order, after = [1, *before], [0, *(axis + 1 for axis in order)], [1, *after]
        result = _reshape(result, before)
        result = ops.transpose(result, ops.constant(np.array(order, np.int64))).output(0)
    return _reshape(result, shape)


def _regroup(
    axes: list[list[_Factor]], shape: list[int], factors: list[_Factor]
) -> list[list[_Factor]] | None:
    """Axes of a Reshape to ``shape``; splits factors where needed, None if one cannot be split."""
    pending = [factor for axis in axes for factor in axis]
    result: list[list[_Factor]] = []
    for size in shape:
        axis: list[_Factor] = []
        missing = size
        while missing > 1:
            factor = pending.pop(0)
            if missing % factor.size:
                kept = gcd(missing, factor.size)
                if kept == 1 or factor.size % kept:
                    return None
                # The axis takes the outer part: (outer, inner) with outer = what is missing.
                if missing != kept:
                    return None
                inner = _Factor(factor.size // kept)
                place = next(i for i, known in enumerate(factors) if known is factor)
                factors.insert(place + 1, inner)
                pending.insert(0, inner)
                factor.size = kept
            axis.append(factor)
            missing //= factor.size
        result.append(axis)
    return result


def _fewest_axes(factors: list[_Factor], moved: list[_Factor]) -> tuple[list[int], list[int]]:
    """Sizes before the Transpose and its order, neighbours that stay neighbours as one axis."""
    place = {id(factor): i for i, factor in enumerate(f for f in factors if f.size > 1)}
    sequence = [place[id(factor)] for factor in moved if factor.size > 1]
    sizes = [factor.size for factor in factors if factor.size > 1]
    runs: list[list[int]] = []
    for index in sequence:
        if runs and runs[-1][-1] == index - 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    by_source = sorted(range(len(runs)), key=lambda run: runs[run][0])
    before = [prod(sizes[i] for i in runs[run]) for run in by_source]
    return before, [by_source.index(run) for run in range(len(runs))]


def _reshape(source: ov.Output, shape: list[int]) -> ov.Output:
    if list(source.get_shape()) == shape:
        return source
    return ops.reshape(source, ops.constant(np.array(shape, np.int64)), False).output(0)
