"""Which layers and products of a network are quantized: found by running it once, without a graph."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from brevitas import nn as qnn
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from condiquant_brevitas.products import calling_module, factors, stubs_name
from condiquant_plugin.errors import InputError

Scope = Literal["transformer", "all"]
QUANT_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: qnn.QuantLinear,
    nn.Conv2d: qnn.QuantConv2d,
    nn.ConvTranspose2d: qnn.QuantConvTranspose2d,
}


@dataclass(frozen=True)
class Layer:
    """A layer with a weight, or a product of activations."""

    name: str
    """Module name; of a product, that of the stubs it will have."""
    module: nn.Module
    """The layer, or the module that computes the product."""
    product: tuple[str, int, Any] | None = None
    """Of a product, what :func:`condiquant_brevitas.products.insert_stubs` takes."""
    in_scope: bool = True
    """False for a layer outside the scope, which gets bits of its own."""


class _Recorder(TorchFunctionMode):
    """Notes layers and products whose input depends on the image, in the order of computation."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._names = {module: name for name, module in model.named_modules()}
        self._products: Counter[nn.Module] = Counter()
        self.calls: Counter[nn.Module] = Counter()
        self.layers: list[Layer] = []

    def note_call(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Forward pre-hook of every module."""
        self.calls[module] += 1
        if type(module) in QUANT_LAYERS and (args or (kwargs["input"],))[0].requires_grad:
            self.layers.append(Layer(self._names[module], module))

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if multiplied := factors(func, args, kwargs):
            module = calling_module(sys._getframe(1))
            if module is not None and module in self._names:
                product = self._names[module], self._products[module], func
                self._products[module] += 1
                if all(factor.requires_grad for factor in multiplied):
                    self.layers.append(Layer(stubs_name(*product[:2]), module, product))
        return func(*args, **kwargs)


def find_layers(
    model: nn.Module,
    example: Tensor,
    scope: Scope,
    *,
    others: bool = False,
    name_blacklist: Collection[str] = (),
) -> list[Layer]:
    """Layers to quantize, in the order in which the network computes them.

    Layers whose input does not depend on the image (position-bias tables) are left alone, and so are
    products with a parameter that are no module. Dependence is seen by gradients: gradient checkpointing
    is to be off.

    Args:
        example: one image, ``(1, channels, height, width)``.
        scope: ``"transformer"`` takes linear layers and products of activations (attention);
            ``"all"`` takes every linear layer and convolution but the first and the last, and products.
        others: also the linear layers and convolutions outside the scope, marked as such.
        name_blacklist: layers, or modules with all their layers and products, to leave alone.

    Raises:
        InputError: if nothing is left to quantize; a name that is not there; a layer that runs twice.
    """
    recorder = _record(model, example)
    found, kind = recorder.layers, type(model).__name__
    known = {*dict(model.named_modules()), *(layer.name for layer in found)}
    for name in name_blacklist:
        if name not in known:
            raise InputError(f"there is no module {name!r} in {kind}")
    if not found:
        raise InputError(
            f"{kind} has no linear layer, 2-d convolution or product of activations behind its input: "
            "there is nothing to quantize"
        )
    if scope == "transformer":
        outside = [la for la in found if not la.product and not isinstance(la.module, nn.Linear)]
    else:
        weighted = [layer for layer in found if not layer.product]
        outside = weighted[:1] + weighted[-1:]
    layers = [
        replace(layer, in_scope=layer not in outside)
        for layer in found
        if (others or layer not in outside) and not _is_in(layer.name, name_blacklist)
    ]
    if not any(layer.in_scope for layer in layers):
        hint = (
            'use scope "all" for convolutional networks'
            if scope == "transformer"
            else "it leaves out the first and the last layer"
        )
        raise InputError(
            f"scope={scope!r} matches no layer of {kind}: {hint}, and check name_blacklist"
        )
    _check_used_once(layers, recorder.calls)
    return layers


def _record(model: nn.Module, example: Tensor) -> _Recorder:
    """A value depends on the image if it needs its gradient where nothing else does."""
    recorder = _Recorder(model)
    parameters = [(p, p.requires_grad) for p in model.parameters()]
    hooks = [
        module.register_forward_pre_hook(recorder.note_call, with_kwargs=True)
        for module in model.modules()
    ]
    try:
        for parameter, _ in parameters:
            parameter.requires_grad_(False)
        with torch.enable_grad(), recorder:
            # Networks may change their input in place, which a leaf forbids.
            model(example.detach().requires_grad_().clone())
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, needed in parameters:
            parameter.requires_grad_(needed)
    return recorder


def _is_in(name: str, blacklist: Collection[str]) -> bool:
    return any(name == entry or name.startswith(f"{entry}.") for entry in blacklist)


def _check_used_once(layers: Sequence[Layer], calls: Counter[nn.Module]) -> None:
    weights = Counter(layer.module.weight for layer in layers if not layer.product)
    for layer in layers:
        shared = not layer.product and weights[layer.module.weight] > 1
        if calls[layer.module] > 1 or shared:
            raise InputError(
                f"{layer.name} is used more than once in a forward pass, and one pair of bounds does not "
                "serve both: put it in name_blacklist"
            )
