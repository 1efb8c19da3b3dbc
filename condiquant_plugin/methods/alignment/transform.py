"""Matrices in front of quantized linear layers, exact in floats: ``W x = (W M^-1)(M x)``.

Rounding ``M x`` to a grid for all its entries makes an error of ``step^2 / 12`` in each of them, of which
``W M^-1`` passes on its Frobenius norm; the step goes by the variance of ``M x``. So what counts is the
product of both, which no orthogonal matrix changes: a rotation only shares it out among the entries. It
is least where both factors have the same singular values along the same directions, and a rotation behind
then gives all entries equal variances (concentration and alignment; Federici et al., arXiv 2603.04359).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from condiquant_plugin.layerwise import distributed
from condiquant_plugin.layerwise.moments import Moments
from condiquant_plugin.layerwise.quantized import QuantizedLayer, collect_moments
from condiquant_plugin.uniform.rotation import orthogonal

TransformKind = Literal["rotation", "alignment"]
_LARGEST, _PARTS = 127, 128
"""So that a file needs a byte for an entry. The weight undoes what is stored, not what was found."""
_DAMPINGS = (1e-3, 1e-2, 1e-1)
"""Of the mean variance, added to all: what no calibration image has others may have. The least that can be
undone well once it is rounded."""
_MOST_CONDITION = 100
"""Of the rounded matrix."""
_LEAST = 1e-2
"""Of the mean singular value: directions that the layer hardly reads are as wide as if it did."""


@dataclass(frozen=True)
class Transform:
    """What becomes of an input ``x``: ``matrix x + shift``."""

    matrix: Tensor
    """``(features, features)``, float32: integers of -127 to 127, over 128."""
    shift: Tensor
    """``(features,)``"""

    @classmethod
    def of(cls, matrix: Tensor, mean: Tensor) -> Self:
        """The one that takes ``mean`` to 0, of a matrix of any scale."""
        stored = (matrix.double() / matrix.abs().max() * _LARGEST).round() / _PARTS
        return cls(stored.float(), -(stored @ mean.double()).float())

    def rows_behind(self, rows: Tensor) -> Tensor:
        """The weight that gives the same behind it, but for the shift; ``(..., features)``."""
        solved: Tensor = torch.linalg.solve(self.matrix.double(), rows.double(), left=False)
        return solved


def rotation(mean: Tensor) -> Transform:
    """The rotation of :mod:`condiquant_plugin.uniform.rotation`, about ``mean``, ``(features,)``."""
    return Transform.of(orthogonal(len(mean)).to(mean.device).mT, mean)


def alignment(rows: Tensor, covariance: Tensor, mean: Tensor) -> Transform:
    """The matrix behind which rounding to one grid costs the output least, in all directions alike.

    With ``W C^1/2 = U S V^T`` it is ``R^T S^1/2 V^T C^-1/2`` for a rotation ``R`` (arXiv 2603.04359).

    Args:
        rows: the weight ``W``, shape ``(outputs, features)``.
        covariance: of the inputs about ``mean``, shape ``(features, features)``.
        mean: shape ``(features,)``.
    """
    variances, axes = torch.linalg.eigh(covariance.double())
    if not (float(variances.max()) > 0 and rows.any()):  # nothing that changes, or is read
        return rotation(mean)
    variances, turned = variances.clamp_min(0), orthogonal(len(mean)).to(variances).mT
    for damping in _DAMPINGS:
        scales = (variances + damping * variances.mean()).sqrt()
        root, inverse_root = (axes * scale @ axes.mT for scale in (scales, 1 / scales))
        _, values, directions = torch.linalg.svd(rows.double() @ root, full_matrices=True)
        reach = values.new_zeros(len(mean))
        reach[: len(values)] = values
        reach = reach.clamp_min(_LEAST * float(reach.mean()))
        found = Transform.of(turned @ (reach.sqrt()[:, None] * directions) @ inverse_root, mean)
        if torch.linalg.cond(found.matrix.double()) <= _MOST_CONDITION:
            return found
    return rotation(mean)


@torch.no_grad()
def transform_inputs(
    model: nn.Module, layers: Sequence[QuantizedLayer], images: Sequence[Any], kind: TransformKind
) -> None:
    """Set the matrices of quantizers that have room for one, and weights and biases behind them.

    Under ``torch.distributed`` all processes call this with the same layers and images.

    Args:
        model: as trained, its transforms without effect yet; changed in place.
        images: batches that inputs are measured on.

    Raises:
        InputError: NaN or Inf in an input; a layer that is not called.
        DistributedError: another process ended or failed.
    """
    layers = [layer for layer in layers if layer.input_quantizers[0].transforms]
    if not layers:
        return
    moments = collect_moments(model, layers, images, quantized=False).moments
    with distributed.failing_together("transforming inputs"):
        found = [_transform(layer, moments[layer.name], kind) for layer in layers]
    shared = distributed.agreed([(each.matrix, each.shift) for each in found])
    for layer, (matrix, shift) in zip(layers, shared, strict=True):
        _put_in(layer, Transform(matrix.to(layer.weight.device), shift.to(layer.weight.device)))


def _transform(layer: QuantizedLayer, moments: Moments, kind: TransformKind) -> Transform:
    mean = moments.total[0] / moments.samples
    second = moments.gram[0] / moments.samples
    if layer.bias is None or len(layer.input_quantizers) > 1:
        mean = torch.zeros_like(mean)  # nothing to make up for a shift, or not for one use alone
    if kind == "rotation":
        return rotation(mean)
    rows = layer.rows_first(layer.weight)
    return alignment(rows, second - mean[:, None] * mean, mean)


def _put_in(layer: QuantizedLayer, transform: Transform) -> None:
    for quantizer in layer.input_quantizers:
        quantizer.set_transform(transform.matrix, transform.shift)
    rows = layer.rows_first(layer.weight)
    behind = transform.rows_behind(rows)
    rows.copy_(behind)
    if layer.bias is not None:
        layer.bias.sub_((behind @ transform.shift.to(behind)).to(layer.bias))
