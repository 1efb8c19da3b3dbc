"""Cutting a picture into overlapping tiles, row by row, and joining what becomes of them without seams."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Picture(Protocol):
    """A picture that is read once, from top to bottom.

    Attributes:
        channels: 1 (grey) or 3 (RGB), and one more with an alpha channel.
    """

    height: int
    width: int
    channels: int

    def rows(self, top: int, bottom: int) -> NDArray[np.float32]:
        """Pixels in [0, 1], shape ``(channels, bottom - top, width)``; ``top`` is the last ``bottom``."""


@dataclass(frozen=True)
class Axis:
    """Tiles along one axis, in pixels of the network's input.

    A neighbour's part begins to count in the middle of the overlap, over a linear ramp of half the
    requested overlap: what lies in the outer quarter of an overlap counts nothing.

    >>> axis = Axis.cover(20, 10, 4)
    >>> axis.starts, axis.ramps
    ((0, 5, 10), ((6, 8), (11, 13)))
    """

    tile: int
    starts: tuple[int, ...]
    ramps: tuple[tuple[int, int], ...]
    """Between each two neighbours: where the first begins to fade, and where it is gone."""

    @classmethod
    def cover(cls, size: int, tile: int, overlap: int) -> Axis:
        """As few tiles as cover ``size`` with at least ``overlap``, evenly spread.

        Args:
            size: at least ``tile``.
            overlap: at most half of ``tile``, unless one tile is enough.
        """
        slack = size - tile
        gaps = -(-slack // (tile - overlap)) if slack else 0
        starts = (*(slack * i // gaps for i in range(gaps)), slack)
        width = min([overlap // 2, *(after - before for before, after in pairwise(starts))])
        firsts = [(before + tile + after - width) // 2 for before, after in pairwise(starts)]
        return cls(tile, starts, tuple((first, first + width) for first in firsts))

    def weights(self, index: int, scale: int) -> NDArray[np.float32] | None:
        """What each output pixel of a tile counts, of all tiles 1; None if it is alone."""
        if not self.ramps:
            return None
        found = np.ones(scale * self.tile, np.float32)
        start = scale * self.starts[index]
        for side, (first, last) in enumerate(
            self.ramps[max(index - 1, 0) : index + 1], int(index == 0)
        ):
            a, b = scale * first - start, scale * last - start
            rising = (np.arange(b - a, dtype=np.float32) + np.float32(0.5)) / max(b - a, 1)
            if side == 0:
                found[:a], found[a:b] = 0, rising
            else:
                found[a:b], found[b:] = 1 - rising, 0
        return found


def strips(picture: Picture, rows: Axis, padded: tuple[int, int]) -> Iterator[NDArray[np.float32]]:
    """Input of each row of tiles, ``(channels, tile, padded width)``, mirrored past the edges."""
    below = np.pad(np.arange(picture.height), (0, padded[0] - picture.height), "symmetric")
    beside = np.pad(np.arange(picture.width), (0, padded[1] - picture.width), "symmetric")
    wanted = [below[start : start + rows.tile] for start in rows.starts]
    first_needed = np.minimum.accumulate([w.min() for w in wanted][::-1])[::-1]
    held, top, bottom = np.empty((picture.channels, 0, padded[1]), np.float32), 0, 0
    for needed, first in zip(wanted, first_needed, strict=True):
        held, top = held[:, max(first - top, 0) :], max(top, int(first))
        if (end := int(needed.max()) + 1) > bottom:
            read = picture.rows(bottom, end)
            if padded[1] > picture.width:
                read = read[:, :, beside]
            held, bottom = np.concatenate([held, read], axis=1), end
        yield held[:, needed - top]


class Mosaic:
    """The enlargement of a picture, put together from tiles, of which it holds one row.

    Args:
        size: height and width of the picture, in pixels of the input; what was padded is cut off.
    """

    def __init__(
        self, rows: Axis, columns: Axis, size: tuple[int, int], scale: int, channels: int
    ) -> None:
        self._rows, self._columns, self._scale = rows, columns, scale
        self._height, self._width = scale * size[0], scale * size[1]
        self._alone = len(rows.starts) == len(columns.starts) == 1
        self._given = 0
        width = 0 if self._alone else scale * (columns.starts[-1] + columns.tile)
        self._held = np.zeros((channels, scale * rows.tile, width), np.float32)

    def add(self, row: int, column: int, tile: NDArray[np.float32]) -> NDArray[np.float32] | None:
        """Take the next tile, rows from top to bottom, each from left to right.

        Args:
            tile: shape ``(channels, scale * tile height, scale * tile width)``.

        Returns:
            After the last one of a row: the rows that are finished, ``(channels, any, scale * width)``.
        """
        if self._alone:
            return tile[:, : self._height, : self._width]
        left = self._scale * self._columns.starts[column]
        down, across = (
            axis.weights(index, self._scale)
            for axis, index in ((self._rows, row), (self._columns, column))
        )
        if across is not None:
            tile = tile * across
        if down is not None:
            tile = tile * down[:, None]
        self._held[:, :, left : left + tile.shape[2]] += tile
        return self._finished(row) if column == len(self._columns.starts) - 1 else None

    def _finished(self, row: int) -> NDArray[np.float32]:
        top, is_last = self._scale * self._rows.starts[row], row == len(self._rows.starts) - 1
        end = self._height if is_last else min(self._scale * self._rows.ramps[row][0], self._height)
        finished = self._held[:, self._given - top : end - top, : self._width].copy()
        self._given = end
        if not is_last:
            moved = self._scale * self._rows.starts[row + 1] - top
            self._held[:, :-moved] = self._held[:, moved:].copy()
            self._held[:, -moved:] = 0
        return finished
