"""What a network takes as height and width, and its scale: found by running it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from spandrel import MAIN_REGISTRY
from torch import Tensor, nn

from condiquant_basicsr.value_range import bare
from condiquant_plugin.errors import InputError
from condiquant_plugin.intake import check_output

_IMAGES = {1: "a grey", 3: "an RGB"}
_SMALLEST = 16  # several networks refuse smaller inputs
_FACTORS = (1, 2, 4, 8, 16)
_LARGEST_MULTIPLE = 128
_LARGEST_TRIED = 320


def network_scale(network: nn.Module, channels: int = 3) -> int:
    """Upscaling factor, found by running the network once on a small black image.

    Raises:
        InputError: the network does not turn (1, C, H, W) into (1, C, s*H, s*W), or gives several outputs.
    """
    smallest = _smallest(pad_multiple(network))
    size = smallest_size(network, smallest, channels)
    if size is None:
        raise InputError(
            f"{type(bare(network)).__name__} does not take {_IMAGES.get(channels, 'an')} image"
            f" (1, {channels}, {smallest}, {smallest}), nor larger ones:"
            f" {_failure(network, smallest, channels)}"
        )
    output = check_output(bare(network), _output(network, (size, size), channels))
    shape = tuple(output.shape)
    scale = shape[-1] // size
    if shape != (1, channels, scale * size, scale * size):
        raise InputError(
            f"{type(bare(network)).__name__} turns (1, {channels}, {size}, {size}) into {shape}:"
            " only super-resolution with a whole scale is supported"
        )
    return scale


def smallest_size(network: nn.Module, size: int, channels: int = 3) -> int | None:
    """The first of ``size``, its double, ... 16 times it, that the network takes as height and width."""
    sizes = (size * factor for factor in _FACTORS)
    return next((each for each in sizes if _failure(network, each, channels) is None), None)


def check_crop_size(network: nn.Module, size: int, channels: int, key: str, scale: int = 1) -> None:
    """Run the network once on a black crop.

    Args:
        size: height and width of LR crops.
        key: what sets them, times ``scale``.

    Raises:
        InputError: the network fails on it; names a size on which it does not.
    """
    failure = _failure(network, size, channels)
    if failure is None:
        return
    other = smallest_size(network, 2 * size, channels)
    remedy = "give another network" if other is None else f"use {key}={other * scale}"
    raise InputError(
        f"{type(bare(network)).__name__} cannot run on crops of {size}x{size} ({key}={size * scale}):"
        f" {failure}; {remedy}"
    )


def pad_multiple(network: nn.Module, override: int | None = None) -> int:
    """Number that H and W of an input must be multiples of; ``override`` wins where given.

    It is the least common multiple of all window and split sizes in the network and of what spandrel
    requires of an architecture of its own, where the network runs at it; else the smallest multiple
    at which it does, found by trying.
    """
    if override is not None:
        return override
    windows = [size for module in network.modules() for size in _window_sizes(module)]
    expected = math.lcm(*windows, _multiple_of_spandrel(network))
    if _runs_at(network, expected, _FACTORS) or _enlarges_nothing(network, expected):
        return expected
    others = range(expected, _LARGEST_MULTIPLE + 1, expected)
    return next((each for each in others if _runs_at(network, each, (1, 4))), expected)


def _runs_at(network: nn.Module, multiple: int, factors: tuple[int, ...]) -> bool:
    """Whether the network enlarges an image whose height and width are two neighbouring multiples."""
    for side in (_smallest(multiple) * factor for factor in factors):
        height, width = side, side + multiple
        for channels in (3, 1):
            if max(height, width) > max(_LARGEST_TRIED, 2 * multiple):
                return False
            try:
                output = _output(network, (height, width), channels)
            except Exception:
                continue
            if _is_enlarged(output, height, width):
                return True
    return False


def _enlarges_nothing(network: nn.Module, multiple: int) -> bool:
    """Whether it runs on a square and gives no image of a whole scale: no multiple will change that."""
    for side in (_smallest(multiple) * factor for factor in _FACTORS):
        for channels in (3, 1):
            try:
                output = _output(network, (side, side), channels)
            except Exception:
                continue
            return not _is_enlarged(output, side, side)
    return False


def _is_enlarged(output: Any, height: int, width: int) -> bool:
    if not isinstance(output, Tensor) or output.ndim != 4:
        return False
    scale = output.shape[-1] // width
    return scale > 0 and tuple(output.shape[-2:]) == (scale * height, scale * width)


def _smallest(multiple: int) -> int:
    return math.ceil(_SMALLEST / multiple) * multiple


def _failure(network: nn.Module, size: int, channels: int) -> str | None:
    """Why the network does not run on an image of this height and width, if it does not."""
    try:
        _output(network, (size, size), channels)
    except Exception as error:
        return " ".join(str(error).split()) or type(error).__name__
    return None


@torch.no_grad()
def _output(network: nn.Module, size: tuple[int, int], channels: int) -> Tensor:
    parameter = next(network.parameters())
    with _in_eval_mode(network):
        output: Tensor = network(parameter.new_zeros(1, channels, *size))
    return output


@contextmanager
def _in_eval_mode(network: nn.Module) -> Iterator[None]:
    """So that a trial changes no running statistics."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _multiple_of_spandrel(network: nn.Module) -> int:
    network = bare(network)
    module = type(network).__module__
    for support in MAIN_REGISTRY:
        if module.startswith(f"{type(support.architecture).__module__}."):
            try:
                described = support.architecture.load(network.state_dict())
            except Exception:  # folded, or with another state dict than it was published with
                return 1
            return int(described.size_requirements.multiple_of)
    return 1


def _window_sizes(module: nn.Module) -> Iterator[int]:
    for attribute in ("split_size", "window_size"):
        value = getattr(module, attribute, ())
        for size in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(size, int) and size > 0:
                yield size
