"""Gradients of what rounds: straight through the rounding, by hand and in few passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from condiquant_plugin.uniform import grid

_EDGE = 1e-3
"""Of a step: what is this far outside counts as inside, where rounding would decide."""


class StraightThrough(torch.autograd.Function):
    """Clip, then round straight through (2DQuant, section 3.1).

    With ``step = (upper - lower) / (L - 1)``: dy/dx is 1 inside the bounds and 0 outside; the rounding
    residue reaches the step everywhere, and a bound gets the whole gradient of what it clips.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lower: Tensor,
        step: Tensor,
        zero: Tensor,
        bits: int,
        refinement: int,
    ) -> Tensor:
        snapped = grid.SnappedGrid(lower, step, bits, zero, refinement)
        values = snapped.quantize(x)
        if any(ctx.needs_input_grad):
            # Both are kept by the operators around anyway; codes and masks would not be.
            ctx.save_for_backward(x, values, lower, step)
            ctx.last_code = snapped.last_code
        return values

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        x, values, lower, step = ctx.saved_tensors
        if lower.ndim == 0:
            edges = (float(lower - _EDGE * step), float(lower + (ctx.last_code + _EDGE) * step))
            grad_x = torch.ops.aten.hardtanh_backward(grad, x, *edges)
        else:
            position = (x - lower).div_(step)
            grad_x = torch.ops.aten.hardtanh_backward(grad, position, -_EDGE, ctx.last_code + _EDGE)
        # Of what is rounded the residue counts, of what is clipped the code: (y - lower) / step.
        clipped = _sum_to(grad, lower) - _sum_to(grad_x, lower)
        moved = _inner(grad, values, lower) - _inner(grad_x, x, lower)
        return grad_x, clipped, (moved - lower * clipped) / step, None, None, None


def _sum_to(value: Tensor, like: Tensor) -> Tensor:
    return value.sum_to_size(like.shape) if like.ndim else value.sum()


def _inner(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """Sum of ``a * b`` over what is broadcast; one pass for a single pair of bounds."""
    if like.ndim:
        return (a * b).sum_to_size(like.shape)
    if a.stride() == b.stride() and torch.ops.aten.is_non_overlapping_and_dense(a):
        return torch.dot(*(t.as_strided((t.numel(),), (1,)) for t in (a, b)))
    return torch.dot(a.reshape(-1), b.reshape(-1))


class RowsStraightThrough(torch.autograd.Function):
    """Of softmax maps by row: round ``x`` over the largest entry of its row, then divide by what is left.

    With levels from 0 on the step cancels, so codes are divided by their sum. As in
    :class:`StraightThrough` dy/dx is 1 up to the upper bound and 0 above, where ``y`` is what is rounded,
    and the largest entry counts as a constant: the sum takes out what it divides by.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, last_code: int) -> Tensor:
        largest = x.amax(-1, keepdim=True)
        codes = (x * (1 / (step * largest))).round_().clamp_max_(last_code)
        total = codes.sum(-1, keepdim=True)
        values = codes.div_(total)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(x, values, step, largest, total)
            ctx.last_code = last_code
        return values

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        x, values, step, largest, total = ctx.saved_tensors
        mean = (grad * values).sum(-1, keepdim=True)
        grad_x = (grad - mean).mul_(1 / (step * largest * total))
        grad_x.masked_fill_(x > (ctx.last_code + _EDGE) * step * largest, 0)
        # Values of a row keep their sum, so of the step's gradient the residue's share of inputs is left.
        return grad_x, -_inner(grad_x, x, step) / step, None
