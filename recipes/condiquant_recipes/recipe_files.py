"""Recipes by path or name, ready ones included, and BasicSR's training YAMLs in their place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from condiquant_plugin.errors import InputError
from condiquant_recipes.recipe import Recipe, load_recipe, with_overrides
from condiquant_recipes.sections import read_yaml
from condiquant_recipes.training.options import is_training, recipe_from_options

_INSTALLED = Path(__file__).parent / "recipes"
# Beside this package in a checkout, inside it once installed.
_FOLDER = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parent.parent


def recipe_path(name: str | Path) -> Path:
    """A recipe file by path, or by its name such as ``dat_light/x4.yml``.

    Raises:
        InputError: no such file; lists the ready recipes.
    """
    path = Path(name)
    if path.is_file():
        return path
    if (_FOLDER / path).is_file():
        return _FOLDER / path
    raise InputError(f"recipe {path} does not exist; ready ones: {', '.join(ready_recipes())}")


def training_path(name: str | Path) -> Path:
    """An option file of BasicSR by path, or by the name of one that comes with the package."""
    path = Path(name)
    return _FOLDER / path if not path.is_file() and path.as_posix() in ready_trainings() else path


def ready_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return _names(training=False)


def ready_trainings() -> list[str]:
    """Names of the option files for ``condiquant train`` that come with the package."""
    return _names(training=True)


def _names(training: bool) -> list[str]:
    files = (f for f in _FOLDER.glob("*/*.yml") if is_training(read_yaml(f)) == training)
    return sorted(file.relative_to(_FOLDER).as_posix() for file in files)


def find_recipe(name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe by path or name, or what a BasicSR training YAML amounts to, with overrides applied.

    Raises:
        InputError: no such file, or something wrong in it.
    """
    path = recipe_path(name)
    options = read_yaml(path)
    if is_training(options):
        return with_overrides(recipe_from_options(options), overrides)
    return load_recipe(path, overrides)
