"""Second moments of the patches of a 3x3 convolution, by way of its input's correlations.

Entry ``(tap s, tap t)`` of such a matrix sums ``a(p + s) b(p + t)^T`` over the output's positions ``p``.
Taps that are equally far apart sum the same products of channels, ``a(q) b(q + t - s)^T``, but for the rows
and columns at the rim. So instead of 81 sums there are 25 correlations; and those of small tiles are
products of their discrete Fourier transforms, of which there are far fewer than of pixels and shifts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

_WIDTH = 3
TAPS = _WIDTH**2
_REACH = _WIDTH - 1
"""Farthest shift between two taps along an axis."""
TILE = 8
_LENGTH = TILE + 2 * _REACH
"""Of a transform: a tile with all that its pixels are multiplied with."""
_SHIFTS = range(-_REACH, _REACH + 1)
_ALL = list(product(_SHIFTS, _SHIFTS))
"""Down and across."""
_OFFSETS = (-1, 0, 1)
"""Of a tap from the middle, along an axis."""
_OUTER = (-1, 1)


@dataclass(frozen=True)
class _Transforms:
    """Discrete Fourier transforms of tiles, of one of each pair of conjugate frequencies."""

    of_all: Tensor
    """Real and imaginary parts by frequency, shape ``(2 * frequencies, length**2)``."""
    of_inner: Tensor
    """Of a tile without what is around it, shape ``(2 * frequencies, tile**2)``."""
    back_real: Tensor
    """From real parts of products to correlations, shape ``(shifts, frequencies)``."""
    back_imaginary: Tensor


@cache
def _transforms(dtype: torch.dtype, device: torch.device) -> _Transforms:
    # Of a real tile the transform at minus a frequency is the conjugate, and need not be computed.
    every = list(product(range(_LENGTH), range(_LENGTH)))
    conjugates = {(f, g): (-f % _LENGTH, -g % _LENGTH) for f, g in every}
    chosen = [each for each in every if each <= conjugates[each]]
    frequencies = torch.tensor(chosen, dtype=torch.float64)
    share = [(1 if conjugates[each] == each else 2) / _LENGTH**2 for each in chosen]

    def angles(places: Iterable[tuple[int, int]]) -> Tensor:
        turns = frequencies @ torch.tensor(list(places), dtype=torch.float64).mT / _LENGTH
        return 2 * math.pi * turns

    def parts(places: Iterable[tuple[int, int]]) -> Tensor:
        found = angles(places)
        return torch.stack([found.cos(), -found.sin()], 1).flatten(0, 1).to(device, dtype)

    away = angles((down + _REACH, across + _REACH) for down, across in _ALL)
    shares = torch.tensor(share, dtype=torch.float64)[:, None]
    return _Transforms(
        parts(every),
        parts(product(range(TILE), range(TILE))),
        (shares * away.cos()).mT.to(device, dtype),
        (shares * -away.sin()).mT.to(device, dtype),
    )


class Input:
    """A batch of a convolution's inputs, which it pads with one zero all around.

    Args:
        x: shape ``(batch, channels, height, width)``.
        mean: of the channels, about; products are taken around it.
        dtype: of sums.
    """

    def __init__(self, x: Tensor, mean: Tensor, dtype: torch.dtype) -> None:
        self.count, _, self.height, self.width = x.shape
        self.reached = _reached(x.sum(0, dtype=dtype).permute(1, 2, 0).contiguous())
        """Sums of each tap's pixels that are multiplied with pixels by another, ``(9, 9, channels)``."""
        last = x.permute(0, 2, 3, 1)
        self.pixels = x.new_empty(last.shape).copy_(last).sub_(mean)
        """Around the mean, shape ``(batch, height, width, channels)``."""

    def tiles(self, at_once: int) -> Iterator[Tensor]:
        """With what is around them, shape ``(rows, columns, tiles, channels)``.

        Args:
            at_once: pixels of one yield, about.
        """
        ends = [_REACH + -size % TILE for size in (self.height, self.width)]
        lines = max(at_once // (self.width * TILE), 1) * TILE
        for images in self.pixels.split(max(at_once // (self.height * self.width), 1)):
            padded = F.pad(images, (0, 0, _REACH, ends[1], _REACH, ends[0]))
            for start in range(0, self.height, lines):
                strip = padded[:, start : start + lines + 2 * _REACH]
                tiles = strip.unfold(1, _LENGTH, TILE).unfold(2, _LENGTH, TILE)
                yield tiles.permute(4, 5, 0, 1, 2, 3).flatten(2, 4)


class PatchSums:
    """Sums of products of inputs' patches, batch by batch.

    Args:
        pairs: places of the inputs whose products are summed.
        dtype: of the sums.
        at_once: pixels that products are summed over in the inputs' own dtype.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[int, int]],
        channels: int,
        *,
        like: Tensor,
        dtype: torch.dtype,
        at_once: int,
    ) -> None:
        def zeros(*shape: int) -> list[Tensor]:
            return [like.new_zeros(shape, dtype=dtype) for _ in pairs]

        square, shifted = (channels, channels), (channels, len(_SHIFTS), channels)
        self._pairs, self._at_once = list(pairs), at_once
        self._everywhere = zeros(len(_ALL), *square)
        self._rows, self._columns = (zeros(len(_OUTER), *shifted) for _ in range(2))
        self._corners = zeros(len(_OUTER), len(_OUTER), *square)

    def add(self, inputs: Sequence[Input]) -> None:
        """A batch."""
        for tiles in zip(*(each.tiles(self._at_once) for each in inputs), strict=True):
            left = {a: _of_inner(tiles[a]) for a in {a for a, _ in self._pairs}}
            right = {b: _of_all(tiles[b]) for b in {b for _, b in self._pairs}}
            for sums, (a, b) in zip(self._everywhere, self._pairs, strict=True):
                sums += _correlations(left[a], right[b]).view_as(sums)
        height, width = inputs[0].height, inputs[0].width
        # The outer taps do not reach the row, or column, at the opposite end.
        for (place, row), (beside, column) in product(_ends(height), _ends(width)):
            for sums, (a, b) in zip(self._corners, self._pairs, strict=True):
                ours, theirs = (inputs[each].pixels[:, row, column] for each in (a, b))
                sums[place, beside] += ours.mT @ theirs
        for which, axis, size in ((self._rows, 1, height), (self._columns, 2, width)):
            for place, end in _ends(size):
                lines = [each.pixels.select(axis, end) for each in inputs]
                around = [_around(each) for each in lines]
                for sums, (a, b) in zip(which, self._pairs, strict=True):
                    sums[place] += (lines[a].flatten(0, 1).mT @ around[b]).view_as(sums[place])

    def by_taps(self, pair: int) -> Tensor:
        """Of one pair of inputs, shape ``(9, 9, channels, channels)``."""
        found = dict(zip(_ALL, self._everywhere[pair], strict=True))
        rows, columns, corners = (
            which[pair] for which in (self._rows, self._columns, self._corners)
        )
        taps = list(product(_OFFSETS, _OFFSETS))
        result = rows.new_empty(TAPS, TAPS, *corners.shape[2:])
        for (i, s), (j, t) in product(enumerate(taps), enumerate(taps)):
            down, across = (theirs - mine for mine, theirs in zip(s, t, strict=True))
            block = result[i, j].copy_(found[down, across])
            if below := (s[0] if down == 0 else 0):
                block -= rows[_OUTER.index(below), :, across + _REACH]
            if beside := (s[1] if across == 0 else 0):
                block -= columns[_OUTER.index(beside), :, down + _REACH]
            if below and beside:
                block += corners[_OUTER.index(below), _OUTER.index(beside)]
        return result


def _ends(size: int) -> list[tuple[int, int]]:
    """What each of the outer taps does not reach."""
    return [(place, 0 if outer > 0 else size - 1) for place, outer in enumerate(_OUTER)]


def _around(lines: Tensor) -> Tensor:
    """What is at every shift from the places of a line, zero outside it.

    Args:
        lines: shape ``(batch, places, channels)``.

    Returns:
        Shape ``(batch * places, shifts * channels)``.
    """
    shifted = F.pad(lines, (0, 0, _REACH, _REACH)).unfold(1, len(_SHIFTS), 1)
    return shifted.mT.flatten(2).flatten(0, 1)


def counts(height: int, width: int) -> Tensor:
    """How many pixels each tap multiplies with pixels by another, shape ``(9, 9)``."""
    return _reached(torch.ones(height, width, 1))[..., 0]


def _reached(x: Tensor) -> Tensor:
    """Sums over the pixels that a tap (rows) multiplies with pixels by another one (columns).

    Args:
        x: shape ``(height, width, channels)``.
    """
    pairs = list(product(_OFFSETS, _OFFSETS))
    bands = [x[_range(mine, theirs, x.shape[0])].sum(0) for mine, theirs in pairs]
    sums = torch.stack(
        [
            torch.stack([band[_range(mine, theirs, x.shape[1])].sum(0) for mine, theirs in pairs])
            for band in bands
        ]
    )
    by_axis = sums.unflatten(0, (_WIDTH, _WIDTH)).unflatten(2, (_WIDTH, _WIDTH))
    return by_axis.transpose(1, 2).flatten(2, 3).flatten(0, 1)


def _range(mine: int, theirs: int, size: int) -> slice:
    """Where a tap meets pixels while another does, too."""
    return slice(max(0, mine, mine - theirs), size + min(0, mine, mine - theirs))


def _of_inner(tiles: Tensor) -> Tensor:
    """Transforms of tiles without what is around them, shape ``(frequencies, 2, tiles, channels)``."""
    inner = tiles[_REACH:-_REACH, _REACH:-_REACH].flatten(2).flatten(0, 1)
    transforms = _transforms(tiles.dtype, tiles.device).of_inner
    return (transforms @ inner).view(-1, 2, *tiles.shape[2:])


def _of_all(tiles: Tensor) -> Tensor:
    """Transforms of tiles with what is around them, shape ``(frequencies, 2, tiles, channels)``."""
    transforms = _transforms(tiles.dtype, tiles.device).of_all
    return (transforms @ tiles.flatten(2).flatten(0, 1)).view(-1, 2, *tiles.shape[2:])


def _correlations(a: Tensor, b: Tensor) -> Tensor:
    """``sum a(p) b(p + shift)^T`` at all shifts, shape ``(shifts, channels**2)``; of transforms."""
    real = a.flatten(1, 2).mT @ b.flatten(1, 2)
    imaginary = (a[:, 0].mT @ b[:, 1]).baddbmm_(a[:, 1].mT, b[:, 0], alpha=-1)
    transforms = _transforms(a.dtype, a.device)
    return (transforms.back_real @ real.flatten(1)).addmm_(
        transforms.back_imaginary, imaginary.flatten(1)
    )
