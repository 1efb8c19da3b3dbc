"""`condiquant train` and `condiquant test`: BasicSR's loop around NNCF's quantized network."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from statistics import median
from typing import Any

from pydantic import ValidationError
from torch import Tensor, nn

import condiquant_nncf as nncf_host
from condiquant_basicsr import pad_multiple
from condiquant_basicsr import training as basicsr_training
from condiquant_basicsr.preflight import check_network
from condiquant_basicsr.quantizer import ENTRY, TrainableNetwork, read_quantized
from condiquant_plugin import __version__
from condiquant_plugin.errors import InputError
from condiquant_recipes import settings
from condiquant_recipes.exporting import check_convertible, check_overflow
from condiquant_recipes.recipe import QUANTIZATION_KEYS, Recipe, recorded
from condiquant_recipes.recipe_errors import explain
from condiquant_recipes.run import rebuild
from condiquant_recipes.training.options import (
    MODEL_TYPE,
    TrainingSection,
    check_evaluation,
    check_training,
    load_options,
    recipe_from_options,
)

_STRUCTURE = (*QUANTIZATION_KEYS, "ignored_scope")


def train(
    file: Path,
    force_yml: Sequence[str] = (),
    *,
    launcher: str = "none",
    auto_resume: bool = False,
    debug: bool = False,
) -> None:
    """Run BasicSR's training; arguments and errors: :func:`condiquant_basicsr.training.train`.

    Raises:
        InputError: see there; unknown keys or values out of range.
    """
    options = load_options(file, force_yml)
    quantizer = _for_training(options)
    if quantizer is None:
        check_network(options)
    basicsr_training.train(
        options, file, quantizer, launcher=launcher, auto_resume=auto_resume, debug=debug
    )


def evaluate(
    file: Path, force_yml: Sequence[str] = (), *, launcher: str = "none", debug: bool = False
) -> None:
    """Run BasicSR's evaluation of a quantized checkpoint; the checkpoint knows its settings.

    The training set of a training YAML is left out.

    Raises:
        InputError: see :func:`condiquant_basicsr.training.test`; a float checkpoint, or options that
            contradict the checkpoint.
    """
    options = load_options(file, force_yml)
    if isinstance(datasets := options.get("datasets"), dict):
        datasets.pop("train", None)
    quantizer = _for_test(options) if options.get("model_type") == MODEL_TYPE else None
    basicsr_training.evaluate(options, file, quantizer, launcher=launcher, debug=debug)


def quantizer_for(options: Mapping[str, Any]) -> NNCFQuantizer:
    """What CondiQuantModel runs with in BasicSR's own pipelines (an entry point of this package).

    Args:
        options: as BasicSR has parsed them.

    Raises:
        InputError: see :func:`train` and :func:`evaluate`.
    """
    quantizer = _for_training(options) if options["is_train"] else _for_test(options)
    assert quantizer is not None
    return quantizer


def _for_training(options: Mapping[str, Any]) -> NNCFQuantizer | None:
    """Checked; None for BasicSR's own models."""
    for note in check_training(options):
        _note(note)
    if options.get("model_type") != MODEL_TYPE:
        return None
    recipe = recipe_from_options(options)
    check_overflow(recipe)
    return NNCFQuantizer(recipe)


def _for_test(options: Mapping[str, Any]) -> NNCFQuantizer:
    """As the checkpoint says, whose settings the options may not contradict."""
    check_evaluation(options)
    if not (source := options["path"].get("pretrain_network_g")):
        raise InputError(
            "path.pretrain_network_g is missing: give the net_g_latest.pth of an experiment"
        )
    recipe = recorded(read_quantized(Path(source).expanduser())[ENTRY], source)
    asked = {"network_g": options.get("network_g"), "scale": options.get("scale")}
    if section := options.get("condiquant"):
        asked["condiquant"] = _validated(section)
    return NNCFQuantizer(recipe, asked=asked)


def _validated(section: Mapping[str, Any]) -> dict[str, Any]:
    """The given keys of a ``condiquant`` section, in full."""
    try:
        return TrainingSection.model_validate(section).model_dump(include=set(section))
    except ValidationError as error:
        raise InputError(explain(error, TrainingSection, "condiquant")) from error


def _note(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {text}")


class NNCFQuantizer:
    """What CondiQuantModel needs of a recipe (:class:`condiquant_basicsr.quantizer.NetworkQuantizer`).

    Args:
        asked: what of a checkpoint's recipe must be so; all that its structure depends on by default.
    """

    def __init__(self, recipe: Recipe, *, asked: Mapping[str, Any] | None = None) -> None:
        self.recipe = recipe
        self.distillation = recipe.condiquant.distillation
        self.calibration_images = recipe.datasets.calibration.count
        self.asked = _structure(recipe.model_dump() if asked is None else asked)

    def __repr__(self) -> str:
        bits, scope = self.recipe.bits.label.upper(), self.recipe.condiquant.scope
        return f"{type(self).__name__}({bits}, scope {scope})"

    def quantize(self, network: nn.Module, crops: Tensor) -> TrainableNetwork:
        """Recondition, insert quantizers, search bounds."""
        result = nncf_host.quantize_network(
            network,
            crops,
            settings.quantization(self.recipe),
            bounds_crops=self.recipe.condiquant.bounds.crops,
        )
        if self.distillation.iterations:
            check_convertible(result.model, self.recipe, pad_multiple(network))
        before, after = (
            median(getattr(report, name) for report in result.reports)
            for name in ("condition_before", "condition_after")
        )
        summary = (
            f"{len(result.reports)} layers, median condition number {before:.4g} -> {after:.4g}"
        )
        return _quantized(result.model, result.layers, network, summary)

    def rebuild(self, network: nn.Module, example: Tensor) -> TrainableNetwork:
        """The structure alone."""
        model, layers = rebuild(network, example, self.recipe)
        return _quantized(model, layers, network)

    def record(self) -> dict[str, Any]:
        """The recipe without the paths of this machine."""
        recipe = self.recipe.model_dump()
        weights, datasets = recipe["path"]["pretrain_network_g"], recipe["datasets"]
        recipe["path"]["pretrain_network_g"] = PurePath(weights).name
        datasets |= {"train": {"name": datasets["train"].get("name")}, "val": {}}
        return {"version": __version__, "recipe": recipe}

    def check(self, record: Mapping[str, Any], source: str) -> None:
        """Raise InputError where the checkpoint's network or quantizers are not the options' ones."""
        theirs = _structure(recorded(record, source).model_dump())
        network = (name for name in theirs if name.startswith("network_g."))
        for name in [*self.asked, *network]:
            if theirs.get(name) != self.asked.get(name):
                raise InputError(
                    f"{source} has {name}={theirs.get(name)}, the options have {self.asked.get(name)}: "
                    "change them, or train anew"
                )


def _structure(recipe: Mapping[str, Any]) -> dict[str, Any]:
    section = recipe.get("condiquant", {})
    network = {f"network_g.{key}": value for key, value in (recipe["network_g"] or {}).items()}
    return (
        network
        | {"scale": recipe["scale"]}
        | {f"condiquant.{key}": section[key] for key in _STRUCTURE if key in section}
    )


def _quantized(
    model: nn.Module, layers: list[nncf_host.Layer], network: nn.Module, summary: str = ""
) -> TrainableNetwork:
    weights = nncf_host.trainable_weights(model, layers)
    return TrainableNetwork(model, weights, nncf_host.feature_blocks(network, layers), summary)
