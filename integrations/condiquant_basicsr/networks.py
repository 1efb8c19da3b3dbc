"""Networks from a BasicSR ``network_g`` section, and running them on images of any size."""

from __future__ import annotations

import difflib
import inspect
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from basicsr.archs.ecbsr_arch import ECB
from basicsr.archs.rrdbnet_arch import RRDBNet
from basicsr.utils.registry import ARCH_REGISTRY
from spandrel import MAIN_REGISTRY
from spandrel.architectures.SPAN.__arch.span import Conv3XC
from torch import Tensor, nn

from condiquant_plugin.errors import InputError

_BASICSR_SUFFIX = "_basicsr"  # BasicSR's own suffix for names that Real-ESRGAN registers, too
_CHANNEL_ARGUMENTS = ("num_in_ch", "in_chans", "in_nc")
_IMAGES = {1: "a grey", 3: "an RGB"}
_SPAN_SLOPE = 0.05
_SMALLEST_PROBE = 16  # several networks refuse smaller inputs


def build_network(network_g: dict[str, Any]) -> nn.Module:
    """Network of a ``network_g`` section, randomly initialised, in eval mode.

    Args:
        network_g: ``{"type": "SwinIR", "upscale": 4, ...}``; the type is one of BasicSR's
            ARCH_REGISTRY or, where that has none of the name, an architecture of spandrel.

    Raises:
        InputError: unknown type, unknown argument, or values that the architecture refuses.
    """
    architecture = _architecture(network_g)
    arguments = {name: value for name, value in network_g.items() if name != "type"}
    known = _parameters(architecture)
    for name in arguments:
        if name not in known:
            raise InputError(
                f"network_g: {network_g['type']} has no argument {name!r}{_nearest(name, known)}"
            )
    try:
        return architecture(**arguments).eval()
    except Exception as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"network_g: {network_g['type']} cannot be built from these arguments ({message})"
        ) from error


def scale_argument(network_g: dict[str, Any]) -> str | None:
    """Name of the argument that sets the scale of this architecture, if it has one."""
    known = _parameters(_architecture(network_g))
    return next((name for name in ("upscale", "scale") if name in known), None)


def input_channels(network_g: Mapping[str, Any] | None) -> int:
    """Channels of the images that the network of a ``network_g`` section takes: 3, or 1 for Y alone."""
    section = network_g or {}
    return next((int(section[name]) for name in _CHANNEL_ARGUMENTS if name in section), 3)


@torch.no_grad()
def folded(network: nn.Module) -> nn.Module:
    """Puts one convolution in place of each block that is several in training only (ECBSR's, SPAN's)."""
    for name, block in list(network.named_modules()):
        if isinstance(block, ECB):
            convolution = nn.Conv2d(block.in_channels, block.out_channels, 3, padding=1)
            weight, bias = block.rep_params()
            convolution.weight.copy_(weight)
            convolution.bias.copy_(bias)  # type: ignore[union-attr]
            activation = () if block.act_type == "linear" else (block.act,)
            network.set_submodule(name, nn.Sequential(convolution, *activation))
        elif isinstance(block, Conv3XC):  # it computes eval_conv anew in every forward pass
            block.update_params()
            merged = block.eval_conv.requires_grad_(True)
            activation = (nn.LeakyReLU(_SPAN_SLOPE, inplace=True),) if block.has_relu else ()
            network.set_submodule(name, nn.Sequential(merged, *activation))
    return network.eval()


def network_scale(network: nn.Module, channels: int = 3) -> int:
    """Upscaling factor, found by running the network once on a small black image.

    Raises:
        InputError: the network does not turn (1, C, H, W) into (1, C, s*H, s*W).
    """
    multiple = pad_multiple(network)
    smallest = math.ceil(_SMALLEST_PROBE / multiple) * multiple
    size = smallest_size(network, smallest, channels)
    if size is None:
        raise InputError(
            f"{type(network).__name__} does not take {_IMAGES.get(channels, 'an')} image"
            f" (1, {channels}, {smallest}, {smallest}), nor larger ones:"
            f" {_failure(network, smallest, channels)}"
        )
    shape = tuple(_output(network, size, channels).shape)
    scale = shape[-1] // size
    if shape != (1, channels, scale * size, scale * size):
        raise InputError(
            f"{type(network).__name__} turns (1, {channels}, {size}, {size}) into {shape}:"
            " only super-resolution with a whole scale is supported"
        )
    return scale


def smallest_size(network: nn.Module, size: int, channels: int = 3) -> int | None:
    """The first of ``size``, its double, ... 16 times it, that the network takes as height and width."""
    sizes = (size * factor for factor in (1, 2, 4, 8, 16))
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
        f"{type(network).__name__} cannot run on crops of {size}x{size} ({key}={size * scale}):"
        f" {failure}; {remedy}"
    )


def _failure(network: nn.Module, size: int, channels: int) -> str | None:
    """Why the network does not run on an image of this height and width, if it does not."""
    try:
        _output(network, size, channels)
    except Exception as error:
        return " ".join(str(error).split()) or type(error).__name__
    return None


@torch.no_grad()
def _output(network: nn.Module, size: int, channels: int) -> Tensor:
    parameter = next(network.parameters())
    output: Tensor = network(parameter.new_zeros(1, channels, size, size))
    return output


def pad_multiple(network: nn.Module, override: int | None = None) -> int:
    """Number that H and W of an input must be multiples of; ``override`` wins where given.

    It is the least common multiple of all window and split sizes in the network and of what spandrel
    requires of an architecture of its own, else 1.
    """
    if override is not None:
        return override
    if isinstance(network, RRDBNet):  # it unshuffles pixels to reach scales below 4
        return {1: 4, 2: 2}.get(network.scale, 1)
    windows = [size for module in network.modules() for size in _window_sizes(module)]
    return math.lcm(*windows, _multiple_of_spandrel(network))


def _multiple_of_spandrel(network: nn.Module) -> int:
    module = type(network).__module__
    for support in MAIN_REGISTRY:
        if module.startswith(f"{type(support.architecture).__module__}."):
            try:
                described = support.architecture.load(network.state_dict())
            except Exception:  # folded, or with another state dict than it was published with
                return 1
            return int(described.size_requirements.multiple_of)
    return 1


def upscale(network: nn.Module, image: Tensor, scale: int, multiple: int) -> Tensor:
    """Runs the network on an image of any size.

    Args:
        image: shape ``(1, C, H, W)``, range 0 to 1.
        multiple: H and W are padded to multiples of it, right and bottom, by mirroring with the
            edge repeated, as SwinIR's official test does: on Set5 x3 DAT-light gets 34.75 dB, 34.74
            without the edge repeated, and 34.76 unpadded.

    Returns:
        Shape ``(1, C, scale * H, scale * W)``, not clamped.
    """
    height, width = image.shape[-2:]
    rows, columns = _mirrored(height, multiple), _mirrored(width, multiple)
    with torch.no_grad():
        output = network(image[..., rows[:, None], columns])
    return output[..., : scale * height, : scale * width]


def _architecture(network_g: dict[str, Any]) -> type[nn.Module]:
    name = network_g.get("type")
    if not isinstance(name, str):
        raise InputError("network_g needs a type, e.g. type: SwinIR")
    if not _registered(name):
        for other, architecture in _spandrel_architectures():
            if not _registered(other):
                ARCH_REGISTRY._do_register(other, architecture)
    if not _registered(name):
        names = {key.removesuffix(_BASICSR_SUFFIX) for key in ARCH_REGISTRY.keys()}  # noqa: SIM118
        raise InputError(f"network_g: unknown type {name!r}{_nearest(name, names)}")
    return ARCH_REGISTRY.get(name if name in ARCH_REGISTRY else name + _BASICSR_SUFFIX)


def _registered(name: str) -> bool:
    return name in ARCH_REGISTRY or name + _BASICSR_SUFFIX in ARCH_REGISTRY


def _spandrel_architectures() -> Iterator[tuple[str, type[nn.Module]]]:
    for support in MAIN_REGISTRY:
        module = sys.modules[type(support.architecture).__module__]
        for name in module.__all__:
            value = getattr(module, name)
            if isinstance(value, type) and issubclass(value, nn.Module):
                yield name, value


def _parameters(architecture: type[nn.Module]) -> set[str]:
    """Named arguments; a ``**kwargs`` that swallows misspelt ones does not count."""
    return {
        name
        for name, parameter in inspect.signature(architecture).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }


def _nearest(name: str, known: set[str]) -> str:
    by_lower_case = {other.lower(): other for other in sorted(known)}
    matches = difflib.get_close_matches(name.lower(), by_lower_case, n=3, cutoff=0.4)
    names = " or ".join(by_lower_case[match] for match in matches)
    return f": did you mean {names}?" if matches else ""


def _mirrored(size: int, multiple: int) -> Tensor:
    """Indices 0 ... size - 1, then back and forth up to the next multiple."""
    forth = torch.arange(size)
    return torch.cat([forth, forth.flip(0)])[torch.arange(size + -size % multiple) % (2 * size)]


def _window_sizes(module: nn.Module) -> Iterator[int]:
    for attribute in ("split_size", "window_size"):
        value = getattr(module, attribute, ())
        for size in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(size, int) and size > 0:
                yield size
