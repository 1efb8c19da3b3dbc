"""Repairs, made only where needed, of what BasicSR 1.4.2 and spandrel expect from torchvision."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from condiquant_plugin.torchvision_operators import import_torchvision


def heal() -> None:
    """Makes torchvision importable and complete; a second call changes nothing.

    Raises:
        ImportError: torchvision is not installed.
    """
    import_torchvision()
    try:
        importlib.import_module("torchvision.transforms.functional_tensor")
    except ImportError:  # removed in torchvision 0.17; BasicSR imports rgb_to_grayscale from it
        functional = importlib.import_module("torchvision.transforms.functional")
        module = ModuleType("torchvision.transforms.functional_tensor")
        module.rgb_to_grayscale = functional.rgb_to_grayscale  # type: ignore[attr-defined]
        sys.modules[module.__name__] = module
