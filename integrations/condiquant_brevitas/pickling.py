"""Pickling of Brevitas' injectors, without which no model with Brevitas layers can be pickled."""

from __future__ import annotations

import copyreg
import sys
from typing import Any

from brevitas.inject import ExtendedInjector


def _reduce(injector: Any) -> str | tuple[Any, ...]:
    """``let`` derives classes that no module holds: the nearest that one holds, and what differs."""
    named = next((kind for kind in injector.__mro__ if _is_found(kind)), injector)
    if named is injector:
        return str(injector.__name__)
    values = {
        name: getattr(spec[1], "dependency", spec[1])
        for name, spec in injector.__dependencies__.items()
        if named.__dependencies__.get(name) is not spec
    }
    return _let, (named, values)


def _is_found(kind: type) -> bool:
    return getattr(sys.modules.get(kind.__module__), kind.__name__, None) is kind


def _let(injector: Any, values: dict[str, Any]) -> Any:
    return injector.let(**values)


copyreg.pickle(type(ExtendedInjector), _reduce)
