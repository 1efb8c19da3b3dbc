"""Which layers and products of a network are quantized: found by running it once, without a graph."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from brevitas import nn as qnn
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from condiquant_brevitas.products import stubs_name
from condiquant_plugin.calls import Dependence, calling_module, factors
from condiquant_plugin.errors import InputError
from condiquant_plugin.layerwise.scope import Kind, Scope, select_layers

QUANT_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: qnn.QuantLinear,
    nn.Conv2d: qnn.QuantConv2d,
    nn.ConvTranspose2d: qnn.QuantConvTranspose2d,
}
_WEIGHTED_FUNCTIONS: dict[Any, Kind] = {
    F.linear: "linear",
    F.multi_head_attention_forward: "linear",
    F.conv2d: "convolution",
    F.conv_transpose2d: "convolution",
}


@dataclass(frozen=True)
class Layer:
    """A layer with a weight, a product of activations, or a call of a weighted function elsewhere."""

    name: str
    """Module name; of a product, that of the stubs it will have; of a call, the function behind it."""
    module: nn.Module
    """The layer, or the module that computes the product or calls the function."""
    product: tuple[str, int, Any] | None = None
    """Of a product, what :func:`condiquant_brevitas.products.insert_stubs` takes."""
    function: Any = None
    """Of a call outside ``QUANT_LAYERS``, such as in ``nn.MultiheadAttention``; cannot be quantized."""
    in_scope: bool = True
    """False for a layer outside the scope, which gets bits of its own."""

    @property
    def kind(self) -> Kind:
        """What the scope asks for."""
        if self.product:
            return "product"
        if self.function is not None:
            return _WEIGHTED_FUNCTIONS[self.function]
        return "linear" if isinstance(self.module, nn.Linear) else "convolution"


class _Recorder(TorchFunctionMode):
    """Notes layers and products whose input depends on the image, in the order of computation."""

    def __init__(self, model: nn.Module, image: Dependence) -> None:
        super().__init__()
        self._image = image
        self._names = {module: name for name, module in model.named_modules()}
        self._products: Counter[nn.Module] = Counter()
        self.calls: Counter[nn.Module] = Counter()
        self.layers: list[Layer] = []

    def note_call(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Forward pre-hook of every module."""
        self.calls[module] += 1
        if type(module) in QUANT_LAYERS and self._image.reaches((args or (kwargs["input"],))[0]):
            self.layers.append(Layer(self._names[module], module))

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        multiplied = factors(func, args, kwargs)
        if multiplied or func in _WEIGHTED_FUNCTIONS:
            module = calling_module(sys._getframe(1))
            if module is not None and module in self._names:
                if multiplied:
                    self._note_product(func, module, multiplied)
                elif type(module) not in QUANT_LAYERS:
                    self._note_function(func, module, tree_leaves((args, kwargs)))
        return func(*args, **kwargs)

    def _note_product(self, func: Any, module: nn.Module, multiplied: Sequence[Tensor]) -> None:
        product = self._names[module], self._products[module], func
        self._products[module] += 1
        if all(map(self._image.reaches, multiplied)):
            self.layers.append(Layer(stubs_name(*product[:2]), module, product))

    def _note_function(self, func: Any, module: nn.Module, leaves: Sequence[Any]) -> None:
        if any(map(self._image.reaches, leaves)):
            name = ".".join(filter(None, (self._names[module], func.__name__)))
            self.layers.append(Layer(name, module, function=func))


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
    products with a parameter that are no module.

    Args:
        example: one image, ``(1, channels, height, width)``.
        scope: see :data:`condiquant_plugin.layerwise.scope.Scope`.
        others: also the linear layers and convolutions outside the scope, marked as such.
        name_blacklist: layers, or modules with all their layers and products, to leave alone.

    Raises:
        InputError: if nothing is left to quantize; a name that is not there; a layer that runs twice; a
            linear layer or 2-d convolution that is none of ``QUANT_LAYERS``.
    """
    recorder = _record(model, example)
    found, kind = recorder.layers, type(model).__name__
    known = {*dict(model.named_modules()), *(layer.name for layer in found)}
    for name in name_blacklist:
        if name not in known:
            raise InputError(f"there is no module {name!r} in {kind}")
    selected = select_layers(
        found,
        lambda layer: layer.kind,
        scope,
        is_excluded=lambda layer: _is_in(layer.name, name_blacklist),
        others=others,
        network=kind,
        exclusion="name_blacklist",
    )
    layers = [replace(layer, in_scope=in_scope) for layer, in_scope in selected]
    _check_quantizable(model, layers)
    _check_used_once(layers, recorder.calls)
    return layers


def _record(model: nn.Module, example: Tensor) -> _Recorder:
    """Values are followed, not gradients: those end where a network detaches or rounds."""
    image = Dependence()
    recorder = _Recorder(model, image)
    parameters = [(p, p.requires_grad) for p in model.parameters()]
    hooks = [
        module.register_forward_pre_hook(recorder.note_call, with_kwargs=True)
        for module in model.modules()
    ]
    try:
        for parameter, _ in parameters:
            parameter.requires_grad_(False)
        # With gradients PyTorch's attention takes no fast path, which would hide its functions. Networks
        # may change their input in place, which a leaf forbids.
        with torch.enable_grad(), recorder, image:
            model(image.start(example.clone().detach().requires_grad_().clone()))
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, needed in parameters:
            parameter.requires_grad_(needed)
    return recorder


def _is_in(name: str, blacklist: Collection[str]) -> bool:
    return any(name == entry or name.startswith(f"{entry}.") for entry in blacklist)


def _check_quantizable(model: nn.Module, layers: Sequence[Layer]) -> None:
    for layer in layers:
        parent = layer.name.rpartition(".")[0]
        if not layer.product and isinstance(
            model.get_submodule(parent), nn.TransformerEncoderLayer
        ):
            raise InputError(
                f"{parent or type(model).__name__} is an nn.TransformerEncoderLayer, whose fast path "
                "passes quantizers by: put it in name_blacklist or compute it with nn.Linear modules and "
                "products"
            )
    for layer in layers:
        if layer.function is not None:
            raise InputError(
                f"{layer.name} is a call in a {type(layer.module).__name__}, of which no quantized layer "
                "exists: put it in name_blacklist or compute it with nn.Linear and nn.Conv2d modules"
            )


def _check_used_once(layers: Sequence[Layer], calls: Counter[nn.Module]) -> None:
    weights = Counter(layer.module.weight for layer in layers if not layer.product)
    for layer in layers:
        shared = not layer.product and weights[layer.module.weight] > 1
        if calls[layer.module] > 1 or shared:
            raise InputError(
                f"{layer.name} is used more than once in a forward pass, and one pair of bounds does not "
                "serve both: put it in name_blacklist"
            )
