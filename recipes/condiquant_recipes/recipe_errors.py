"""What is wrong in a recipe, in one line with the remedy."""

from __future__ import annotations

import difflib
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from condiquant_plugin.errors import InputError


def explain(error: ValidationError, model: type[BaseModel], *prefix: str) -> str:
    """The first of the errors in one line, with the remedy.

    Args:
        model: what was validated.
        prefix: the sections around it.
    """
    first = error.errors()[0]
    inner = [str(part) for part in first["loc"]]
    location = [*prefix, *inner]
    key = ".".join(location)
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _known_keys(model, inner[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = (
            f"did you mean {'.'.join([*location[:-1], near[0]])}?"
            if near
            else (f"known here: {', '.join(known)}")
        )
        return f"unknown key {key}: {hint}"
    if first["type"] == "missing":
        return f"key {key} is missing: add it"
    if first["type"] == "value_error":
        raised = first["ctx"]["error"]
        of_key = isinstance(raised, InputError) and location
        return f"{key}.{raised}" if of_key else str(raised)
    return f"{key}={first['input']!r}: {first['msg']}"


def _known_keys(model: type[BaseModel], parents: list[str]) -> list[str]:
    for parent in parents:
        annotation: Any = model.model_fields[parent].annotation
        if get_origin(annotation) is not None:  # a mapping, whose own keys come next
            return [field.name for field in fields(get_args(annotation)[-1])]
        assert isinstance(annotation, type)
        if is_dataclass(annotation):
            return [field.name for field in fields(annotation)]
        model = annotation
    return list(model.model_fields)
