"""What users give, made what every host takes: a plain float32 network with one output, and images."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from condiquant_plugin.errors import InputError
from condiquant_plugin.uniform.fake_quantizer import FakeQuantizer

_IMAGE_CHANNELS = (1, 3, 4)
_NOT_COPIED = {"__dict__", "__weakref__"}
_SMALLEST_CHANGE = 2.0**-12


def plain_float_copy(network: nn.Module) -> nn.Module:
    """A deep copy in evaluation mode, float32, without what stands between a network and its layers.

    ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel`` are taken off; weight norm,
    spectral norm, other parametrizations and pruning masks are folded into the weights they compute.
    A network in another precision is cast, with a warning.

    Raises:
        InputError: no ``nn.Module``, or one that TorchScript or ``torch.export`` made.
    """
    network = _unwrapped(network)
    _check_is_eager(network)
    # What a network keeps from a forward pass with gradients refuses a deep copy.
    kept = {id(t): t.detach().clone() for t in _kept_results(network)}
    result = copy.deepcopy(network, kept).eval()
    for name, module in list(result.named_modules()):
        if name and (inner := _unwrapped(module)) is not module:
            result.set_submodule(name, inner)
    for module in list(result.modules()):
        _fold_computed_weights(module)
    others = {p.dtype for p in result.parameters() if p.is_floating_point()} - {torch.float32}
    if others:
        names = ", ".join(sorted(str(dtype) for dtype in others))
        warnings.warn(
            f"{type(result).__name__} has parameters in {names}: its float32 copy is taken",
            stacklevel=3,
        )
        result.float()
    return result


def image_batch(images: Any, *, takes: Callable[[Tensor], bool] | None = None) -> Tensor:
    """Calibration images as a float32 tensor ``(count, channels, height, width)``.

    Args:
        images: such a tensor or array of any float dtype, a single image without its first axis, or a
            sequence of either, all of one size.
        takes: whether the network takes an input, for networks whose inputs are no images: three axes
            are then only an image if it does not take them as they are.

    Raises:
        InputError: nothing, no floats, NaN or Inf, images of several sizes, or channels last.
    """
    batch = _as_tensor(images)
    if not batch.numel() or not batch.ndim:
        raise InputError(
            f"no calibration images: shape {tuple(batch.shape)} holds no images, give at least one as "
            "(count, channels, height, width)"
        )
    if not batch.is_floating_point():
        raise InputError(
            f"calibration images of {batch.dtype}: give floats in the range of the network's training, "
            "images.float() / 255 for 0 to 1"
        )
    batch = batch.detach().float()
    if not batch.isfinite().all():
        raise InputError("NaN or Inf in the calibration images: check how they were read")
    if batch.ndim == 3 and (takes is None or not takes(batch[:1])):
        batch = batch[None]
    if batch.ndim == 4 and _has_channels_last(batch.shape):
        raise InputError(
            f"calibration images of shape {tuple(batch.shape)} have their channels last: give "
            "images.permute(0, 3, 1, 2)"
        )
    if takes is None and batch.ndim != 4:
        raise InputError(
            f"calibration images of shape {tuple(batch.shape)}: give (count, channels, height, width)"
        )
    return batch


def check_is_float32(network: nn.Module) -> None:
    """Raise :class:`InputError` if a parameter has another precision."""
    for name, parameter in network.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise InputError(f"{name} is {parameter.dtype}: call network.float() before")


def check_output(network: nn.Module, output: Any) -> Tensor:
    """Return the output of ``network`` if it is one tensor.

    Raises:
        InputError: several outputs, or none; names the remedy.
    """
    if isinstance(output, Tensor):
        return output
    kind = type(output).__name__
    if isinstance(output, list | tuple | dict):
        kind = f"{kind} of {len(output)}"
    raise InputError(
        f"{type(network).__name__} returns a {kind} instead of one image: wrap it in a module whose "
        "forward returns the image alone"
    )


@torch.no_grad()
def rebuilt_parameters(network: nn.Module, run: Callable[[nn.Module], Any]) -> set[str]:
    """Names of the parameters that a forward pass overwrites: what is put into them is lost.

    Args:
        network: left untouched; a copy of it runs.
        run: the forward pass.

    Raises:
        InputError: the pass fails, or gives something else than one tensor.
    """
    trial = copy.deepcopy(network).eval()
    parameters = dict(trial.named_parameters())
    for place, parameter in enumerate(parameters.values(), start=1):
        if parameter.is_floating_point():  # each by a factor of its own, or copies would stay equal
            parameter.mul_(1 + _SMALLEST_CHANGE * (1 + place / len(parameters)))
            parameter.add_(_SMALLEST_CHANGE**2 * place)
    before = {name: parameter.clone() for name, parameter in parameters.items()}
    try:
        output = run(trial)
    except InputError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
        raise InputError(
            f"{type(network).__name__} does not take an item of the calibration images: {reason}"
        ) from error
    check_output(network, output)
    after = dict(trial.named_parameters())
    return {name for name, value in before.items() if not _equal(after.get(name), value)}


def refuse_rebuilt(
    layer: str, weight: str, rebuilt: set[str] | frozenset[str], remedy: str
) -> None:
    """Raise :class:`InputError` if a layer's weight is among :func:`rebuilt_parameters`."""
    if weight in rebuilt:
        raise InputError(
            f"{layer} gets its weight anew in every forward pass, so a quantized one would be lost: "
            f"put one layer of the final weight in its place (re-parameterise), or {remedy}"
        )


def _equal(value: Tensor | None, before: Tensor) -> bool:
    if value is None or value.shape != before.shape:
        return False
    return bool(torch.allclose(value, before, rtol=0, atol=0, equal_nan=True))


def _unwrapped(network: nn.Module) -> nn.Module:
    while True:
        if isinstance(network, nn.DataParallel | nn.parallel.DistributedDataParallel):
            network = network.module
        elif isinstance(compiled := getattr(network, "_orig_mod", None), nn.Module):
            network = compiled
        else:
            return network


def _check_is_eager(network: Any) -> None:
    remedy = "give the nn.Module that it was made from"
    if not isinstance(network, nn.Module):
        raise InputError(f"the network is a {type(network).__name__}: {remedy}")
    for name, module in network.named_modules():
        place = name or "the network"
        if isinstance(module, torch.jit.ScriptModule):
            raise InputError(f"{place} is a {type(module).__name__} of TorchScript: {remedy}")
        graph = module.graph if isinstance(module, torch.fx.GraphModule) else None
        if graph and any(isinstance(node.target, torch._ops.OpOverload) for node in graph.nodes):
            raise InputError(f"{place} comes from torch.export: {remedy}")


def _kept_results(network: nn.Module) -> Iterator[Tensor]:
    for module in network.modules():
        for value in (*vars(module).values(), *module._buffers.values()):
            if isinstance(value, Tensor) and not value.is_leaf:
                yield value


@torch.enable_grad()  # what needs no gradient would become a buffer
def _fold_computed_weights(module: nn.Module) -> None:
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, WeightNorm):
            remove_weight_norm(module, hook.name)
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(module, hook.name)
        elif isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)
    steps = getattr(module, "parametrizations", {}) if parametrize.is_parametrized(module) else {}
    names = [n for n, some in steps.items() if not any(isinstance(s, FakeQuantizer) for s in some)]
    if names:
        # A copy shares its class with the original, which would lose its parametrizations as well.
        shared = type(module)
        own = {name: value for name, value in vars(shared).items() if name not in _NOT_COPIED}
        module.__class__ = type(shared.__name__, shared.__bases__, own)
    for name in names:
        parametrize.remove_parametrizations(module, name, leave_parametrized=True)


def _as_tensor(images: Any) -> Tensor:
    if isinstance(images, Tensor):
        return images
    if isinstance(images, np.ndarray):
        if images.dtype.kind not in "fiub":
            raise InputError(f"calibration images of {images.dtype}: give an array of floats")
        return torch.from_numpy(np.ascontiguousarray(images))
    if not isinstance(images, Sequence) or isinstance(images, str):
        raise InputError(
            f"calibration images are a {type(images).__name__}: give a tensor, an array or a list of them"
        )
    parts = [_as_tensor(image) for image in images]
    if not parts:
        return torch.empty(0)
    batches = [part[None] if part.ndim == 3 else part for part in parts]
    shapes = sorted({tuple(batch.shape[1:]) for batch in batches})
    if len(shapes) > 1:
        raise InputError(
            f"calibration images of several sizes, {shapes[0]} and {shapes[1]}: cut crops of one size"
        )
    return torch.cat(batches)


def _has_channels_last(shape: Sequence[int]) -> bool:
    _, first, _, last = shape
    return last in _IMAGE_CHANNELS and first > max(_IMAGE_CHANNELS)
