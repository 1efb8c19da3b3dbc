"""Where the ready recipes are: beside this package in a checkout, inside it once installed."""

from __future__ import annotations

from pathlib import Path

from condiquant_plugin.errors import InputError

_INSTALLED = Path(__file__).parent / "recipes"
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
    ready = sorted(str(file.relative_to(_FOLDER)) for file in _FOLDER.glob("*/*.yml"))
    raise InputError(f"recipe {path} does not exist; ready ones: {', '.join(ready)}")
