"""``compress_weights()`` with NNCF's arguments: its own modes, and those of this project."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from itertools import islice
from typing import Any

import nncf
import torch
from nncf.common.factory import build_graph
from nncf.common.utils.backend import BackendType, get_backend
from nncf.scopes import get_ignored_node_names_from_ignored_scope
from nncf.torch.function_hook import is_wrapped, wrap_model
from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import GraphModelWrapper
from nncf.torch.function_hook.wrapper import ATR_HOOK_STORAGE
from torch import nn

from condiquant_nncf.layers import IgnoredScopeError
from condiquant_plugin.compression import MODES, CompressionConfig, compress_blocks
from condiquant_plugin.errors import InputError, check_count
from condiquant_plugin.layerwise.blocks import Inputs

_DEFAULT_GROUP = CompressionConfig.group_size


class CompressWeightsMode(StrEnum):
    """Modes beside those of ``nncf``; docs/weight_compression.md says what each costs."""

    ROUNDING = "rounding"
    BILLM = "billm"
    ARB = "arb"
    ARB_X = "arb_x"
    ARB_RC = "arb_rc"
    PBS2P = "pbs2p"
    ADASVD = "adasvd"
    GPTQ = "gptq"
    MAGNITUDE = "magnitude"


_PRUNING = (CompressWeightsMode.PBS2P, CompressWeightsMode.MAGNITUDE)


def compress_weights(
    model: Any,
    *,
    mode: nncf.CompressWeightsMode | CompressWeightsMode | str = nncf.CompressWeightsMode.INT8_ASYM,
    ratio: float | None = None,
    group_size: int | None = None,
    ignored_scope: nncf.IgnoredScope | None = None,
    all_layers: bool | None = None,
    dataset: nncf.Dataset | None = None,
    sensitivity_metric: nncf.SensitivityMetric | None = None,
    subset_size: int = 128,
    awq: bool | None = None,
    scale_estimation: bool | None = None,
    gptq: bool | None = None,
    lora_correction: bool | None = None,
    backup_mode: nncf.BackupMode | None = None,
    compression_format: nncf.CompressionFormat = nncf.CompressionFormat.DQ,
    advanced_parameters: nncf.AdvancedCompressionParameters | None = None,
    bitmaps: bool = False,
    pattern: tuple[int, int] | None = None,
    adaptive: bool | None = None,
    rounds: int | None = None,
    residual_rank: int = 0,
    inputs: Inputs | None = None,
    bits: int | None = None,
    progress: Callable[[str], object] | None = None,
) -> Any:
    """``nncf.compress_weights``, with the modes of :class:`CompressWeightsMode` beside NNCF's.

    Embeddings and the head stay as they are. A torch model is changed in place, as NNCF does it, one
    block's moments in memory at a time; :func:`condiquant_plugin.compression.compressed_weights` gives the
    forms of its weights. Of an ``ov.Model`` a new one is returned, with the forms in it: see
    :func:`condiquant_nncf.write_compressed`.

    Args:
        model: an ``nn.Module`` whose blocks are in a list, or an ``ov.Model``.
        mode: NNCF's, which gets all of NNCF's arguments as they are, or one of this project, by value or
            by name, in capitals too.
        ratio: of ``"adasvd"``: the parameters retained, 0.8 by default.
        group_size: columns that share scales; 64 by default, -1 for a whole row.
        ignored_scope: NNCF's, matched against its node names.
        dataset: token ids as the model takes them: needed in the modes of this project.
        subset_size: how many items of it to use.
        bitmaps, pattern, rounds, residual_rank, inputs, bits: see
            :class:`condiquant_plugin.compression.CompressionConfig`.
        adaptive: likewise. Of an ``ov.Model``, whose blocks are not known, it must stay off, and layers are
            solved on the float model's values.
        progress: called with the name of each finished block of a torch model.

    Raises:
        InputError: an argument outside its range, or that the mode does not have; no dataset; a model
            without layers; NaN or Inf.
        nncf.ValidationError: an ``ignored_scope`` that matches nothing.
    """
    given = {
        "all_layers": all_layers,
        "sensitivity_metric": sensitivity_metric,
        "awq": awq,
        "scale_estimation": scale_estimation,
        "gptq": gptq,
        "lora_correction": lora_correction,
        "backup_mode": backup_mode,
        "advanced_parameters": advanced_parameters,
    }
    own = _own_mode(mode)
    if own is None:
        extra = {
            "bitmaps": bitmaps,
            "pattern": pattern,
            "adaptive": adaptive,
            "rounds": rounds,
            "residual_rank": residual_rank,
            "inputs": inputs,
            "bits": bits,
        }
        for name, value in extra.items():
            if value:
                raise InputError(f"{name}={value!r} is not for NNCF's mode {mode}: leave it out")
        return nncf.compress_weights(
            model,
            mode=nncf.CompressWeightsMode(mode.lower()),
            ratio=ratio,
            group_size=group_size,
            ignored_scope=ignored_scope,
            dataset=dataset,
            subset_size=subset_size,
            compression_format=compression_format,
            **given,
        )
    for name, value in given.items():
        if value:
            raise InputError(f"{name}={value!r} is for NNCF's modes: leave it out with {own}")
    if compression_format != nncf.CompressionFormat.DQ:
        raise InputError(f"compression_format={compression_format!r} is for NNCF's modes: use DQ")
    check_count("subset_size", subset_size)
    if pattern is not None and own not in _PRUNING:
        raise InputError(f"pattern={pattern}: only pbs2p and magnitude prune, leave it out")
    is_torch = _is_torch(model)
    for name, value in (("adaptive", adaptive), ("inputs", inputs)):
        if value in (True, "compressed") and not is_torch:
            raise InputError(
                f"{name}={value!r} needs the blocks of a torch model: give it, or leave it out"
            )
    config = CompressionConfig(
        own.value,
        ratio,
        _DEFAULT_GROUP if group_size is None else group_size,
        bitmaps,
        pattern or CompressionConfig.pattern,
        is_torch if adaptive is None else adaptive,
        rounds,
        residual_rank,
        inputs=inputs or CompressionConfig.inputs,
        bits=bits,
    )
    if dataset is None:
        raise InputError(f"mode={own} needs a dataset: give nncf.Dataset(token ids)")
    items = list(islice(dataset.get_inference_data(), subset_size))
    if not items:
        raise InputError("the dataset is empty: give at least one item")
    if not is_torch:
        from condiquant_nncf.compress_openvino import compress_model

        return compress_model(model, items, config.method(), ignored_scope)
    ignored = _ignored_layers(model, ignored_scope, items[0])
    compress_blocks(model, items, config, is_excluded=ignored.__contains__, progress=progress)
    return model


def _own_mode(mode: Any) -> CompressWeightsMode | None:
    """None for one of NNCF's.

    Raises:
        InputError: neither.
    """
    value = str(getattr(mode, "value", mode)).lower()
    if value in MODES:
        return CompressWeightsMode(value)
    known = [m.value for m in nncf.CompressWeightsMode]
    if value not in known:
        raise InputError(f"mode={mode!r} is not known: use {', '.join([*MODES, *known])}")
    return None


def _is_torch(model: Any) -> bool:
    kind = get_backend(model)
    if kind not in (BackendType.TORCH, BackendType.OPENVINO):
        raise InputError(f"there is no {kind.value} backend: give a torch model or an ov.Model")
    return kind is BackendType.TORCH


def _ignored_layers(model: nn.Module, scope: nncf.IgnoredScope | None, example: Any) -> set[str]:
    """Modules whose operations are in the scope, by NNCF's graph of the model."""
    if scope is None:
        return set()
    with _traced(model) as traced, torch.no_grad():
        graph = build_graph(GraphModelWrapper(traced, example))
    try:
        ignored = get_ignored_node_names_from_ignored_scope(scope, graph, strict=scope.validate)
    except nncf.ValidationError as error:
        raise IgnoredScopeError(" ".join(f"ignored_scope: {error}".split())) from error
    found = set()
    for name in ignored:
        for before in graph.get_previous_nodes(graph.get_node_by_name(name)):
            constant = getattr(before.layer_attributes, "name", None)
            if constant is not None:
                found.add(str(constant).rpartition(".")[0])
    return found


@contextmanager
def _traced(model: nn.Module) -> Iterator[nn.Module]:
    """With NNCF's hooks, which are gone afterwards."""
    if is_wrapped(model):
        yield model
        return
    names = ("forward", "_replicate_for_data_parallel")
    before = {name: vars(model)[name] for name in names if name in vars(model)}
    try:
        yield wrap_model(model)
    finally:
        for name in names:
            vars(model).pop(name, None)
        vars(model).update(before)
        model._modules.pop(ATR_HOOK_STORAGE, None)
