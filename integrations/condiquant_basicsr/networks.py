"""Networks from a BasicSR ``network_g`` section, and running them on images of any size."""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from basicsr.archs.ecbsr_arch import ECB
from basicsr.utils.registry import ARCH_REGISTRY
from spandrel import MAIN_REGISTRY
from spandrel.architectures.SPAN.__arch.span import Conv3XC
from torch import Tensor, nn

from condiquant_basicsr.own_networks import OWN_PACKAGE, is_own, own_class
from condiquant_basicsr.own_networks import parameters as own_parameters
from condiquant_plugin.errors import InputError

_BASICSR_SUFFIX = "_basicsr"  # BasicSR's own suffix for names that Real-ESRGAN registers, too
_CHANNEL_ARGUMENTS = ("num_in_ch", "in_chans", "in_nc")
_SPAN_SLOPE = 0.05


def build_network(network_g: dict[str, Any]) -> nn.Module:
    """Network of a ``network_g`` section, randomly initialised, in eval mode.

    Args:
        network_g: ``{"type": "SwinIR", "upscale": 4, ...}``; the type is one of BasicSR's
            ARCH_REGISTRY or, where that has none of the name, an architecture of spandrel, or
            ``FILE.py:Class``, whose code is run.

    Raises:
        InputError: unknown type, unknown argument, or values that the architecture refuses.
    """
    architecture = _architecture(network_g)
    arguments = {name: value for name, value in network_g.items() if name != "type"}
    known = _parameters(architecture)
    takes = "" if known is None else f"; it takes {', '.join(sorted(known)) or 'none'}"
    for name in arguments:
        if known is not None and name not in known:
            raise InputError(
                f"network_g: {network_g['type']} has no argument {name!r}{_nearest(name, known)}{takes}"
            )
    try:
        network = architecture(**arguments)
    except InputError as error:
        raise InputError(f"network_g: {error}") from error
    except Exception as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"network_g: {network_g['type']} cannot be built from these arguments ({message}){takes}"
        ) from error
    if not isinstance(network, nn.Module):
        raise InputError(
            f"network_g: {network_g['type']} gives a {type(network).__name__}, not a torch.nn.Module"
        )
    return network.eval()


def scale_argument(network_g: dict[str, Any]) -> str | None:
    """Name of the argument that sets the scale of this architecture, if it has one."""
    known = _parameters(_architecture(network_g))
    return next((name for name in ("upscale", "scale") if name in (known or ())), None)


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


def _architecture(network_g: dict[str, Any]) -> Callable[..., nn.Module]:
    name = network_g.get("type")
    if not isinstance(name, str):
        raise InputError("network_g needs a type, e.g. type: SwinIR")
    if is_own(name):
        return own_class(name)
    if not _registered(name):
        for other, architecture in _spandrel_architectures():
            if not _registered(other):
                ARCH_REGISTRY._do_register(other, architecture)
    if not _registered(name):
        names = {key.removesuffix(_BASICSR_SUFFIX) for key in ARCH_REGISTRY.keys()}  # noqa: SIM118
        raise InputError(f"network_g: unknown type {name!r}{_nearest(name, names)}")
    found: type[nn.Module] = ARCH_REGISTRY.get(
        name if name in ARCH_REGISTRY else name + _BASICSR_SUFFIX
    )
    return found


def _registered(name: str) -> bool:
    return name in ARCH_REGISTRY or name + _BASICSR_SUFFIX in ARCH_REGISTRY


def _spandrel_architectures() -> Iterator[tuple[str, type[nn.Module]]]:
    for support in MAIN_REGISTRY:
        module = sys.modules[type(support.architecture).__module__]
        for name in module.__all__:
            value = getattr(module, name)
            if isinstance(value, type) and issubclass(value, nn.Module):
                yield name, value


def _parameters(architecture: Callable[..., nn.Module]) -> set[str] | None:
    """Named arguments; ``None``: any. A ``**kwargs`` of BasicSR's and spandrel's does not count."""
    if architecture.__module__.startswith(OWN_PACKAGE):
        return own_parameters(architecture)
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
