"""Names of earlier versions: they lead to what has another now, with a DeprecationWarning."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _MovedModules(MetaPathFinder, Loader):
    """Finds modules by their old names."""

    def __init__(self) -> None:
        self.places: dict[str, str] = {}
        self._specs: dict[str, ModuleSpec | None] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Called for names that no file has."""
        return ModuleSpec(fullname, self) if fullname in self.places else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module of today."""
        place = self.places[spec.name]
        warnings.warn(f"{spec.name} is {place} now", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(place)
        self._specs[place] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """It has run already; only its spec is put back, which the import system wrote over."""
        module.__spec__ = self._specs[module.__name__]


_MOVED = _MovedModules()


def forward(package: str, places: Mapping[str, str]) -> None:
    """Keep old names of modules of a package valid.

    Args:
        places: today's name by the old one, both without the package's: ``{"gram": "layerwise.moments"}``.
    """
    if _MOVED not in sys.meta_path:
        sys.meta_path.append(_MOVED)
    _MOVED.places |= {f"{package}.{old}": f"{package}.{new}" for old, new in places.items()}


def renamed(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """A ``__getattr__`` for a module that keeps old names of what it has valid.

    Args:
        names: today's name by the old one.
    """

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warnings.warn(
            f"{module}.{name} is {module}.{names[name]} now", DeprecationWarning, stacklevel=2
        )
        return getattr(sys.modules[module], names[name])

    return get
