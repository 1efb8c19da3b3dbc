"""Every key of a recipe with its type, default and meaning, from the models themselves."""

from __future__ import annotations

import ast
import inspect
import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from condiquant_plugin.configuration import QuantizationConfig
from condiquant_plugin.distillation import DistillationConfig
from condiquant_plugin.layerwise.precision import LayerRule
from condiquant_plugin.methods.condiquant.reconditioning import ReconditioningConfig
from condiquant_recipes import recipe as models
from condiquant_recipes.recipe import BOUNDS_KEYS, Recipe

_DOCUMENTED: Mapping[str, tuple[type, ...]] = {
    "Recipe": (Recipe,),
    "PathSection": (models.PathSection,),
    "DatasetsSection": (models.DatasetsSection,),
    "CalibrationSection": (models.CalibrationSection,),
    "IgnoredScopeSection": (models.IgnoredScopeSection,),
    "CondiQuantSection": (QuantizationConfig, models.CondiQuantSection),
    "ReconditionSection": (ReconditioningConfig, models.ReconditionSection),
    "BoundsSection": (QuantizationConfig, models.BoundsSection),
    "DistillationConfig": (DistillationConfig,),
    "ExportSection": (models.ExportSection,),
    "LayerRule": (LayerRule,),
}
"""The classes in whose source the keys of a section are documented; later ones win."""


_ROLE = re.compile(r":\w+:`[.~]?(?:\w+\.)*(?=\w)")


def recipe_schema() -> dict[str, Any]:
    """JSON schema of recipes, the docstring below each key as its description."""
    schema = Recipe.model_json_schema()
    for name, section in [("Recipe", schema), *schema["$defs"].items()]:
        meanings: dict[str, str] = {}
        for documented in _DOCUMENTED[name]:
            meanings |= attribute_docstrings(documented)
        meanings |= {new: meanings[old] for old, new in BOUNDS_KEYS.items() if old in meanings}
        for key, described in section.get("properties", {}).items():
            if key in meanings:
                described["description"] = meanings[key]
    return schema


def attribute_docstrings(documented: type) -> dict[str, str]:
    """The strings below a class's attributes, each in one line."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(documented))).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for attribute, below in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(attribute, ast.AnnAssign)
            and isinstance(attribute.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
            and isinstance(below.value.value, str)
        ):
            found[attribute.target.id] = " ".join(below.value.value.split())
    return found


def reference_page() -> str:
    """Markdown: a table for each section."""
    schema = recipe_schema()
    lines = ["# Recipe keys", ""]
    lines += ["`condiquant recipe --schema` prints the same as JSON schema, for editors.", ""]
    for name, section in _sections(schema, "", schema):
        lines += [f"## {name}" if name else "## Top level", ""]
        lines += ["| key | type | default | |", "|---|---|---|---|"]
        required = section.get("required", [])
        for key, described in section["properties"].items():
            if _referred(described, schema) is not None:
                continue
            default = "required" if key in required else f"`{_text(described.get('default'))}`"
            meaning = _ROLE.sub("`", described.get("description", "")).replace("``", "`")
            cells = (f"`{key}`", _type(described, schema), default, meaning)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _sections(
    section: dict[str, Any], name: str, schema: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    yield name, section
    for key, described in section["properties"].items():
        inner = _referred(described, schema)
        if inner is not None:
            yield from _sections(inner, f"{name}.{key}".lstrip("."), schema)


def _referred(described: Mapping[str, Any], schema: dict[str, Any]) -> dict[str, Any] | None:
    """The section that a key holds, if it holds one."""
    reference = described.get("$ref")
    if reference is None:
        return None
    found: dict[str, Any] = schema["$defs"][reference.rpartition("/")[2]]
    return found if "properties" in found else None


def _type(described: Mapping[str, Any], schema: dict[str, Any]) -> str:
    if "$ref" in described:
        name = described["$ref"].rpartition("/")[2]
        return ", ".join(f"`{key}`" for key in schema["$defs"][name]["properties"])
    if "anyOf" in described:
        return " or ".join(_type(each, schema) for each in described["anyOf"])
    if "enum" in described or "const" in described:
        return ", ".join(f"`{_text(v)}`" for v in described.get("enum", [described.get("const")]))
    kind = str(described.get("type", "any"))
    if kind == "array":
        return f"list of {_type(described['items'], schema)}"
    if isinstance(values := described.get("additionalProperties"), dict):
        return f"mapping to {_type(values, schema)}"
    limits = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most"}
    bounds = [
        f"{word} {described[limit]:g}" for limit, word in limits.items() if limit in described
    ]
    names = {"null": "none", "object": "mapping"}
    return " ".join([names.get(kind, kind), *bounds])


def _text(value: Any) -> str:
    return "none" if value is None else json.dumps(value) if not isinstance(value, str) else value
