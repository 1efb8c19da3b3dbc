"""How long a run may take: defaults of the keys that cost time, measured on DAT-light and two cores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Budget = Literal["quick", "standard", "thorough"]
BUDGETS: dict[Budget, dict[str, Any]] = {
    "quick": {
        "datasets": {"calibration": {"count": 32, "held_out": 8}},
        "condiquant": {
            "bounds": {"crops": 16},
            "distillation": {"iterations": 40, "validate_every": 10},
        },
    },
    "standard": {},  # the defaults themselves
    "thorough": {
        "datasets": {"calibration": {"count": 512, "held_out": 16}},
        "condiquant": {
            "bounds": {"crops": 64},
            "distillation": {"iterations": 2800, "validate_every": 100},
        },
    },
}
"""Two minutes, a quarter of an hour, an hour."""
STANDARD: Budget = "standard"


def filled(values: Any) -> Any:
    """A recipe's sections with the keys that its budget sets where they are not given."""
    if not isinstance(values, Mapping):
        return values
    return _merged(_set_by(values.get("budget", STANDARD), values), values)


def changed(values: Mapping[str, Any], budget: Any) -> dict[str, Any]:
    """A whole recipe's sections with those of another budget."""
    merged: dict[str, Any] = _merged(values, _set_by(budget, values))
    return merged | {"budget": budget}


def _set_by(budget: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """What a budget sets, by the recipe's own word or else in general; nothing where there is none such."""
    found: dict[str, Any] = {}
    general_and_own: tuple[Any, Any] = BUDGETS, values.get("budgets")
    for sections in general_and_own:
        # What is no section of a budget is for the recipe's model to find.
        if isinstance(sections, Mapping) and isinstance(budget, str):
            section = sections.get(budget)
            found = _merged(found, section) if isinstance(section, Mapping) else found
    return found


def _merged(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Both, ``given`` before ``defaults``; what is no section there stays what it is."""
    result = dict(defaults) | dict(given)
    for key in defaults.keys() & given.keys():
        if isinstance(defaults[key], Mapping) and isinstance(given[key], Mapping):
            result[key] = _merged(defaults[key], given[key])
    return result
