"""The output folder of a run: finished stages on disk, so that a rerun with --resume goes on."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from condiquant_plugin import __version__
from condiquant_plugin.errors import InputError
from condiquant_plugin.files import replacing, write_atomic
from condiquant_recipes.recipe import Recipe, load_recipe

RECIPE, _STAGES, _NETWORK = "recipe.yml", "stages", "quantized.safetensors"
CROPS = "crops"
"""What a run's digest of its calibration crops is called, of all that it must share to be resumed."""
METRICS, SENSITIVITY = "metrics.json", "sensitivity.svg"
_RESULTS = (_NETWORK, "model.xml", "model.bin", METRICS, SENSITIVITY)


_DISTILLED = f"{_STAGES}/distilled.json"
_SHOWN_KEYS = 3


class OtherRunError(InputError):
    """The folder holds a run of something else."""


class Workspace:
    """Paths and files of one output folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reused = False
        """Whether an earlier run's stages are kept."""

    @classmethod
    def create(
        cls,
        folder: Path,
        recipe: Recipe,
        network: nn.Module,
        data: Path,
        *,
        resume: bool,
        overwrite: bool = False,
        also: Mapping[str, Any] | None = None,
        stale: Iterable[Path] = (),
        report: Path | None = None,
    ) -> Workspace:
        """Make or reopen the folder.

        What a run that has got as far as a trained network left is dropped only by ``overwrite``: without
        it, another run is refused, and the same one goes on from its stages. Of others all is dropped
        but by ``resume``. With both the same run goes on, and another one is dropped.

        Args:
            resume: go on from the finished stages.
            overwrite: start anew.
            network, data: the float network and the data folder, which a resumed run must share.
            also: what else it must share, as JSON.
            stale: files and folders to drop where nothing is resumed, beside those of a run.
            report: what is there once the folder is finished; by default results of a run.

        Raises:
            OtherRunError: another recipe, other weights, data or version.
            InputError: not writable.
        """
        workspace = cls(folder)
        identity = {"recipe": recipe.digest(), **_given(network, data, also)}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            results = [report] if report else [folder / name for name in (*_RESULTS, _DISTILLED)]
            finished = not overwrite and any(path.exists() for path in results)
            before = workspace.finished("identity") if resume or finished else None
            changes = workspace._changes(before, identity, recipe, exporting=not resume)
            if (before or finished) and changes:
                if not overwrite:
                    raise OtherRunError(
                        f"{folder} holds another run ({', '.join(changes)}): give another --out, or"
                        " --overwrite to drop it"
                    )
                before = None
            workspace.reused = before is not None
            if not workspace.reused:
                # The identity first: what an interrupted removal leaves belongs to no run.
                for path in (folder / _STAGES, *(folder / name for name in _RESULTS), *stale):
                    remove(path)
            (folder / _STAGES).mkdir(exist_ok=True)
            workspace.finish("identity", identity)
            write_atomic(workspace.recipe_path, recipe.to_yaml().encode())
        except OSError as error:
            raise InputError(
                f"cannot write to {folder}: {error.strerror}; give another --out"
            ) from error
        return workspace

    def _changes(
        self,
        before: Mapping[str, Any] | None,
        identity: Mapping[str, Any],
        recipe: Recipe,
        *,
        exporting: bool,
    ) -> list[str]:
        """What differs from the run in the folder; ``exporting``: the recipe's ``export``, too."""
        if before is None:
            return ["of unknown settings"]
        others = [key for key in identity if identity[key] != before.get(key)]
        if "recipe" in others and CROPS in others:
            others.remove(CROPS)  # which another recipe may well have
        changes = [f"other {key}" for key in others]
        try:
            recorded = load_recipe(self.recipe_path)
        except InputError:
            return changes
        ours, theirs = (_flat(each.model_dump()) for each in (recipe, recorded))
        keys = [
            f"{key}={theirs.get(key)}, not {ours.get(key)}"
            for key in ours | theirs
            if ours.get(key) != theirs.get(key) and (exporting or not key.startswith("export."))
        ]
        return changes + keys[:_SHOWN_KEYS]

    @classmethod
    def open(cls, folder: Path) -> tuple[Workspace, Recipe]:
        """Open the folder of a finished run.

        Raises:
            InputError: if it holds none.
        """
        workspace = cls(folder)
        if not workspace.network_path.exists():
            raise InputError(
                f"{folder} holds no finished run: give the folder of one (`condiquant run` with --out"
                " makes it), or an experiment of `condiquant train`"
            )
        return workspace, load_recipe(workspace.recipe_path)

    @property
    def recipe_path(self) -> Path:
        return self.folder / RECIPE

    @property
    def network_path(self) -> Path:
        """Parameters of the finished quantized network, bounds included."""
        return self.folder / _NETWORK

    @property
    def ir_path(self) -> Path:
        return self.folder / "model.xml"

    @property
    def float_ir_path(self) -> Path:
        """The float network of several runs, to measure their IRs beside."""
        return self.folder / _STAGES / "float.xml"

    @property
    def distillation_path(self) -> Path:
        """Where distillation keeps its state."""
        return self.folder / _STAGES / "distillation.pt"

    def finished(self, stage: str) -> dict[str, Any] | None:
        """What a finished stage recorded, if it has finished."""
        path = self.folder / _STAGES / f"{stage}.json"
        if not path.exists():
            return None
        record: dict[str, Any] = json.loads(path.read_text())
        return record

    def finished_with(
        self, stage: str, network: nn.Module, data: Path, also: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        """As :meth:`finished`, by any recipe, but with this network and data only; see :meth:`create`."""
        identity = self.finished("identity") or {}
        given = _given(network, data, also)
        same = all(identity.get(key) == value for key, value in given.items())
        return self.finished(stage) if same else None

    def finish(
        self, stage: str, record: Mapping[str, Any], network: nn.Module | None = None
    ) -> None:
        """Record a stage, with the network's parameters if it changed them."""
        if network is not None:
            save_parameters(network, self.folder / _STAGES / f"{stage}.safetensors")
        write_atomic(self.folder / _STAGES / f"{stage}.json", json.dumps(record).encode())

    def restore(self, stage: str, network: nn.Module) -> None:
        """Load the parameters that a finished stage left."""
        load_parameters(network, self.folder / _STAGES / f"{stage}.safetensors")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of sections by dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= (
            _flat(value, f"{prefix}{key}.")
            if isinstance(value, dict)
            else {f"{prefix}{key}": value}
        )
    return flat


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there.

    Raises:
        InputError: if it cannot be removed.
    """
    try:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"cannot remove {path}: {reason}; give another --out") from error


def finite(value: Any) -> Any:
    """As standard JSON has it: null where a number is infinite."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_metrics(path: Path, metrics: Mapping[str, Any]) -> None:
    """Write standard JSON: infinite condition numbers become null."""
    text = json.dumps(finite(dict(metrics)), indent=1, allow_nan=False)
    write_atomic(path, text.encode())


def _given(network: nn.Module, data: Path, also: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a run must share with an earlier one to go on from its stages, beside the recipe."""
    return {
        "weights": digest_of(dict(network.named_parameters())),
        "data": str(data.resolve()),
        "version": __version__,
        **(also or {}),
    }


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of names and values."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def save_parameters(network: nn.Module, path: Path) -> None:
    """Save all parameters (not buffers: those come with the architecture)."""
    tensors = {n: p.detach().contiguous().clone() for n, p in network.named_parameters()}
    with replacing(path) as temporary:
        save_file(tensors, temporary)


@torch.no_grad()
def load_parameters(network: nn.Module, path: Path) -> None:
    """Load what :func:`save_parameters` saved.

    Raises:
        InputError: unreadable, or the parameters of another network.
    """
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read {path}: {error}; run again without --resume") from error
    own = dict(network.named_parameters())
    if own.keys() != tensors.keys():
        name = min(own.keys() ^ tensors.keys())
        raise InputError(f"{path} belongs to another network (parameter {name}): run again")
    for name, parameter in own.items():
        parameter.copy_(tensors[name])
