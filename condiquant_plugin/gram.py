"""Streaming second moments of a layer's inputs: all that the layer-wise problems need of the data.

A layer is the matrix product ``Y = X W^T`` once its input is unfolded: ``X`` has shape
``(groups, samples, features)`` and ``W`` ``(groups, rows, features)``. Moments have a size that does not
depend on the number of calibration images, and those of several batches or processes add up.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from condiquant_plugin.errors import InputError

_CHUNK = 8192


@dataclass(frozen=True)
class LayerGeometry:
    """How a layer turns its input into rows of a matrix product."""

    kind: Literal["linear", "conv2d", "conv_transpose2d"] = "linear"
    kernel_size: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    output_padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros"


def unfold(x: Tensor, geometry: LayerGeometry) -> Tensor:
    """Rows of the matrix product, shape ``(groups, samples, features)``.

    Args:
        x: ``(..., in_features)`` for a linear layer, ``(batch, channels, height, width)`` or unbatched
            for a convolution. A transposed convolution is the plain one over the input with zeros
            between its entries.
    """
    if geometry.kind == "linear":
        return x.reshape(1, -1, x.shape[-1])
    x = x if x.ndim == 4 else x[None]
    stride, padding = geometry.stride, geometry.padding
    if geometry.kind == "conv_transpose2d":
        x = _insert_zeros(x, geometry)
        stride, padding = (1, 1), (0, 0)
    elif geometry.padding_mode != "zeros":
        (vertical, horizontal), padding = padding, (0, 0)
        x = F.pad(x, (horizontal, horizontal, vertical, vertical), mode=geometry.padding_mode)
    columns = F.unfold(x, geometry.kernel_size, geometry.dilation, padding, stride)
    batch, features, positions = columns.shape
    columns = columns.view(batch, geometry.groups, features // geometry.groups, positions)
    return columns.permute(1, 0, 3, 2).reshape(geometry.groups, -1, features // geometry.groups)


def _insert_zeros(x: Tensor, geometry: LayerGeometry) -> Tensor:
    batch, channels, height, width = x.shape
    (sh, sw), (kh, kw), (dh, dw) = geometry.stride, geometry.kernel_size, geometry.dilation
    spaced = x.new_zeros(batch, channels, (height - 1) * sh + 1, (width - 1) * sw + 1)
    spaced[:, :, ::sh, ::sw] = x
    top, left = dh * (kh - 1) - geometry.padding[0], dw * (kw - 1) - geometry.padding[1]
    return F.pad(
        spaced, (left, left + geometry.output_padding[1], top, top + geometry.output_padding[0])
    )


def weight_matrix(weight: Tensor, geometry: LayerGeometry) -> Tensor:
    """A layer's weight as ``(groups, rows, features)``, matching :func:`unfold`."""
    if geometry.kind == "linear":
        return weight[None]
    groups = geometry.groups
    if geometry.kind == "conv_transpose2d":
        inputs, rows = weight.shape[:2]
        weight = weight.view(groups, inputs // groups, rows, *weight.shape[2:])
        weight = weight.transpose(1, 2).flip(-2, -1)
        return weight.reshape(groups, rows, -1)
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def weight_from_matrix(matrix: Tensor, like: Tensor, geometry: LayerGeometry) -> Tensor:
    """Inverse of :func:`weight_matrix`, in the shape and dtype of ``like``."""
    if geometry.kind == "conv_transpose2d":
        inputs, rows = like.shape[:2]
        matrix = matrix.reshape(geometry.groups, rows, inputs // geometry.groups, *like.shape[2:])
        matrix = matrix.transpose(1, 2).flip(-2, -1)
    return matrix.reshape(like.shape).to(like).contiguous()


@dataclass
class Moments:
    """Sums over samples of float inputs ``x`` and, where collected, quantized inputs ``q``; float64.

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


def all_reduce(local: Moments) -> Moments:
    """Moments of all processes together, the same on each; needs an initialised process group."""
    samples = torch.tensor(local.samples, device=local.gram.device)
    torch.distributed.all_reduce(samples)
    reduced: dict[str, Any] = {"samples": int(samples)}
    for field in fields(local)[1:]:
        value = getattr(local, field.name)
        if value is not None:
            value = value.clone()
            torch.distributed.all_reduce(value)
        reduced[field.name] = value
    return Moments(**reduced)


def moments(
    x: Tensor, geometry: LayerGeometry, quantized: Tensor | None = None, *, name: str = "a layer"
) -> Moments:
    """Moments of one batch of a layer's inputs.

    Products are taken in float32 over chunks of 8192 samples and summed in float64.

    Args:
        x: float inputs as the layer gets them.
        quantized: the same inputs behind their fake quantizer.
        name: the layer's name, for the error message.

    Raises:
        InputError: if the inputs hold NaN or Inf.
    """
    if not all(extreme.isfinite() for extreme in x.aminmax()):
        raise InputError(
            f"NaN or Inf in the input of {name}: check the checkpoint and the calibration images"
        )
    rows = unfold(x.detach(), geometry)
    result = Moments(rows.shape[1], _product(rows, rows), rows.double().sum(1))
    if quantized is not None:
        codes = unfold(quantized.detach(), geometry)
        result.quantized_gram = _product(codes, codes)
        result.quantized_cross = _product(codes, rows)
        result.quantized_total = codes.double().sum(1)
    return result


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``sum a_i b_i^T`` over samples, float64."""
    result = a.new_zeros(a.shape[0], a.shape[2], b.shape[2], dtype=torch.float64)
    for left, right in zip(a.split(_CHUNK, 1), b.split(_CHUNK, 1), strict=True):
        result += left.mT @ right
    return result
