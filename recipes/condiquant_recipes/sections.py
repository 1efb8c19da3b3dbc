"""YAML files of sections, and ``key.sub=value`` put into them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from condiquant_plugin.errors import InputError


def read_yaml(path: Path) -> dict[str, Any]:
    """The sections of a YAML file.

    Raises:
        InputError: unreadable file, or anything else in it.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is no YAML file: give a recipe, or a checkpoint to `condiquant quantize`"
        ) from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {_one_line(error)}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise InputError(
            f"{path} holds no sections: expected keys with values, such as name and scale"
        )
    return content


def read_layers(content: dict[str, Any], beside: Path = Path()) -> None:
    """Rules of single layers from the file that ``condiquant.layers`` names, here or beside a recipe."""
    section = content.get("condiquant")
    if isinstance(section, dict) and isinstance(file := section.get("layers"), str):
        section["layers"] = read_yaml(Path(file) if Path(file).is_file() else beside / file)


def locate_network(content: dict[str, Any], beside: Path) -> None:
    """The file of ``network_g.type: FILE.py:Class`` may lie beside a recipe."""
    section = content.get("network_g")
    if isinstance(section, dict) and isinstance(kind := section.get("type"), str):
        file, separator, name = kind.rpartition(".py:")
        if separator and not Path(f"{file}.py").is_file() and (beside / f"{file}.py").is_file():
            section["type"] = f"{beside / file}.py:{name}"


def apply_override(content: dict[str, Any], override: str) -> None:
    """Put ``key.sub=value`` into sections; InputError if it is not of that form."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise InputError(f"--set {override!r} is not of the form key.sub=value")
    *parents, last = key.split(".")
    section = content
    for parent in parents:
        if not isinstance(section.get(parent), dict):
            section[parent] = {}
        section = section[parent]
    try:
        section[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"--set {override!r}: the value is not valid YAML") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
