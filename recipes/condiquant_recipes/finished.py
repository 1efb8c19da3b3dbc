"""What an earlier call wrote, kept while all that it depends on is the same."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openvino as ov
from torch import nn

from condiquant_openvino.running.reading import file_digest
from condiquant_recipes.exporting import export, instruction_set
from condiquant_recipes.progress import Progress
from condiquant_recipes.recipe import Recipe
from condiquant_recipes.workspace import METRICS, Workspace, finite, remove, save_parameters

_EXPORTED, _FLOAT_IR = "exported", "float-ir"


@dataclass(frozen=True)
class Exported:
    """An IR that is there."""

    figures: dict[str, Any]
    """Of :func:`condiquant_recipes.exporting.export`."""
    seconds: float
    """That writing it took."""


def exported(
    workspace: Workspace,
    model: nn.Module,
    recipe: Recipe,
    multiple: int,
    progress: Progress,
    float_workspace: Workspace | None = None,
) -> Exported:
    """Write a run's parameters and IR, or keep the IR that is there of the same ones.

    Args:
        float_workspace: keeps the float network's IR for several runs.

    Raises:
        InputError, RuntimeError: as :func:`condiquant_recipes.exporting.export`.
    """
    save_parameters(model, workspace.network_path)
    if (kept := _kept(workspace, recipe)) is not None:
        return kept
    float_ir = None if float_workspace is None else _float_ir(float_workspace, recipe)
    started = time.perf_counter()
    figures = export(model, recipe, multiple, workspace.folder, progress, float_ir=float_ir)
    seconds = time.perf_counter() - started
    if float_workspace is not None:
        of_float = {"of": _depends(recipe), "files": _files(float_workspace.float_ir_path)}
        float_workspace.finish(_FLOAT_IR, of_float)
    of_run = {"of": _of_run(workspace, recipe), "files": _files(workspace.ir_path)}
    workspace.finish(_EXPORTED, {**of_run, "figures": figures, "seconds": seconds})
    return Exported(figures, seconds)


def complete(
    workspace: Workspace,
    recipe: Recipe,
    sets: Collection[str],
    precision: Mapping[str, Any] | None,
) -> dict[str, Any] | None:
    """The metrics of a run that has nothing left to do.

    Args:
        sets: test sets that it is scored on.
        precision: the record of a search, if the run has a target.
    """
    kept = _kept(workspace, recipe)
    try:
        metrics: dict[str, Any] = json.loads((workspace.folder / METRICS).read_text())
    except (OSError, ValueError):
        return None
    is_done = (
        kept is not None
        and metrics["ir"] == finite(kept.figures)
        and metrics["quantized"].keys() == set(sets)
        and metrics.get("precision") == finite(precision)
    )
    return metrics if is_done else None


def _kept(workspace: Workspace, recipe: Recipe) -> Exported | None:
    """The IR in the folder, if exporting would write the same."""
    if not workspace.network_path.is_file():
        return None
    depends = _of_run(workspace, recipe)
    if not _is_as_recorded(workspace, _EXPORTED, depends, workspace.ir_path):
        return None
    record = workspace.finished(_EXPORTED) or {}
    return Exported(record["figures"], record["seconds"])


def _float_ir(workspace: Workspace, recipe: Recipe) -> Path:
    """Where it is, or is to be if that which is there is another one."""
    if not _is_as_recorded(workspace, _FLOAT_IR, _depends(recipe), workspace.float_ir_path):
        remove(workspace.float_ir_path)
    return workspace.float_ir_path


def _is_as_recorded(workspace: Workspace, stage: str, of: Mapping[str, Any], ir: Path) -> bool:
    record = workspace.finished(stage)
    return record is not None and record["of"] == of and record["files"] == _files(ir)


def _of_run(workspace: Workspace, recipe: Recipe) -> dict[str, Any]:
    return _depends(recipe) | {"network": file_digest(workspace.network_path)}


def _depends(recipe: Recipe) -> dict[str, Any]:
    """What an IR depends on beside its network."""
    section = recipe.export.model_dump() | {"isa": instruction_set(recipe)}
    return {"export": section, "openvino": ov.get_version()}


def _files(ir: Path) -> dict[str, str | None]:
    """Digests of an IR's files; None for one that is not there."""
    files = (ir, ir.with_suffix(".bin"))
    return {file.name: file_digest(file) if file.is_file() else None for file in files}
