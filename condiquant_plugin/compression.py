"""Weights of a chain of blocks in few bits: which method, with what settings, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

import torch
from torch import nn

from condiquant_plugin.errors import InputError, check_choice
from condiquant_plugin.layerwise.blocks import (
    LAYERS,
    Inputs,
    find_blocks,
    solve_block_by_block,
    write_dense,
)
from condiquant_plugin.layerwise.importance import block_importance
from condiquant_plugin.layerwise.problem import Method, Solution
from condiquant_plugin.methods.adasvd.method import AdaSVD
from condiquant_plugin.methods.adasvd.ranks import check_ratio, layer_ratios, ranks_for
from condiquant_plugin.methods.arb.method import ARB, Refinement
from condiquant_plugin.methods.compression.feedback import Compensation
from condiquant_plugin.methods.compression.form import CompressedWeight
from condiquant_plugin.methods.compression.stacks import CompressionReport
from condiquant_plugin.methods.gptq.integers import IntegerGPTQ
from condiquant_plugin.methods.pbs2p.magnitude import Magnitude
from condiquant_plugin.methods.pbs2p.method import PBS2P
from condiquant_plugin.methods.pbs2p.search import patterns_for

Mode = Literal[
    "rounding", "billm", "arb", "arb_x", "arb_rc", "pbs2p", "adasvd", "gptq", "magnitude"
]
MODES: tuple[Mode, ...] = get_args(Mode)
_SPREAD_OF_RATIOS = 0.2
"""What the least important layer may lose of the ratio."""
_ATTRIBUTE = "condiquant_weight"


@dataclass(frozen=True)
class CompressionConfig:
    """What to make of the weights.

    Raises:
        InputError: a setting outside its range, or one that the mode does not have.
    """

    mode: Mode = "arb_rc"
    ratio: float | None = None
    """Only ``"adasvd"``: of the parameters of all layers, retained (0.8 by default)."""
    group_size: int = 64
    """Columns that share scales; -1 is a whole row. Not ``"adasvd"``, ``"magnitude"``."""
    bitmaps: bool = False
    """Groups of elements with scales of their own, which no kernel knows: BiLLM's for ``"billm"``, column
    and group bitmaps for ARB, salient columns and two scales for ``"pbs2p"``."""
    pattern: tuple[int, int] = (4, 8)
    """Only ``"pbs2p"``, ``"magnitude"``: N of every M weights kept."""
    adaptive: bool = True
    """Ranks or patterns by what each block does to its input, the average as asked for."""
    rounds: int | None = None
    """Of refinement; None is the method's own."""
    residual_rank: int = 0
    """Of a low-rank matrix for what is left. Not ``"adasvd"``, ``"magnitude"``."""
    compensation: Compensation = "exact"
    """Of the error of a block of columns by later ones. Not ``"adasvd"``, ``"magnitude"``."""
    inputs: Inputs = "compressed"
    """Whose values layers are solved on; see :data:`condiquant_plugin.layerwise.blocks.Inputs`."""
    bits: int | None = None
    """Only ``"gptq"``: of a code (4 by default)."""

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, MODES)
        check_choice("inputs", self.inputs, get_args(Inputs))
        if self.ratio is not None:
            check_ratio("ratio", self.ratio)
            if self.mode != "adasvd" and self.ratio != 1:
                raise InputError(
                    f"ratio={self.ratio}: {self.mode} compresses all layers, leave it out"
                )
        if self.mode == "adasvd" and self.residual_rank:
            raise InputError(
                f"residual_rank={self.residual_rank}: adasvd is a low rank itself, raise ratio"
            )
        if self.mode == "magnitude" and self.residual_rank:
            raise InputError(
                f"residual_rank={self.residual_rank}: magnitude only prunes, leave it out"
            )
        if self.mode in ("adasvd", "gptq", "magnitude") and self.bitmaps:
            raise InputError(f"bitmaps=True: {self.mode} has none, leave it out")
        if self.mode == "rounding" and self.bitmaps:
            raise InputError("bitmaps=True: rounding has none, use billm")
        if self.bits is not None and self.mode != "gptq":
            raise InputError(f"bits={self.bits}: only gptq has a choice, leave it out")
        if self.rounds is not None and self.mode in ("gptq", "magnitude"):
            raise InputError(f"rounds={self.rounds}: {self.mode} has none, leave it out")
        self.method()

    @property
    def retained(self) -> float:
        """Of the parameters, for ``"adasvd"``."""
        return 0.8 if self.ratio is None else self.ratio

    def method(self) -> AdaSVD | ARB | PBS2P | IntegerGPTQ | Magnitude:
        """The same for all layers."""
        if self.mode == "adasvd":
            return AdaSVD(self.retained, self.rounds)
        if self.mode == "magnitude":
            return Magnitude(self.pattern)
        common: dict[str, Any] = {
            "group_size": self.group_size,
            "compensation": self.compensation,
            "residual_rank": self.residual_rank,
        }
        if self.mode == "gptq":
            bits = IntegerGPTQ.bits if self.bits is None else self.bits
            return IntegerGPTQ(**common, bits=bits)
        if self.mode == "pbs2p":
            if self.bitmaps:
                common |= {"salient_share": 0.1, "large_quantile": 0.8}
            rounds = PBS2P.rounds if self.rounds is None else self.rounds
            return PBS2P(**common, pattern=self.pattern, rounds=rounds)
        kind = "group" if self.mode == "billm" else "column_group"
        return ARB(
            **common,
            refinement=cast(Refinement, self.mode),
            bitmaps=cast(Any, kind if self.bitmaps else "none"),
            rounds=self.rounds,
        )


def compress_blocks(
    model: nn.Module,
    batches: Sequence[Any],
    config: CompressionConfig,
    *,
    is_excluded: Callable[[str], bool] = lambda name: False,
    progress: Callable[[str], object] | None = None,
) -> dict[str, CompressionReport]:
    """Compress the layers of the blocks in place, one block's moments in memory at a time.

    A layer then computes with the dense weight of its form, which :func:`compressed_weights` gives.
    Embeddings, head and all else outside the blocks stay as they are.

    Args:
        batches: as :func:`condiquant_plugin.layerwise.blocks.solve_block_by_block` takes them; the model
            must keep no cache between calls.
        is_excluded: whether a layer stays as it is.
        progress: called with the name of each finished block.

    Returns:
        A report of every compressed layer, by name.

    Raises:
        InputError: no layers or batches; a setting that does not fit a layer; NaN or Inf in weights or
            inputs.
        DistributedError: another process ended or failed.
    """
    method: Method = config.method()
    if config.adaptive and config.mode in ("adasvd", "pbs2p"):
        method = _adapted(model, batches, config, is_excluded)

    def write(layer: nn.Module, solution: Solution) -> None:
        write_dense(layer, solution)
        keep_form(layer, solution)

    reports = solve_block_by_block(
        model,
        batches,
        method,
        is_excluded=is_excluded,
        inputs=config.inputs,
        write=write,
        progress=progress,
    )
    return cast(dict[str, CompressionReport], reports)


def keep_form(layer: nn.Module, solution: Solution) -> None:
    """Let :func:`compressed_weights` find the form of a layer's weight."""
    setattr(layer, _ATTRIBUTE, solution.form)


def compressed_weights(model: nn.Module) -> dict[str, CompressedWeight]:
    """Forms of the weights of a model that was compressed, by layer."""
    forms = {name: vars(module).get(_ATTRIBUTE) for name, module in model.named_modules()}
    return {name: form for name, form in forms.items() if isinstance(form, CompressedWeight)}


def bits_per_weight(reports: Mapping[str, CompressionReport]) -> float:
    """Of all layers together."""
    stored = sum(r.bits_per_weight * r.parameters for r in reports.values())
    return stored / sum(r.parameters for r in reports.values())


def _adapted(
    model: nn.Module,
    batches: Sequence[Any],
    config: CompressionConfig,
    is_excluded: Callable[[str], bool],
) -> Method:
    blocks = find_blocks(model)
    shapes = {
        name: (len(weight), weight[0].numel())
        for block in blocks
        for name, weight in _weights_of(model, block)
        if not is_excluded(name)
    }
    if not batches or not shapes:
        return config.method()  # whose caller says what is missing
    changes = block_importance(model, batches, blocks)
    importances = {
        name: next(changes[block] for block in blocks if name.startswith(f"{block}."))
        if name not in changes
        else changes[name]
        for name in shapes
    }
    mean = sum(importances.values()) / len(importances)
    relative = {name: value / mean if mean else 1.0 for name, value in importances.items()}
    sizes = {name: rows * features for name, (rows, features) in shapes.items()}
    method = config.method()
    if isinstance(method, AdaSVD):
        least = max(config.retained - _SPREAD_OF_RATIOS, 0.0)
        ratios = layer_ratios(list(relative.values()), list(sizes.values()), config.retained, least)
        by_name = dict(zip(shapes, ratios, strict=True))
        return replace(method, ranks=ranks_for(by_name, shapes, config.retained))
    assert isinstance(method, PBS2P)
    return replace(method, patterns=patterns_for(relative, sizes, config.pattern))


def _weights_of(model: nn.Module, block: str) -> Iterator[tuple[str, torch.Tensor]]:
    for name, module in model.get_submodule(block).named_modules():
        if isinstance(module, LAYERS):
            yield f"{block}.{name}".strip("."), cast(torch.Tensor, module.weight)
