"""One layer inside ``condiquant_mode``: what is collected there and what is written back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from brevitas.graph.gpxq import GPxQ, LayerHandler
from brevitas.graph.utils import is_conv_transposed, is_quant_module
from brevitas.quant_tensor import _unpack_quant_tensor
from brevitas.utils.torch_utils import StopFwdException
from torch import Tensor, nn

from condiquant_plugin.errors import InputError
from condiquant_plugin.layerwise.moments import LayerGeometry, Moments, moments_of
from condiquant_plugin.layerwise.problem import LayerProblem, Method, Solution


class LayerReconditioner(GPxQ):
    """Moments of one layer's inputs, and the exchange of its weight.

    Args:
        layer: linear layer or convolution, plain or transposed, float or quantized.
        len_parallel_layers: layers that one forward pass feeds before it stops; ``None`` never stops.
        input_quantizer: for ``least_squares``; otherwise the layer's ``input_quant``.
    """

    def __init__(
        self,
        layer: nn.Module,
        name: str,
        config: Method,
        *,
        row_blocks: int = 1,
        input_quantizer: Callable[[Tensor], Tensor] | None = None,
        len_parallel_layers: int | None = None,
        create_weight_orig: bool = True,
        device: str = "cpu",
        dtype: torch.dtype = torch.float64,
    ) -> None:
        if getattr(layer, "is_same_padded_strided", False):
            raise InputError(
                f"{name} pads by its input's size (PaddingType.SAME with a stride): "
                "put it in name_blacklist"
            )
        super().__init__(layer, name, False, len_parallel_layers, False, device, dtype)
        self.create_weight_orig = create_weight_orig
        self.geometry, self.row_blocks, self.config = layer_geometry(layer), row_blocks, config
        self.input_quantizer = input_quantizer
        self.moments: Moments | None = None
        # A disabled weight quantizer would compute with weight_orig instead of the new weight.
        self._weight_orig: Tensor | None = layer._buffers.pop("weight_orig", None)

    def update_batch(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        current_layer: LayerHandler,
    ) -> None:
        """Forward pre-hook: add the moments of a batch."""
        if self.disable_pre_forward_hook:
            return
        current_layer.layer_names.add(self.name)
        x = _unpack_quant_tensor(args[0] if args else kwargs["input"]).detach()
        x = x if x.dtype == torch.float64 else x.float()
        quantized = self._quantized(x) if self.config.needs_quantized_inputs else None
        batch = moments_of(
            self._padded(x),
            self.geometry,
            None if quantized is None else self._padded(quantized),
            name=self.name,
            dtype=self.dtype,
        )
        batch = _moved(batch, self.device, self.dtype)
        self.moments = batch if self.moments is None else self.moments + batch
        if self.len_parallel_layers is not None:
            current_layer.forward_count += 1
            if current_layer.forward_count == self.len_parallel_layers:
                raise StopFwdException

    def _quantized(self, x: Tensor) -> Tensor:
        if self.input_quantizer is not None:
            return self.input_quantizer(x)
        proxy = getattr(self.layer, "input_quant", None)
        if proxy is None or proxy.fused_activation_quant_proxy is None:
            raise InputError(
                f'nothing quantizes the input of {self.name}: objective="least_squares" needs an '
                "input_quant on the layer or an entry in input_quantizers"
            )
        disabled, proxy.disable_quant = proxy.disable_quant, False
        try:
            quantized: Tensor = _unpack_quant_tensor(proxy(x))
        finally:
            proxy.disable_quant = disabled
        return quantized

    def _padded(self, x: Tensor) -> Tensor:
        """``x`` with the padding of a plain convolution, whatever its kind."""
        if self.geometry.kind != "conv":
            return x
        mode = self.layer.padding_mode
        padding = self.layer._reversed_padding_repeated_twice
        return F.pad(x, padding, mode="constant" if mode == "zeros" else mode)

    def problem(self) -> LayerProblem:
        """What is to be solved, on the weight's device."""
        if hasattr(self.layer, "allocate_params"):
            self.layer.allocate_params(self.layer)
        assert self.moments is not None
        weight, bias = self.layer.weight, self.layer.bias
        return LayerProblem(
            self.name,
            weight.detach(),
            None if bias is None else bias.detach(),
            _moved(self.moments, weight.device, self.config.moments_dtype),
            self.geometry,
            self.row_blocks,
        )

    def single_layer_update(self, solution: Solution, *, update_bias: bool) -> None:
        """Write the new weight, and the new bias if asked."""
        if self.create_weight_orig and self._weight_orig is None:
            self._weight_orig = self.layer.weight.detach().clone().cpu()
        self.layer.weight.data.copy_(solution.weight)
        if update_bias and solution.bias is not None:
            self.layer.bias.data.copy_(solution.bias)
        self.moments = None
        if has_weight_quantizer(self.layer):
            self._initialize_weight_quantizer()
        if hasattr(self.layer, "offload_params"):
            self.layer.offload_params(self.layer)

    def _initialize_weight_quantizer(self) -> None:
        """Scale or bounds anew: those there belong to the old weight."""
        proxy = self.layer.weight_quant
        training = proxy.training
        proxy.init_tensor_quant()
        proxy.train(training)
        if not proxy.requires_quant_input:
            proxy.tensor_quant(self.layer.weight)

    def put_weight_orig(self) -> None:
        """Register the weight from before, if there is one to keep."""
        if self._weight_orig is not None:
            self.layer.register_buffer("weight_orig", self._weight_orig)


def has_weight_quantizer(module: Any) -> bool:
    return bool(is_quant_module(module)) and module.weight_quant.tensor_quant is not None


def layer_geometry(layer: Any) -> LayerGeometry:
    """Geometry of the layer behind its padding, unless it is transposed."""
    if isinstance(layer, nn.Linear):
        return LayerGeometry()
    transposed = is_conv_transposed(layer)
    return LayerGeometry(
        kind="conv_transpose" if transposed else "conv",
        kernel_size=layer.kernel_size,
        stride=layer.stride,
        padding=layer.padding if transposed else (0,) * len(layer.kernel_size),
        output_padding=layer.output_padding,
        dilation=layer.dilation,
        groups=layer.groups,
    )


def _moved(moments: Moments, device: torch.device | str, dtype: torch.dtype) -> Moments:
    tensors = {f.name: getattr(moments, f.name) for f in fields(moments)[1:]}
    return replace(moments, **{n: t.to(device, dtype) for n, t in tensors.items() if t is not None})
