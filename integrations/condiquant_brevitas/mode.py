"""``condiquant_mode``: weight reconditioning in the manner of Brevitas' GPxQ modes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from brevitas.graph.gpxq import (
    SUPPORTED_CONV_OP,
    GraphModule,
    TorchGraphModule,
    gpxq_mode,
)
from brevitas.graph.utils import get_output_channel_dim
from brevitas.utils.torch_utils import StopFwdException
from torch import Tensor, nn

from condiquant_brevitas.moments_hook import LayerReconditioner, has_weight_quantizer
from condiquant_plugin.errors import InputError
from condiquant_plugin.layerwise.problem import LayerProblem, LayerReport, Solution, fused_blocks
from condiquant_plugin.methods.condiquant.reconditioning import (
    Objective,
    ReconditioningConfig,
    recondition,
)

_GRAPH_MODULES = (GraphModule, TorchGraphModule)


class condiquant_mode(gpxq_mode):
    """Recondition weights before they are quantized, https://arxiv.org/abs/2502.15478

    On a float model it takes every linear layer and convolution, on a model with weight quantizers the
    layers that have one; quantization is off inside, and the scales or bounds of the new weights are
    initialised anew. Order: this mode, ``layerwise_quantize``,
    ``calibration_mode``, then ``gptq_mode`` or ``gpfq_mode``, ``bias_correction_mode`` last.

    Args:
        model (Module): The model to recondition.
        strength (float): Strength of one proximal step. Default: 3e-3
        output_tolerance (Optional, float): Choose the strength per layer as the largest whose relative
            output error stays within this. Default: None
        steps (int): Proximal gradient steps. Default: 100
        objective (str): "condition" lowers the condition number; "least_squares" fits the float output
            from quantized inputs, so it needs ``input_quantizers`` or layers with a calibrated
            ``input_quant``. Default: "condition"
        config (Optional, ReconditioningConfig): All settings at once, instead of the four above.
        sequential (bool): Each layer sees the reconditioned ones before it: ``update()`` per layer as
            with GPTQ. Otherwise one forward per batch feeds all layers. ``num_layers`` counts the
            ``update()`` calls either way. Default: False
        update_bias (bool): Whether "least_squares" writes biases too. Brevitas keeps no bias from before,
            so with True the model is another one while quantization is disabled, which
            ``calibration_mode``, ``gpfq_mode`` and ``bias_correction_mode`` take for the float model;
            with False, ``bias_correction_mode`` is to find the biases, which ``report`` takes as found.
            Default: False
        row_blocks (Optional, Dict[str, int]): Blocks of rows that are matrices of their own, by layer
            name. Default: 3 for every layer called "qkv" whose rows divide by 3
        name_blacklist (Collection[str]): Layers, or modules with all their layers, to leave alone: the
            one given to ``layerwise_quantize``.
        input_quantizers (Optional, Dict[str, Callable]): What quantizes the input, by layer name.
        group_of_parallel_layers (Optional, List[List[str]]): Layers with the same input, updated
            together when ``sequential``. Default: None
        inplace (bool): Whether to recondition in place or a deep copy. Default: True
        create_weight_orig (bool): Keep the weights from before as ``weight_orig``, which quantized
            layers use while quantization is disabled; ``remove_weight_orig`` before saving.
            Default: True
        return_forward_output (bool): Whether calling the model returns its output. Default: False
        device (str): Device the moments are kept on, "same" for that of the layer. Default: cpu
        dtype (Optional, torch.dtype): Datatype the moments are kept in. Default: what the method asks for

    Attributes:
        report (Dict[str, LayerReport]): Condition number before and after and output error, by layer.

    Raises:
        InputError: a name that is not in the model, NaN or Inf, or inputs that nothing quantizes.

    Example:
        >>> with condiquant_mode(model) as condiquant:
        >>>     for _ in range(condiquant.num_layers):
        >>>         for img in calib_loader:
        >>>             condiquant.model(img)
        >>>         condiquant.update()
    """

    def __init__(
        self,
        model: nn.Module,
        strength: float = ReconditioningConfig.strength,
        output_tolerance: float | None = None,
        steps: int = ReconditioningConfig.steps,
        objective: Objective = "condition",
        config: ReconditioningConfig | None = None,
        sequential: bool = False,
        update_bias: bool = False,
        row_blocks: Mapping[str, int] | None = None,
        name_blacklist: Collection[str] = (),
        input_quantizers: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
        group_of_parallel_layers: Sequence[Sequence[str]] | None = None,
        inplace: bool = True,
        create_weight_orig: bool = True,
        return_forward_output: bool = False,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        config = config or ReconditioningConfig(objective, strength, output_tolerance, steps)
        if config.inputs == "compressed":
            raise InputError(
                'inputs="compressed" is for quantize_sr(): use sequential=True, or inputs="original"'
            )
        super().__init__(
            model=model,
            group_of_parallel_layers=group_of_parallel_layers,
            inplace=inplace,
            create_weight_orig=create_weight_orig,
            use_quant_activations=False,
            return_forward_output=return_forward_output,
            device=device,
            dtype=dtype or config.moments_dtype,
        )
        self._give_forward_back()  # upstream takes it here already, and an error would leave it taken
        self.disable_weight_quant = True
        self.config = config
        self.sequential, self.update_bias = sequential, update_bias
        self.row_blocks, self.input_quantizers = row_blocks, input_quantizers or {}
        self.report: dict[str, LayerReport] = {}
        for name in (*(row_blocks or ()), *self.input_quantizers, *name_blacklist):
            if name not in dict(self.model.named_modules()):
                raise InputError(f"there is no module {name!r} in {type(self.model).__name__}")
        self._excluded = {m for n in name_blacklist for m in self.model.get_submodule(n).modules()}
        quantized = {m for m in self.model.modules() if has_weight_quantizer(m)}
        if quantized:
            self._excluded |= set(self.model.modules()) - quantized

    def _is_module_supported(self, module: nn.Module) -> bool:
        supported = isinstance(module, (nn.Linear, *SUPPORTED_CONV_OP))
        return supported and module not in self._excluded

    def initialize_module_optimizer(
        self, layer: nn.Module, name: str, len_parallel_layers: int, create_weight_orig: bool
    ) -> LayerReconditioner:
        """Upstream's hook: what collects a layer's moments."""
        return LayerReconditioner(
            layer,
            name,
            self.config,
            row_blocks=self._row_blocks(name, layer),
            input_quantizer=self.input_quantizers.get(name),
            len_parallel_layers=len_parallel_layers if self.sequential else None,
            create_weight_orig=create_weight_orig,
            device=self.device,
            dtype=self.dtype,
        )

    def _row_blocks(self, name: str, layer: Any) -> int:
        rows = layer.weight.shape[get_output_channel_dim(layer)]
        if self.row_blocks is None:
            return fused_blocks(name, rows)
        blocks = self.row_blocks.get(name, 1)
        if blocks < 1 or rows % blocks:
            raise InputError(f"row_blocks={blocks} of {name} does not divide its {rows} rows")
        return blocks

    def __enter__(self) -> condiquant_mode:
        try:
            super().__enter__()
            for name, layer in self.gpxq_layers.items():
                self.hook_dict[name].remove()
                hook = partial(layer.update_batch, current_layer=self.current_layer)
                self.hook_dict[name] = layer.layer.register_forward_pre_hook(hook, with_kwargs=True)
        except BaseException:
            self._leave(None, None, None)
            raise
        if not self.sequential:
            self.num_layers = 1
        if isinstance(self.model, _GRAPH_MODULES):
            type(self.model).forward = self.catch_stopfwd
        else:
            self.model.forward = self.catch_stopfwd
        return self

    def __exit__(self, type: Any, value: Any, traceback: Any) -> None:
        self._leave(type, value, traceback)
        if type is None:
            self._warn_about_untouched()

    def _leave(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._give_forward_back()
        for hook in self.hook_dict.values():
            hook.remove()
        for layer in self.gpxq_layers.values():
            layer.put_weight_orig()

    def _give_forward_back(self) -> None:
        original = getattr(self.orig_forward, "__func__", None)
        if isinstance(self.model, _GRAPH_MODULES):
            type(self.model).forward = original
        elif original is type(self.model).forward:
            self.model.__dict__.pop("forward", None)
        else:  # an attribute already before
            self.model.forward = self.orig_forward

    def _warn_about_untouched(self) -> None:
        left = [layer for name, layer in self.gpxq_layers.items() if name not in self.report]
        seen = [layer.name for layer in left if layer.moments is not None]
        unseen = [layer.name for layer in left if layer.moments is None]
        if seen:
            warnings.warn(
                f"not reconditioned, update() was not called: {', '.join(seen)}", stacklevel=3
            )
        if unseen:
            warnings.warn(f"not reconditioned, no batch reached: {', '.join(unseen)}", stacklevel=3)

    @torch.no_grad()
    def catch_stopfwd(self, *args: Any, **kwargs: Any) -> Any:
        """The model's ``forward`` inside the block."""
        self.current_layer.forward_count = 0
        try:
            output = self.orig_forward(*args, **kwargs)
        except StopFwdException:
            output = self._forward_without_hooks(*args, **kwargs)
        return output if self.return_forward_output else None

    def _forward_without_hooks(self, *args: Any, **kwargs: Any) -> Any:
        if not self.return_forward_output:
            return None
        try:
            for layer in self.gpxq_layers.values():
                layer.disable_pre_forward_hook = True
            return self.orig_forward(*args, **kwargs)
        finally:
            for layer in self.gpxq_layers.values():
                layer.disable_pre_forward_hook = False

    @torch.no_grad()
    def update(self) -> None:
        """Recondition the layers that the batches since the last update have reached."""
        names = [name for name in self.gpxq_layers if name in self.current_layer.layer_names]
        layers = [self.gpxq_layers[name] for name in names]
        solutions = self._solved([layer.problem() for layer in layers])
        for name, layer, solution in zip(names, layers, solutions, strict=True):
            layer.single_layer_update(solution, update_bias=self.update_bias)
            self.report[name] = solution.report
            self.hook_dict[name].remove()
        self.current_layer.layer_names.clear()

    def _solved(self, problems: Sequence[LayerProblem]) -> list[Solution]:
        return recondition(problems, self.config)
