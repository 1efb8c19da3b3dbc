"""PSNR and SSIM on the Y channel, as BasicSR computes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from basicsr.metrics import calculate_psnr, calculate_ssim
from numpy.typing import NDArray
from torch import Tensor

from condiquant_basicsr.data.datasets import TestImage
from condiquant_basicsr.data.images import to_uint8
from condiquant_plugin.errors import InputError

_EQUAL = 100.0


def psnr(sr: Tensor, hr: Tensor, crop_border: int) -> float:
    """As :func:`evaluate_pair`, alone, and 100 dB for equal images."""
    found = calculate_psnr(*_bgr(sr, hr), crop_border=crop_border, test_y_channel=True)
    return min(float(found), _EQUAL)


def evaluate_pair(sr: Tensor, hr: Tensor, crop_border: int) -> dict[str, float]:
    """``{"psnr": dB, "ssim": ...}`` of two images ``(3, H, W)`` in 0 to 1, rounded to 8 bits."""
    bgr = _bgr(sr, hr)
    options = {"crop_border": crop_border, "test_y_channel": True}
    return {
        "psnr": float(calculate_psnr(*bgr, **options)),
        "ssim": float(calculate_ssim(*bgr, **options)),
    }


def _bgr(*images: Tensor) -> list[NDArray[np.uint8]]:
    return [np.ascontiguousarray(to_uint8(image)[:, :, ::-1]) for image in images]


def evaluate(
    network_fn: Callable[[Tensor], Tensor],
    pairs: Sequence[TestImage],
    scale: int,
    progress: Callable[[str], object] | None = None,
    *,
    reference: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Any]:
    """Mean and single scores on a test set, with ``scale`` pixels cropped at the border.

    Args:
        network_fn: ``(1, 3, H, W)`` to ``(1, 3, scale * H, scale * W)``, any H and W.
        progress: called with an image's name when it is done.
        reference: a network like ``network_fn`` to be followed; its output then stands for HR.

    Returns:
        ``{"psnr": ..., "ssim": ..., "images": {name: {"psnr": ..., "ssim": ...}}}``.

    Raises:
        InputError: NaN or Inf in an output, or an unreadable image.
    """
    images: dict[str, dict[str, float]] = {}
    for pair in pairs:
        lr, hr = pair.load(scale)
        sr = network_fn(lr[None])[0]
        target = hr if reference is None else reference(lr[None])[0]
        if not sr.isfinite().all():
            raise InputError(f"the network gives NaN or Inf on {pair.name}: check its weights")
        images[pair.name] = evaluate_pair(sr, target, scale)
        if progress is not None:
            progress(pair.name)
    mean = {key: float(np.mean([s[key] for s in images.values()])) for key in ("psnr", "ssim")}
    return {**mean, "images": images}
