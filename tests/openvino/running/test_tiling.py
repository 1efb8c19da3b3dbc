import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from condiquant_openvino.running.tiling import Axis, Mosaic, strips


class Pixels:
    """A picture in memory that is strict about being read once, from top to bottom."""

    def __init__(self, pixels):
        self.pixels, self.read = pixels, 0
        self.channels, self.height, self.width = pixels.shape

    def rows(self, top, bottom):
        assert top == self.read
        assert top < bottom <= self.height
        self.read = bottom
        return self.pixels[:, top:bottom]


@st.composite
def axes(draw):
    tile = draw(st.integers(1, 40))
    overlap = draw(st.integers(0, tile // 2))
    return Axis.cover(draw(st.integers(tile, 200)), tile, overlap), overlap


@given(axes(), st.integers(1, 4))
def test_weights_of_all_tiles_sum_to_one(drawn, scale):
    axis, _ = drawn
    size = axis.starts[-1] + axis.tile
    total = np.zeros(scale * size, np.float32)
    for index, start in enumerate(axis.starts):
        weights = axis.weights(index, scale)
        assert (weights is None) == (len(axis.starts) == 1)
        part = total[scale * start : scale * (start + axis.tile)]
        part += 1 if weights is None else weights
        assert weights is None or weights.min() >= 0
    np.testing.assert_allclose(total, 1, atol=1e-6)


@given(axes())
def test_neighbours_overlap_enough_and_fade_far_from_their_borders(drawn):
    axis, overlap = drawn
    gaps = np.diff(axis.starts)
    assert axis.starts[0] == 0
    assert (axis.tile - gaps >= overlap).all()
    assert (gaps > 0).all()
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1
    for (first, last), before, after in zip(
        axis.ramps, axis.starts[:-1], axis.starts[1:], strict=True
    ):
        margin = overlap // 4
        assert after + margin <= first <= last <= before + axis.tile - margin
        assert last - first == min(overlap // 2, *gaps)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 24), st.integers(1, 3), st.data())
def test_tiles_of_an_enlargement_join_to_it(height, width, side, scale, data):
    random = np.random.default_rng(height * width)
    pixels = random.random((2, height, width), np.float32)
    padded = tuple(max(size, side) for size in (height, width))
    overlap = data.draw(st.integers(0, side // 2))
    rows, columns = (Axis.cover(size, side, overlap) for size in padded)
    mosaic = Mosaic(rows, columns, (height, width), scale, 2)
    bands = []
    for row, strip in enumerate(strips(Pixels(pixels), rows, padded)):
        assert strip.shape == (2, side, padded[1])
        for column, left in enumerate(columns.starts):
            tile = strip[:, :, left : left + side].repeat(scale, 1).repeat(scale, 2)
            band = mosaic.add(row, column, tile)
            assert (band is None) == (column < len(columns.starts) - 1)
            if band is not None:
                bands.append(band)
    expected = pixels.repeat(scale, 1).repeat(scale, 2)
    np.testing.assert_allclose(np.concatenate(bands, axis=1), expected, atol=1e-6)


@given(st.integers(1, 30), st.integers(1, 20), st.integers(1, 45))
def test_strips_are_mirrored_past_the_edges(height, width, side):
    pixels = np.random.default_rng(0).random((1, height, width), np.float32)
    padded = max(height, side) + 3, width + 2
    axis = Axis.cover(padded[0], side, side // 3)
    picture = Pixels(pixels)
    expected = np.pad(pixels, ((0, 0), (0, padded[0] - height), (0, 2)), "symmetric")
    for start, strip in zip(axis.starts, strips(picture, axis, padded), strict=True):
        np.testing.assert_array_equal(strip, expected[:, start : start + side])


def test_only_the_rows_of_one_strip_are_held():
    picture = Pixels(np.zeros((1, 1000, 4), np.float32))
    axis = Axis.cover(1000, 50, 10)
    for start, _ in zip(axis.starts, strips(picture, axis, (1000, 4)), strict=True):
        assert picture.read == start + 50


@pytest.mark.parametrize(("size", "count"), [(10, 1), (11, 2), (16, 2), (17, 3)])
def test_no_more_tiles_than_needed(size, count):
    assert len(Axis.cover(size, 10, 4).starts) == count
