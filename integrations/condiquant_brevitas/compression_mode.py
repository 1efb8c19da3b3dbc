"""``weight_compression_mode``: weights of few bits in the manner of Brevitas' GPxQ modes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

from condiquant_brevitas.mode import condiquant_mode
from condiquant_brevitas.moments_hook import LayerReconditioner
from condiquant_plugin.compression import CompressionConfig, Mode, keep_form
from condiquant_plugin.errors import InputError
from condiquant_plugin.layerwise.problem import LayerProblem, Solution


class weight_compression_mode(condiquant_mode):
    """Give the layers weights of few bits or of low rank, with the protocol of ``gptq_mode``.

    Layers compute with the dense weight of their form, which
    :func:`condiquant_plugin.compression.compressed_weights` gives. All layers have one rank or pattern:
    what is adaptive needs ``condiquant_plugin.compression.compress_blocks``, which knows the blocks.

    Args:
        model (Module): The model to compress.
        method (str): See :class:`condiquant_plugin.compression.CompressionConfig`. Default: "arb_rc"
        sequential (bool): Each layer sees the compressed ones before it: ``update()`` per layer as with
            GPTQ. Otherwise one forward per batch feeds all layers. Default: True
        name_blacklist (Collection[str]): Layers, or modules with all their layers, to leave alone: the head
            of a language model.
        group_of_parallel_layers (Optional, List[List[str]]): Layers with the same input, updated
            together when ``sequential``. Default: None
        inplace (bool): Whether to compress in place or a deep copy. Default: True
        create_weight_orig (bool): Keep the weights from before as ``weight_orig``. Default: False
        return_forward_output (bool): Whether calling the model returns its output. Default: False
        device (str): Device the moments are kept on, "same" for that of the layer. Default: cpu
        dtype (Optional, torch.dtype): Datatype the moments are kept in. Default: what the method asks for
        settings: Other settings of ``CompressionConfig``: ``group_size``, ``ratio``, ``pattern``, ``bits``,
            ``bitmaps``, ``rounds``, ``residual_rank``, ``compensation``.

    Attributes:
        report (Dict[str, CompressionReport]): Output error and bits per weight, by layer.

    Raises:
        InputError: a setting outside its range, or that is not for this mode; a name that is not in the
            model; NaN or Inf.

    Example:
        >>> with weight_compression_mode(model, method="arb_rc", name_blacklist=["lm_head"]) as mode:
        >>>     for _ in range(mode.num_layers):
        >>>         for ids in calib_loader:
        >>>             mode.model(ids)
        >>>         mode.update()
    """

    def __init__(
        self,
        model: nn.Module,
        method: Mode = "arb_rc",
        sequential: bool = True,
        name_blacklist: Collection[str] = (),
        group_of_parallel_layers: Sequence[Sequence[str]] | None = None,
        inplace: bool = True,
        create_weight_orig: bool = False,
        return_forward_output: bool = False,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        **settings: Any,
    ) -> None:
        for name, remedy in (
            ("inputs", "use sequential"),
            ("adaptive", "use condiquant_plugin.compression.compress_blocks"),
        ):
            if name in settings:
                raise InputError(f"{name}={settings[name]!r} is not for this mode: {remedy}")
        self.method = CompressionConfig(method, **settings).method()
        super().__init__(
            model,
            sequential=sequential,
            name_blacklist=name_blacklist,
            group_of_parallel_layers=group_of_parallel_layers,
            inplace=inplace,
            create_weight_orig=create_weight_orig,
            return_forward_output=return_forward_output,
            device=device,
            dtype=dtype or self.method.moments_dtype,
        )

    def initialize_module_optimizer(
        self, layer: nn.Module, name: str, len_parallel_layers: int, create_weight_orig: bool
    ) -> LayerReconditioner:
        """Upstream's hook: what collects a layer's moments."""
        found = super().initialize_module_optimizer(
            layer, name, len_parallel_layers, create_weight_orig
        )
        found.config = self.method
        return found

    def _solved(self, problems: Sequence[LayerProblem]) -> list[Solution]:
        solutions = self.method.solve(problems)
        for problem, solution in zip(problems, solutions, strict=True):
            keep_form(self.gpxq_layers[problem.name].layer, solution)
        return solutions
