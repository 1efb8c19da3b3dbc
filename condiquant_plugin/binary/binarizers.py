"""To -1 and +1: of activations against a threshold, of weights with a scale per output channel.

While a model is traced signs are the operator ``condiquant::binarize``, which exporters translate.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from condiquant_plugin.errors import check_choice, check_count

Gradient = Literal["hardtanh", "polynomial", "straight_through"]
"""Of the sign: ``"hardtanh"`` is BiDRN's, ``sign(Hardtanh(x))`` straight through, 1 where ``|x| <= 1`` and
0 outside; ``"polynomial"`` is Bi-Real Net's (arXiv 1808.00278), ``2 - 2 |x|`` there, which BBCU and E2FIF
use; ``"straight_through"`` is 1 everywhere."""


class _Sign(torch.autograd.Function):
    """+1 where ``x > 0``, else -1, with the gradient of :func:`surrogate`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: Gradient) -> Tensor:
        ctx.save_for_backward(x)
        ctx.gradient = gradient
        return _signs(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        (x,) = ctx.saved_tensors
        if ctx.gradient == "straight_through":
            return grad, None
        if ctx.gradient == "hardtanh":
            return torch.where(x.abs() <= 1, grad, 0), None
        return grad * (2 - 2 * x.abs()).clamp_min_(0), None


def _signs(x: Tensor) -> Tensor:
    return torch.where(x > 0, 1.0, -1.0).to(x.dtype)


def _straight_through(x: Tensor, gradient: Gradient) -> Tensor:
    signs: Tensor = _Sign.apply(x, gradient)
    return signs


def surrogate(x: Tensor, gradient: Gradient) -> Tensor:
    """The function whose derivative stands for that of the sign.

    >>> surrogate(torch.tensor([-3.0, -0.5, 0.5]), "polynomial")
    tensor([-1.0000, -0.7500,  0.7500])
    """
    if gradient == "straight_through":
        return x
    clipped = x.clamp(-1, 1)
    return clipped if gradient == "hardtanh" else 2 * clipped - clipped * clipped.abs()


@torch.library.custom_op("condiquant::binarize", mutates_args=())
def binarize_op(x: Tensor, threshold: Tensor, name: str) -> Tensor:
    """Traceable form: +1 where ``x > threshold``, else -1.

    ``threshold`` has shape ``(1,)`` or one entry for each channel of ``x``, of shape ``(N, C, H, W)``;
    ``name`` labels the binarizer in exported graphs.
    """
    return _signs(x - threshold.view(1, -1, 1, 1))


@binarize_op.register_fake
def _(x: Tensor, threshold: Tensor, name: str) -> Tensor:
    return torch.empty_like(x)


class ActivationBinarizer(nn.Module):
    """The sign of activations against a learned threshold per channel (ReActNet's RSign, arXiv 2003.03488).

    ``a = sign(x - threshold)``, with BiDRN's ``sign(Hardtanh(x))`` as the default; zero gives -1, so that
    what a ReLU has cut off can still be told from the rest.

    Args:
        channels: of the input, of shape ``(N, channels, H, W)``.
        gradient: that of the sign.
        learned: False leaves all thresholds at zero.

    Raises:
        InputError: a gradient that is not known, or no channels.
    """

    def __init__(
        self,
        channels: int,
        gradient: Gradient = "hardtanh",
        *,
        learned: bool = True,
    ) -> None:
        super().__init__()
        check_count("channels", channels)
        check_choice("gradient", gradient, get_args(Gradient))
        self.channels, self.gradient = channels, gradient
        self.threshold = nn.Parameter(torch.zeros(channels)) if learned else None

    def forward(self, x: Tensor, name: str = "") -> Tensor:
        """-1 and +1, of the shape of ``x``; ``name`` is their label in exported graphs."""
        if torch.jit.is_tracing():
            values = [0.0] if self.threshold is None else self.threshold.tolist()
            signs: Tensor = binarize_op(x, torch.tensor(values), name)
            return signs
        if self.threshold is not None:
            x = x - self.threshold.view(1, -1, 1, 1)
        return _straight_through(x, self.gradient)

    def extra_repr(self) -> str:
        return f"{self.channels}, {self.gradient!r}, learned={self.threshold is not None}"


def weight_signs(weight: Tensor, name: str = "") -> Tensor:
    """-1 and +1 of a weight, of its shape; straight through where it lies in [-1, 1]."""
    if torch.jit.is_tracing():
        signs: Tensor = binarize_op(weight, torch.zeros(1), name)
        return signs
    return _straight_through(weight, "hardtanh")


def weight_scale(weight: Tensor) -> Tensor:
    """Mean magnitude of every filter, shape ``(out_channels,)`` (XNOR-Net, arXiv 1603.05279, equation 6).

    With :func:`weight_signs` it is the binarized weight nearest to a float one.
    """
    return weight.abs().mean(tuple(range(1, weight.ndim)))
