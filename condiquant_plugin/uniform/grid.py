"""The quantization grid: levels, bounds, codes, and the 8-bit lattice that int8 kernels can hold.

A ``bits``-bit grid has ``L = 2**bits`` levels ``lower + code * step`` with ``code`` in ``[0, L-1]`` and
``step = (upper - lower) / (L-1)``, the quantizer of 2DQuant (arXiv 2406.06649, equation 1).

8-bit kernels compute with integers whose zero is exact. A low-bit grid fits them when it lies on a
*lattice*: ``level = (refinement * code - zero) * step / refinement`` with an integer ``zero``.
Snapping leaves ``step`` alone and moves ``lower`` by at most ``step / refinement`` where zero lies
inside the bounds, so what is simulated with snapped bounds is what an 8-bit kernel computes. Bounds that
exclude zero slide until they touch it.

Kernels of CPUs without VNNI add pairs of products in 16 bits, where ``255 * (127 + 127)`` does not fit.
With ``overflow="safe"`` weights below 8 bits and operands of attention keep to 7-bit integers, and 8-bit
weights have a step at which no two codes of a row come to more than 128 (:func:`smallest_step`): with any
byte as the other factor, signed ones shifted by 128 as kernels do, no pair exceeds ``255 * 128``.

Hardware that knows only one scale and one zero for a tensor (NPUs) needs zero *on the grid*: there the
lattice is the grid itself, and weights are symmetric.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from condiquant_plugin.errors import InputError, check_choice

MIN_BITS, MAX_BITS = 2, 8
SMALLEST_STEP = 1e-12

Kind = Literal["weight", "activation", "operand"]
Overflow = Literal["safe", "vnni"]
"""``"safe"``: exact on every x86-64 CPU. ``"vnni"``: all 8 bits of every integer, exact only where kernels
sum in 32 bits (AVX-VNNI, AVX-512 VNNI, AMX)."""
DEFAULT_OVERFLOW: Overflow = "safe"
_LARGEST_PAIR = 128
"""Of two codes of one sign that are multiplied with bytes up to 255 and added in int16."""
_SPARE = 1e-6
"""Of a range: what rounding in float32 may add."""


def check_bits(bits: int, name: str = "bits") -> int:
    """Return ``bits`` if it is an integer in [2, 8].

    Raises:
        InputError: naming ``name`` and the value.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
        raise InputError(f"{name}={bits!r} is not supported: use an integer from 2 to 8")
    return bits


def fitting_bits(bits: int, kind: Kind, overflow: Overflow = DEFAULT_OVERFLOW) -> int:
    """Bits of a grid whose levels kernels can hold: 7 for 8-bit operands where safe.

    >>> fitting_bits(8, "operand"), fitting_bits(8, "weight"), fitting_bits(8, "operand", "vnni")
    (7, 8, 8)
    """
    check_choice("overflow", overflow, get_args(Overflow))
    return min(check_bits(bits), 7 if kind == "operand" and overflow == "safe" else MAX_BITS)


def _half_range(bits: int, kind: Kind, overflow: Overflow) -> int:
    """Signed integers go from minus this to one less than this."""
    has_all_bits = kind == "activation" or overflow == "vnni" or bits == MAX_BITS
    return 128 if has_all_bits else 64


def needs_smallest_step(bits: int, kind: Kind, overflow: Overflow) -> bool:
    """Whether pairs of codes may overflow at a step below :func:`smallest_step`."""
    return bits == MAX_BITS and kind == "weight" and overflow == "safe"


def smallest_step(rows: Tensor) -> Tensor:
    """Step from which on no two 8-bit codes of a row, of one sign, come to more than 128.

    Args:
        rows: entries by output channel, shape ``(rows, entries)``.

    Returns:
        Shape ``(rows,)``.

    >>> smallest_step(torch.tensor([[100.0, -1, 27], [-60, 50, -67]]))
    tensor([1., 1.])
    """
    two = min(2, rows.shape[1])
    largest = [side.clamp_min(0).topk(two, 1).values.sum(1) for side in (rows, -rows)]
    # Rounding adds up to a half to each of the two.
    return torch.maximum(*largest) / (_LARGEST_PAIR - 1)


def pair_limits(rows: Tensor, step: Tensor) -> Tensor:
    """How large each entry may become at a step, so that no two of a row come to more than 128 codes.

    The largest entry of a row keeps what it has, at least half of what there is for both; the rest is for
    each of the others.

    Args:
        rows: entries of one sign by output channel, shape ``(rows, entries)``; 0 for those of the other.
        step: at least :func:`smallest_step`, shape ``(rows, 1)``.

    Returns:
        Values, in the shape of ``rows``.

    >>> pair_limits(torch.tensor([[100.0, 0, 27], [60, 50, 0]]), torch.ones(2, 1)).round(decimals=1)
    tensor([[100.0000,  27.0000,  27.0000],
            [ 63.5000,  63.5000,  63.5000]])
    """
    room = step * ((_LARGEST_PAIR - 1) * (1 - _SPARE))
    largest, place = rows.max(1, keepdim=True)
    largest = torch.maximum(largest, room / 2)
    return (room - largest).clamp_min(0).expand_as(rows).scatter(1, place, largest)


@dataclass(frozen=True)
class Lattice:
    """Integers of an 8-bit kernel onto which a low-bit grid is laid."""

    refinement: int
    """Lattice steps in one grid step."""
    lowest_zero: int
    """Smallest position of zero, counted in lattice steps from the lower bound."""
    highest_zero: int
    """Largest position of zero; zero always lies in ``[lower, upper]``."""
    zero_spacing: int = 1
    """Allowed positions of zero are ``lowest_zero`` plus multiples of it."""

    @property
    def zero_is_free(self) -> bool:
        """Whether zero may be anywhere between its limits."""
        return self.zero_spacing == 1 and self.lowest_zero < self.highest_zero


def lattice(
    bits: int,
    kind: Kind,
    zero_on_grid: bool = False,
    overflow: Overflow = DEFAULT_OVERFLOW,
) -> Lattice:
    """The finest lattice whose every level fits a kernel's signed integers with zero at the integer 0.

    8-bit kernels subtract a zero point in float32, where a wide range cancels, or refuse one (products
    of two activations, whose factors are the operands). With as many bits as the integers have the
    lattice is the grid; zero of a weight is then in the middle, and of other tensors in the middle or,
    where they are unsigned, at the lower end.

    Args:
        zero_on_grid: the lattice is the grid itself, and zero is code ``2**(bits-1)`` of a weight.

    Raises:
        InputError: more bits than :func:`fitting_bits`.

    >>> lattice(4, "activation")
    Lattice(refinement=8, lowest_zero=0, highest_zero=120, zero_spacing=1)
    >>> lattice(8, "activation")
    Lattice(refinement=1, lowest_zero=0, highest_zero=128, zero_spacing=128)
    >>> lattice(4, "weight")
    Lattice(refinement=4, lowest_zero=0, highest_zero=60, zero_spacing=1)
    >>> lattice(4, "weight", zero_on_grid=True)
    Lattice(refinement=1, lowest_zero=8, highest_zero=8, zero_spacing=1)
    """
    if (fitting := fitting_bits(bits, kind, overflow)) < bits:
        raise InputError(
            f"{bits}-bit integers of an {kind} overflow on CPUs without VNNI: use {fitting} bits, or "
            'overflow="vnni"'
        )
    last_code, half = 2**bits - 1, _half_range(bits, kind, overflow)
    if zero_on_grid and kind == "weight":
        return Lattice(1, 2 ** (bits - 1), 2 ** (bits - 1))
    refinement = 1 if zero_on_grid else max((half - 1) // last_code, 1)
    span = refinement * last_code
    if 2**bits == 2 * half and kind != "weight":
        return Lattice(refinement, 0, half, zero_spacing=half)
    return Lattice(refinement, max(0, span - half + 1), min(half, span))


@dataclass(frozen=True)
class Grid:
    """Equally spaced levels, anywhere: the quantizer of 2DQuant.

    Tensors have one shape, which broadcasts against what is quantized.
    """

    lower: Tensor
    step: Tensor
    bits: int

    @property
    def last_code(self) -> int:
        """Codes go from 0 to this."""
        return int(2**self.bits - 1)

    @property
    def upper(self) -> Tensor:
        """The highest level."""
        return self.lower + self.step * self.last_code

    def positions(self, x: Tensor) -> Tensor:
        """Where entries lie, in steps from ``lower``; neither clipped nor rounded."""
        return (x - self.lower).div_(self.step)

    def codes(self, x: Tensor) -> Tensor:
        """Codes in ``[0, last_code]`` as floats, ties to even ones."""
        return self.positions(x).clamp_(0, self.last_code).round_()

    def levels(self, codes: Tensor) -> Tensor:
        """The levels that codes stand for."""
        return (codes * self.step).add_(self.lower)


@dataclass(frozen=True)
class SnappedGrid(Grid):
    """A grid on its lattice; its values are integers times the lattice step, as in an 8-bit kernel."""

    zero: Tensor
    """Position of zero in lattice steps, integer-valued, of any dtype."""
    refinement: int
    """Lattice steps in one grid step."""
    limits: tuple[Tensor, Tensor] | None = None
    """Lowest and highest value that each entry may be rounded at, where others of its row decide."""

    @property
    def lattice_step(self) -> Tensor:
        """Value of one lattice step."""
        return self.step / self.refinement

    def map(self, function: Callable[[Tensor], Tensor]) -> SnappedGrid:
        """The grid with ``function`` of each of its tensors."""
        lower, step, zero = map(function, (self.lower, self.step, self.zero))
        limits = None
        if self.limits is not None:
            limits = function(self.limits[0]), function(self.limits[1])
        return SnappedGrid(lower, step, self.bits, zero, self.refinement, limits)

    def integers(self, codes: Tensor) -> Tensor:
        """The lattice integers that codes stand for, in their place; 0 is the value 0."""
        return codes.mul_(self.refinement).sub_(self.zero)

    def values(self, codes: Tensor) -> Tensor:
        """What codes stand for, in their place: ``levels`` up to rounding, with zero exactly 0."""
        return self.integers(codes).mul_(self.lattice_step)

    def quantize(self, x: Tensor) -> Tensor:
        """Nearest value of every entry."""
        return self.values(self.codes(x))


def snap(
    lower: Tensor,
    upper: Tensor,
    bits: int,
    kind: Kind,
    zero_on_grid: bool = False,
    overflow: Overflow = DEFAULT_OVERFLOW,
) -> SnappedGrid:
    """Move ``lower`` to the lattice, keeping the step; zero is on no tie between two levels.

    Args:
        lower, upper: finite bounds of any equal shape, which the grid's tensors get; ``upper <= lower``
            gives a tiny step.
    """
    cells = lattice(bits, kind, zero_on_grid, overflow)
    step = ((upper - lower) / (2**bits - 1)).clamp_min(SMALLEST_STEP)
    position = (-lower / step * cells.refinement - cells.lowest_zero) / cells.zero_spacing
    zero = (position.round() * cells.zero_spacing + cells.lowest_zero).clamp(
        cells.lowest_zero, cells.highest_zero
    )
    # Of values that are exactly 0 there are many: none may lie on a tie, where kernels round either way.
    on_tie = 2 * (zero % cells.refinement) == cells.refinement
    zero = zero + on_tie * (1 - 2 * (position < position.round()).to(zero.dtype))
    return SnappedGrid(-zero * (step / cells.refinement), step, bits, zero, cells.refinement)
