"""Where the ready recipes are: beside this package in a checkout, inside it once installed."""

from __future__ import annotations

from pathlib import Path

from condiquant_plugin.errors import InputError

_PLACES = (Path(__file__).parent / "recipes", Path(__file__).parent.parent)


def recipe_path(name: str | Path) -> Path:
    """A recipe file by path, or by its name such as ``dat_light/x4.yml``.

    Raises:
        InputError: no such file; lists the ready recipes.
    """
    path = Path(name)
    if path.is_file():
        return path
    for place in _PLACES:
        if (place / path).is_file():
            return place / path
    ready = sorted(
        str(file.relative_to(place)) for place in _PLACES for file in place.glob("*/*.yml")
    )
    raise InputError(f"recipe {path} does not exist; ready ones: {', '.join(ready)}")
