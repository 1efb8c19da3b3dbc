"""The one fake quantizer that every host inserts: learned bounds over a lattice-snapped grid.

While a model is traced it calls the operator ``condiquant::fake_quantize``, which exporters translate.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condiquant_plugin.errors import check_finite
from condiquant_plugin.uniform import bounds, grid
from condiquant_plugin.uniform.bits import FLOAT_BITS
from condiquant_plugin.uniform.sampling import First, Sample
from condiquant_plugin.uniform.straight_through import RowsStraightThrough, StraightThrough


@torch.library.custom_op("condiquant::fake_quantize", mutates_args=())
def fake_quantize_op(
    x: Tensor,
    lower: Tensor,
    step: Tensor,
    zero: Tensor,
    bits: int,
    kind: str,
    name: str,
    refinement: int,
) -> Tensor:
    """Traceable form of the quantizer.

    ``lower``, ``step``, ``zero`` (int32), ``bits`` and ``refinement`` are a
    :class:`condiquant_plugin.uniform.grid.SnappedGrid`; ``name`` labels the quantizer in reports.
    """
    return grid.SnappedGrid(lower, step, bits, zero, refinement).quantize(x)


@fake_quantize_op.register_fake
def _(
    x: Tensor,
    lower: Tensor,
    step: Tensor,
    zero: Tensor,
    bits: int,
    kind: str,
    name: str,
    refinement: int,
) -> Tensor:
    return torch.empty_like(x)


class FakeQuantizer(nn.Module):
    """Quantizes to a ``bits``-bit grid whose bounds are parameters, of softmax maps the upper one alone.

    The bounds are those the optimiser moves; what is computed uses them snapped to the lattice of
    :mod:`condiquant_plugin.uniform.grid`, with a straight-through gradient.

    Args:
        bits: 2 to 8; of 8, operands keep 7 where ``overflow`` is ``"safe"``. With
            :data:`condiquant_plugin.uniform.bits.FLOAT_BITS` it passes on what it gets.
        kind: decides the lattice; an ``"operand"`` is a factor of a product of activations.
        row_blocks: number of equal blocks of rows along ``axis``, each with bounds of its own: 1 is
            per tensor, 3 serves a fused qkv, the number of rows is per channel.
        axis: the output-channel axis of a weight.
        side: how :func:`condiquant_plugin.uniform.bounds.search` shrinks the range.
        name: label in error messages and exported graphs.
        zero_on_grid: zero is one of the levels, and weights are symmetric, as NPUs need it.
        overflow: see :data:`condiquant_plugin.uniform.grid.Overflow`.
        transforms: number of features of an input that first, quantized or not, becomes
            ``matrix x + shift``, as :mod:`condiquant_plugin.methods.alignment` sets them along with the
            weight behind; 0 leaves inputs as they are.
        softmax: what comes is a softmax map, and each row gets a scale of its own: its largest entry is
            1 when it is rounded, and what rounding leaves is divided by its sum.
    """

    def __init__(
        self,
        bits: int,
        kind: grid.Kind,
        *,
        row_blocks: int = 1,
        axis: int = 0,
        side: bounds.Side = "symmetric",
        name: str = "",
        zero_on_grid: bool = False,
        overflow: grid.Overflow = grid.DEFAULT_OVERFLOW,
        transforms: int = 0,
        softmax: bool = False,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.row_blocks, self.axis, self.side, self.name = row_blocks, axis, side, name
        self.zero_on_grid, self.overflow = zero_on_grid, overflow
        self.transforms, self.softmax = transforms, softmax
        self.set_bits(bits)
        self.matrix: Tensor | None
        self.register_buffer("matrix", torch.eye(transforms) if transforms else None)
        self.shift: Tensor | None
        self.register_buffer("shift", torch.zeros(transforms) if transforms else None)
        shape = () if row_blocks == 1 else (row_blocks,)
        self.lower: Tensor
        if softmax:  # with levels below 0 a row's sum could vanish
            self.register_buffer("lower", torch.zeros(shape))
        else:
            self.lower = nn.Parameter(torch.zeros(shape))
        self.upper = nn.Parameter(torch.ones(shape))
        self.enabled = True
        self.search_on_next_input = False
        self.sample: Sample | First | None = None
        self._learned: grid.SnappedGrid | None = None

    def set_bits(self, bits: int) -> None:
        """Set the bits, as the constructor takes them."""
        is_float = bits == FLOAT_BITS
        self.bits = bits if is_float else grid.fitting_bits(bits, self.kind, self.overflow)

    @torch.no_grad()
    def set_bounds(self, lower: Tensor | float, upper: Tensor | float) -> None:
        """Set both bounds (shape ``()`` or ``(row_blocks,)``); of softmax maps by row the upper one."""
        if not self.softmax:
            self.lower.copy_(torch.as_tensor(lower, dtype=self.lower.dtype))
        self.upper.copy_(torch.as_tensor(upper, dtype=self.upper.dtype))

    @torch.no_grad()
    def set_transform(self, matrix: Tensor, shift: Tensor) -> None:
        """Set what becomes of an input: shapes ``(transforms, transforms)`` and ``(transforms,)``."""
        self.get_buffer("matrix").copy_(matrix)
        self.get_buffer("shift").copy_(shift)

    def search_bounds(self, x: Tensor) -> None:
        """DOBI on ``x`` (2DQuant, algorithm 1).

        Raises:
            InputError: if ``x`` has NaN or Inf; names this quantizer.
        """
        check_finite(x, f"the {self.kind} of {self.name or 'a quantizer'}")
        if self.in_float:
            return
        rows = x.detach().reshape(1, -1) if self.row_blocks == 1 else self._block_rows(x.detach())
        found = bounds.search(
            rows,
            self.bits,
            self.kind,
            side=self.side,
            zero_on_grid=self.zero_on_grid,
            overflow=self.overflow,
        )
        self.set_bounds(found.lower.view_as(self.lower), found.upper.view_as(self.upper))
        self.set_bounds(*self._fitting_bounds(x.detach()))

    @property
    def in_float(self) -> bool:
        """Whether its layer takes floats: it has no grid, and is there to be watched."""
        return self.bits == FLOAT_BITS

    @property
    def depends_on_weight(self) -> bool:
        """Whether the grid is widened as what is quantized needs it."""
        return grid.needs_smallest_step(self.bits, self.kind, self.overflow)

    def _fitting_bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The bounds, wide enough for ``x`` that no pair of products overflows."""
        if not self.depends_on_weight:
            return self.lower, self.upper
        rows = x.detach().movedim(self.axis, 0).reshape(x.shape[self.axis], -1)
        smallest = grid.smallest_step(rows)
        smallest = smallest.reshape(self.row_blocks, -1).amax(1).view_as(self.lower)
        step = (self.upper - self.lower) / (2**self.bits - 1)
        factor = (smallest / step.detach().clamp_min(grid.SMALLEST_STEP)).clamp_min(1)
        return self.lower * factor, self.upper * factor

    @property
    def _lattice_keys(self) -> tuple[int, grid.Kind, bool, grid.Overflow]:
        return self.bits, self.kind, self.zero_on_grid, self.overflow

    def snapped(self, x: Tensor | None = None) -> grid.SnappedGrid:
        """The grid that is computed with; tensors of shape ``()`` or ``(row_blocks,)``.

        Args:
            x: what is quantized; an 8-bit weight may need a wider grid than at its last search.
        """
        lower, upper = (self.lower, self.upper) if x is None else self._fitting_bounds(x)
        lower, upper = lower.detach(), upper.detach()
        return grid.snap(lower, upper, *self._lattice_keys)

    def levels_of(self, x: Tensor) -> grid.SnappedGrid:
        """The grid of every entry of ``x``: tensors broadcast against it."""
        levels = self.snapped(x).map(lambda t: self.spread(t, x))
        if not self.depends_on_weight:
            return levels
        moved = x.detach().movedim(self.axis, 0)
        rows, step = moved.flatten(1), levels.step.expand_as(x).movedim(self.axis, 0).flatten(1)
        below, above = (
            grid.pair_limits(side.clamp_min(0), step[:, :1]).view_as(moved).movedim(0, self.axis)
            for side in (-rows, rows)
        )
        return replace(levels, limits=(-below, above))

    def transformed(self, x: Tensor) -> Tensor:
        """What is rounded of an input, features last."""
        if self.softmax:
            return x / x.amax(-1, keepdim=True)
        if self.matrix is None or self.shift is None:
            return x
        return F.linear(x, self.matrix.to(x.dtype), self.shift.to(x.dtype))

    def finished(self, rounded: Tensor) -> Tensor:
        """What a product gets of what :meth:`transformed` gave and rounding left."""
        return rounded / rounded.sum(-1, keepdim=True) if self.softmax else rounded

    def forward(self, x: Tensor) -> Tensor:
        # NNCF looks at every function of torch's that a network calls, and at ours for nothing.
        with torch._C.DisableTorchFunction():
            return self._by_row(x) if self.softmax else self._quantized(self.transformed(x))

    def _by_row(self, x: Tensor) -> Tensor:
        if self.sample is not None or self.search_on_next_input:
            self._watch(self.transformed(x))
        if not self._rounds:
            return x
        if torch.jit.is_tracing():
            return self.finished(self._traced(self.transformed(x)))
        learned = self._grid_of(x)
        result: Tensor = RowsStraightThrough.apply(
            self._precise(x), learned.step, learned.last_code
        )
        return result.to(x.dtype)

    def _quantized(self, x: Tensor) -> Tensor:
        self._watch(x)
        if not self._rounds:
            return x
        if torch.jit.is_tracing():
            return self._traced(x)
        learned = self._grid_of(x)
        result: Tensor = StraightThrough.apply(
            self._precise(x),
            learned.lower,
            learned.step,
            learned.zero,
            learned.bits,
            learned.refinement,
        )
        return result.to(x.dtype)

    @property
    def _rounds(self) -> bool:
        return self.enabled and not self.in_float

    def _watch(self, x: Tensor) -> None:
        if self.sample is not None:
            self.sample.add(x)
        elif self.search_on_next_input:
            self.search_bounds(x)
            self.search_on_next_input = False

    def _grid_of(self, x: Tensor) -> grid.SnappedGrid:
        """Of what is rounded, with a gradient, broadcastable against it."""
        learned = self._learned
        if learned is None:
            lower, upper = self._fitting_bounds(x)
            learned = learned_grid(lower, upper, *self._lattice_keys)
        return learned.map(lambda t: self.spread(t, x))

    def _precise(self, x: Tensor) -> Tensor:
        """Half precision, of autocast or of the model, cannot tell 8-bit levels apart."""
        return x.to(torch.promote_types(x.dtype, self.lower.dtype))

    def _traced(self, x: Tensor) -> Tensor:
        learned = self._grid_of(x)
        result: Tensor = fake_quantize_op(
            x,
            torch.tensor(learned.lower.tolist()),
            torch.tensor(learned.step.tolist()),
            torch.tensor(learned.zero.int().tolist(), dtype=torch.int32),
            learned.bits,
            self.kind,
            self.name,
            learned.refinement,
        )
        return result

    def _block_rows(self, x: Tensor) -> Tensor:
        """``x`` as ``(row_blocks, entries per block)``."""
        return x.movedim(self.axis, 0).reshape(self.row_blocks, -1)

    def spread(self, bound: Tensor, x: Tensor) -> Tensor:
        """A bound per row of ``x``, broadcastable against it."""
        if self.row_blocks == 1:
            return bound
        rows = bound.repeat_interleave(x.shape[self.axis] // self.row_blocks)
        return rows.view([-1 if i == self.axis % x.ndim else 1 for i in range(x.ndim)])

    def extra_repr(self) -> str:
        return (
            f"{self.kind}, bits={self.bits}, row_blocks={self.row_blocks}, side={self.side!r}, "
            f"zero_on_grid={self.zero_on_grid}, overflow={self.overflow!r}, transforms={self.transforms}, "
            f"softmax={self.softmax}"
        )


def learned_grid(
    lower: Tensor,
    upper: Tensor,
    bits: int,
    kind: grid.Kind,
    zero_on_grid: bool,
    overflow: grid.Overflow,
) -> grid.SnappedGrid:
    """The snapped grid of bounds of any shape, with a gradient as if it were not snapped."""
    step = ((upper - lower) / (2**bits - 1)).clamp_min(grid.SMALLEST_STEP)
    snapped = grid.snap(lower.detach(), upper.detach(), bits, kind, zero_on_grid, overflow)
    return replace(snapped, lower=lower + (snapped.lower - lower).detach(), step=step)


@contextmanager
def snapped_together(model: nn.Module) -> Iterator[None]:
    """The grids of all fake quantizers, made at once for the forward passes inside the block.

    The bounds must not change inside. Saves some thirty small operators for each quantizer.
    """
    alike: dict[Any, list[FakeQuantizer]] = defaultdict(list)
    for quantizer in fake_quantizers(model).values():
        if quantizer.enabled and not (quantizer.in_float or quantizer.depends_on_weight):
            alike[quantizer._lattice_keys, quantizer.lower.device].append(quantizer)
    for (keys, _), quantizers in alike.items():
        lower, upper = (
            torch.cat([getattr(q, end).reshape(-1) for q in quantizers])
            for end in ("lower", "upper")
        )
        learned = learned_grid(lower, upper, *keys)
        sizes = [q.lower.numel() for q in quantizers]
        parts = (t.split(sizes) for t in (learned.lower, learned.step, learned.zero))
        for quantizer, low, step, zero in zip(quantizers, *parts, strict=True):
            quantizer._learned = replace(learned, lower=low, step=step, zero=zero).map(
                lambda t, like=quantizer.lower: t.view_as(like)  # type: ignore[misc]
            )
    try:
        yield
    finally:
        for quantizers in alike.values():
            for quantizer in quantizers:
                quantizer._learned = None


def fake_quantizers(model: nn.Module) -> dict[str, FakeQuantizer]:
    """Every fake quantizer of a model by module name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, FakeQuantizer)}
