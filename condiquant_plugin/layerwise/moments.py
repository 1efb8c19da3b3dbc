"""Streaming second moments of a layer's inputs: all that the layer-wise problems need of the data.

A layer is the matrix product ``Y = X W^T`` once its input is unfolded: ``X`` has shape
``(groups, samples, features)`` and ``W`` ``(groups, rows, features)``. Moments have a size that does not
depend on the number of calibration images, and those of several batches or processes add up.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from condiquant_plugin.errors import check_finite
from condiquant_plugin.layerwise import patches

_STRIPS, _WIDE = 8, 512
"""That a Gram matrix of so many features is computed in: 36 of 64 parts of the work."""
_CHUNK = 8192


@dataclass(frozen=True)
class LayerGeometry:
    """How a layer turns its input into rows of a matrix product; a convolution of 1, 2 or 3 dimensions.

    The tuples hold one entry per spatial dimension; a linear layer uses none of them.
    """

    kind: Literal["linear", "conv", "conv_transpose"] = "linear"
    kernel_size: tuple[int, ...] = (1, 1)
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    output_padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1
    padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros"


def unfold(x: Tensor, geometry: LayerGeometry) -> Tensor:
    """Rows of the matrix product, shape ``(groups, samples, features)``.

    Args:
        x: ``(..., in_features)`` for a linear layer, ``(batch, channels, *size)`` or unbatched for a
            convolution. A transposed convolution is the plain one over the input with zeros between
            its entries.
    """
    if geometry.kind == "linear":
        return x.reshape(1, -1, x.shape[-1])
    dims, stride = len(geometry.kernel_size), geometry.stride
    x = x if x.ndim == dims + 2 else x[None]
    if geometry.kind == "conv_transpose":
        x, stride = _insert_zeros(x, geometry), (1,) * dims
    else:
        x = _padded(x, geometry)
    x = x.unflatten(1, (geometry.groups, -1))
    steps = zip(geometry.kernel_size, stride, geometry.dilation, strict=True)
    for axis, (size, step, spacing) in enumerate(steps, start=3):
        x = x.unfold(axis, spacing * (size - 1) + 1, step)[..., ::spacing]
    positions, taps = range(3, 3 + dims), range(3 + dims, 3 + 2 * dims)
    rows = x.permute(1, 0, *positions, 2, *taps)
    features = rows.shape[2 + dims :].numel()
    return rows.reshape(geometry.groups, -1, features)


def _padded(x: Tensor, geometry: LayerGeometry) -> Tensor:
    if not any(geometry.padding):
        return x
    mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode
    return F.pad(x, [p for p in reversed(geometry.padding) for _ in range(2)], mode)


def _insert_zeros(x: Tensor, geometry: LayerGeometry) -> Tensor:
    sizes = zip(x.shape[2:], geometry.stride, strict=True)
    spaced = x.new_zeros(*x.shape[:2], *((size - 1) * step + 1 for size, step in sizes))
    spaced[:, :, *(slice(None, None, step) for step in geometry.stride)] = x
    ends = zip(
        geometry.kernel_size,
        geometry.dilation,
        geometry.padding,
        geometry.output_padding,
        strict=True,
    )
    padding: list[int] = []
    for size, spacing, cut, extra in reversed(list(ends)):
        around = spacing * (size - 1) - cut
        padding += [around, around + extra]
    return F.pad(spaced, padding)


def weight_matrix(weight: Tensor, geometry: LayerGeometry) -> Tensor:
    """A layer's weight as ``(groups, rows, features)``, matching :func:`unfold`."""
    if geometry.kind == "linear":
        return weight[None]
    groups = geometry.groups
    if geometry.kind == "conv_transpose":
        inputs, rows = weight.shape[:2]
        weight = weight.view(groups, inputs // groups, rows, *weight.shape[2:])
        weight = _mirrored(weight.transpose(1, 2), geometry)
        return weight.reshape(groups, rows, -1)
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def weight_from_matrix(matrix: Tensor, like: Tensor, geometry: LayerGeometry) -> Tensor:
    """Inverse of :func:`weight_matrix`, in the shape and dtype of ``like``."""
    if geometry.kind == "conv_transpose":
        inputs, rows = like.shape[:2]
        matrix = matrix.reshape(geometry.groups, rows, inputs // geometry.groups, *like.shape[2:])
        matrix = _mirrored(matrix.transpose(1, 2), geometry)
    return matrix.reshape(like.shape).to(like).contiguous()


def _mirrored(weight: Tensor, geometry: LayerGeometry) -> Tensor:
    return weight.flip(*range(-len(geometry.kernel_size), 0))


@dataclass
class Moments:
    """Sums over samples of float inputs ``x`` and, where collected, quantized inputs ``q``; of one dtype.

    Shapes: ``(groups, features, features)`` and, for the sums, ``(groups, features)``.
    """

    samples: int
    gram: Tensor
    """``sum x x^T``"""
    total: Tensor
    """``sum x``"""
    quantized_gram: Tensor | None = None
    """``sum q q^T``"""
    quantized_cross: Tensor | None = None
    """``sum q x^T``"""
    quantized_total: Tensor | None = None
    """``sum q``"""

    def __add__(self, other: Moments) -> Moments:
        """Moments of both sets of samples together."""
        added: dict[str, Any] = {}
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if (mine is None) != (theirs is None):
                raise ValueError(f"only one of the moments has {field.name}")
            added[field.name] = None if mine is None else mine + theirs
        return Moments(**added)

    def __iadd__(self, other: Moments) -> Self:
        """The same, in place."""
        self.samples += other.samples
        for field in fields(self)[1:]:
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if (mine is None) != (theirs is None):
                raise ValueError(f"only one of the moments has {field.name}")
            if mine is not None:
                mine += theirs
        return self

    def as_quantized(self) -> Moments:
        """As if the quantizers of the inputs changed nothing."""
        return Moments(self.samples, self.gram, self.total, self.gram, self.gram, self.total)


def no_moments(
    weight: Tensor,
    geometry: LayerGeometry,
    *,
    quantized: bool,
    dtype: torch.dtype = torch.float64,
) -> Moments:
    """Moments of a layer that has seen no samples.

    Args:
        quantized: whether those of quantized inputs belong to them.
        dtype: of the sums.
    """
    groups, _, features = weight_matrix(weight, geometry).shape
    return _zeros(weight, groups, features, quantized, dtype)


def _zeros(
    like: Tensor, groups: int, features: int, quantized: bool, dtype: torch.dtype
) -> Moments:
    zeros = partial(like.new_zeros, dtype=dtype)
    square, line = (groups, features, features), (groups, features)
    if not quantized:
        return Moments(0, zeros(square), zeros(line))
    return Moments(0, zeros(square), zeros(line), zeros(square), zeros(square), zeros(line))


def moments_of(
    x: Tensor,
    geometry: LayerGeometry,
    quantized: Tensor | None = None,
    *,
    name: str = "a layer",
    dtype: torch.dtype = torch.float64,
    into: Moments | None = None,
) -> Moments:
    """Moments of one batch of a layer's inputs.

    Products are taken in the inputs' dtype over chunks of 8192 samples, around means, and summed in
    ``dtype``: what varies little around a large mean keeps its digits.

    Args:
        x: float inputs as the layer gets them.
        quantized: the same inputs behind their fake quantizer.
        name: the layer's name, for the error message.
        dtype: of the sums.
        into: moments of earlier batches, to which these are added in place: it is what is returned.

    Raises:
        InputError: if the inputs hold NaN or Inf.
    """
    sums = MomentSums(geometry, name=name, dtype=dtype, into=into)
    sums.add(x, quantized)
    return sums.moments()


class MomentSums:
    """Moments of a layer's inputs, batch by batch; as :func:`moments_of` takes them.

    Args:
        floats: those of the same float inputs, if they are known: they are not summed again.
    """

    def __init__(
        self,
        geometry: LayerGeometry,
        *,
        name: str,
        dtype: torch.dtype = torch.float64,
        into: Moments | None = None,
        floats: Moments | None = None,
    ) -> None:
        self._geometry, self._name, self._dtype = geometry, name, dtype
        self._total, self._floats = into, floats
        self._patches: _PatchMoments | None = None

    def add(self, x: Tensor, quantized: Tensor | None = None) -> None:
        """A batch; all of them have quantized inputs, or none.

        Raises:
            InputError: if the inputs hold NaN or Inf.
        """
        check_finite(x, f"the input of {self._name}")
        # NNCF looks at every function of torch's that is called within a network.
        with torch._C.DisableTorchFunction():
            x, codes = x.detach(), None if quantized is None else quantized.detach()
            channels = x.shape[-3] if x.ndim > 2 and min(x.shape[-2:]) >= patches.TILE else 0
            if has_wide_patches(channels, self._geometry):
                if self._patches is None:
                    self._patches = _PatchMoments(x, codes, self._dtype, self._floats is None)
                self._patches.add(x, codes)
            else:
                self._add_rows(unfold(x, self._geometry), codes)

    def _add_rows(self, rows: Tensor, codes: Tensor | None) -> None:
        groups, samples, features = rows.shape
        if self._total is None:
            self._total = _zeros(rows, groups, features, codes is not None, self._dtype)
        total = self._total
        total.samples += samples
        if self._floats is None:
            _add_product(total.gram, total.total, rows, rows)
        if codes is not None:
            codes = unfold(codes, self._geometry)
            assert total.quantized_gram is not None
            assert total.quantized_cross is not None
            _add_product(total.quantized_gram, total.quantized_total, codes, codes)
            _add_product(total.quantized_cross, None, codes, rows)

    def moments(self) -> Moments:
        """Of all batches, at least one."""
        if self._patches is not None:
            found, self._patches = self._patches.moments(self._floats), None
            if self._total is None:
                self._total = found
            else:
                self._total += found
        assert self._total is not None
        if self._floats is not None:
            self._total.gram, self._total.total = self._floats.gram, self._floats.total
        return self._total


def has_wide_patches(channels: int, geometry: LayerGeometry) -> bool:
    """Whether a layer is a convolution that :mod:`condiquant_plugin.layerwise.patches` is for."""
    alike = LayerGeometry("conv", (3, 3), padding=(1, 1))
    return geometry == alike and channels * patches.TAPS >= _WIDE


class _PatchMoments:
    """Moments of a wide convolution's patches; of means those of the first batch are taken out."""

    def __init__(
        self, x: Tensor, codes: Tensor | None, dtype: torch.dtype, with_gram: bool
    ) -> None:
        self._dtype, self._samples = dtype, 0
        channels = x.shape[-3]
        inputs = [x] if codes is None else [x, codes]
        self._means = [each.mean((-2, -1)).view(-1, channels).mean(0) for each in inputs]
        self._reached = [
            x.new_zeros(patches.TAPS, patches.TAPS, channels, dtype=dtype) for _ in inputs
        ]
        self._counts = x.new_zeros(patches.TAPS, patches.TAPS, dtype=dtype)
        self._pairs = [] if codes is None else [(1, 1), (1, 0)]
        if with_gram:
            self._pairs.insert(0, (0, 0))
        self._products = patches.PatchSums(
            self._pairs, channels, like=x, dtype=dtype, at_once=_CHUNK
        )

    def add(self, x: Tensor, codes: Tensor | None) -> None:
        x = x if x.ndim == 4 else x[None]
        given = [x] if codes is None else [x, codes.view_as(x)]
        inputs = [
            patches.Input(each, mean, self._dtype)
            for each, mean in zip(given, self._means, strict=True)
        ]
        count, _, height, width = x.shape
        self._samples += count * height * width
        self._counts += count * patches.counts(height, width).to(self._counts)
        for sums, each in zip(self._reached, inputs, strict=True):
            sums += each.reached
        self._products.add(inputs)

    def moments(self, floats: Moments | None) -> Moments:
        """With the float inputs' own, if given."""
        grams = [self._gram(pair) for pair in range(len(self._pairs))]
        if floats is not None:
            grams.insert(0, floats.gram)
        totals = [each.diagonal().flatten()[None] for each in self._reached]
        return Moments(self._samples, grams[0], totals[0], *grams[1:], *totals[1:])

    def _gram(self, pair: int) -> Tensor:
        """Shape ``(1, features, features)``, the means put back."""
        taps, (a, b) = self._products.by_taps(pair), self._pairs[pair]
        m, n = (self._means[each].to(taps) for each in (a, b))
        ours, theirs = self._reached[a], self._reached[b].transpose(0, 1)
        # Sums around a mean are not zero: it is rounded.
        rest = ours - self._counts[..., None] * m
        left = torch.stack([m.expand_as(rest), rest], -1)
        right = torch.stack([theirs, n.expand_as(theirs)], -2)
        taps = taps.flatten(0, 1).baddbmm_(left.flatten(0, 1), right.flatten(0, 1)).view_as(taps)
        features = taps.shape[0] * taps.shape[2]
        return taps.permute(2, 0, 3, 1).reshape(1, features, features)


def _add_product(result: Tensor, total: Tensor | None, a: Tensor, b: Tensor) -> None:
    """To ``result`` ``sum a_i b_i^T`` over samples, to ``total`` ``sum a_i``."""
    for left, right in zip(a.split(_CHUNK, 1), b.split(_CHUNK, 1), strict=True):
        m, centred = _around_mean(left)
        n, beside = (m, centred) if a is b else _around_mean(right)
        if a is b and a.shape[2] >= _WIDE:  # below, strips cost more than they save
            _add_gram(result, centred)
        else:
            result += centred.mT @ beside
        m, n = m.to(result), n.to(result)
        sums = left.sum(1, keepdim=True, dtype=result.dtype)
        sums_beside = sums if a is b else right.sum(1, keepdim=True, dtype=result.dtype)
        # Sums around a mean are not zero: it is rounded.
        factors = torch.cat([m, sums - left.shape[1] * m], 1), torch.cat([sums_beside, n], 1)
        result.baddbmm_(factors[0].mT, factors[1])
        if total is not None:
            total += sums.squeeze(1)


def _around_mean(rows: Tensor) -> tuple[Tensor, Tensor]:
    mean = rows.mean(1, keepdim=True)
    return mean, rows - mean


def _add_gram(result: Tensor, rows: Tensor) -> None:
    """Add ``rows^T rows`` strip by strip: what lies left of the diagonal is mirrored."""
    features = rows.shape[-1]
    width = -(-features // _STRIPS)
    for start in range(0, features, width):
        end = min(start + width, features)
        strip = rows[..., start:end].mT @ rows[..., start:]
        result[..., start:end, start:] += strip
        result[..., end:, start:end] += strip[..., end - start :].mT
