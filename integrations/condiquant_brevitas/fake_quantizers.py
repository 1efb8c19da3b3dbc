"""A network with learned-bounds quantizers as float layers with the core's fake quantizers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

from brevitas import nn as qnn
from brevitas.graph.base import ModuleToModuleByInstance
from brevitas.graph.utils import set_module
from brevitas.nn.mixin.base import QuantLayerMixin
from brevitas.nn.quant_layer import QuantNonLinearActLayer
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from condiquant_brevitas.layers import QUANT_LAYERS
from condiquant_brevitas.tensor_quant import LearnedBoundsQuant
from condiquant_plugin.errors import InputError
from condiquant_plugin.uniform.bits import FLOAT_BITS
from condiquant_plugin.uniform.fake_quantizer import FakeQuantizer

_PLAIN_LAYERS = {quantized: plain for plain, quantized in QUANT_LAYERS.items()}


def to_fake_quantizers(model: nn.Module) -> nn.Module:
    """A deep copy of ``model`` that computes the same without Brevitas.

    Layers are float ones with :class:`condiquant_plugin.FakeQuantizer` modules on weight and input;
    exporters such as ``condiquant_openvino.convert`` take them.

    Args:
        model (Module): All its quantizers have learned bounds, such as from :func:`quantize_sr`. Linear
            layers, 2-d convolutions, ``QuantIdentity`` and other activations.

    Raises:
        InputError: another quantizer or layer, or bounds that are not known yet; names the module.
    """
    model = deepcopy(model)
    plain: dict[nn.Module, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, QuantLayerMixin):
            if module not in plain:
                plain[module] = _plain(module, name or type(module).__name__)
            if not name:
                return plain[module]
            set_module(model, plain[module], name)
    return model


def _plain(module: Any, name: str) -> nn.Module:
    if isinstance(module, QuantNonLinearActLayer):
        _refuse(module, name, "input_quant")
        quantizer = _quantizer(module.act_quant, name) or nn.Identity()
        if isinstance(module, qnn.QuantIdentity):
            return quantizer
        return nn.Sequential(
            module.act_quant.fused_activation_quant_proxy.activation_impl, quantizer
        )
    if type(module) not in _PLAIN_LAYERS or getattr(module, "is_same_padded_strided", False):
        raise InputError(
            f"{name} is a {type(module).__name__}, which has no float counterpart here: "
            "use an exporter of Brevitas"
        )
    _refuse(module, name, "bias_quant", "output_quant")
    return _plain_layer(module, name)


def _plain_layer(module: Any, name: str) -> nn.Module:
    rewriter = ModuleToModuleByInstance(module, _PLAIN_LAYERS[type(module)])
    layer: nn.Module = rewriter.init_new_module(module, load_state_dict=False)
    layer.weight, layer.bias = module.weight, module.bias
    if (weight_quantizer := _quantizer(module.weight_quant, name)) is not None:
        parametrize.register_parametrization(layer, "weight", weight_quantizer)
    if (quantizer := _quantizer(module.input_quant, name)) is not None:
        _add_input_quantizer(layer, quantizer)
    return layer.train(module.training)


@contextmanager
def watching_float_inputs(layers: Iterable[Any]) -> Iterator[None]:
    """Inside, inputs that nothing quantizes pass a fake quantizer without a grid."""
    floats = [layer for layer in layers if not layer.input_quant.is_quant_enabled]
    hooks = [_add_input_quantizer(x, FakeQuantizer(FLOAT_BITS, "activation")) for x in floats]
    try:
        yield
    finally:
        for layer, hook in zip(floats, hooks, strict=True):
            hook.remove()
            del layer.input_quantizer


def input_quantizer(layer: Any) -> FakeQuantizer:
    """Of a Brevitas layer with learned bounds, or what :func:`watching_float_inputs` puts there."""
    proxy = layer.input_quant
    found = proxy.fused_activation_quant_proxy.tensor_quant if proxy.is_quant_enabled else None
    quantizer: FakeQuantizer = layer.input_quantizer if found is None else found.quantizer
    return quantizer


def _add_input_quantizer(layer: nn.Module, quantizer: FakeQuantizer) -> RemovableHandle:
    layer.add_module("input_quantizer", quantizer)
    return layer.register_forward_pre_hook(_quantize_input, with_kwargs=True)


def _quantize_input(layer: Any, args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    x = args[0] if args else kwargs["input"]
    return (layer.input_quantizer(x),), {}


def _refuse(module: nn.Module, name: str, *kinds: str) -> None:
    for kind in kinds:
        if getattr(module, kind).is_quant_enabled:
            raise InputError(f"{name} has an {kind}, which cannot be expressed: set {kind}=None")


def _quantizer(proxy: Any, name: str) -> FakeQuantizer | None:
    if not proxy.is_quant_enabled:
        return None
    found = getattr(proxy, "fused_activation_quant_proxy", proxy).tensor_quant
    if not isinstance(found, LearnedBoundsQuant):
        raise InputError(
            f"{name} is not quantized with learned bounds but with {type(found).__name__}: "
            "use an exporter of Brevitas, or LearnedBounds quantizers"
        )
    if not found.init_done:
        raise InputError(f"{name} has no bounds yet: calibrate the model first")
    return found.quantizer
