"""Repairs, made only where needed, of what BasicSR 1.4.2 and spandrel expect from torchvision."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

_MISSING_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: list[torch.library.Library] = []  # a Library that is freed takes its schemas along


def heal() -> None:
    """Makes torchvision importable and complete; a second call changes nothing.

    Raises:
        ImportError: torchvision is not installed.
    """
    _import_torchvision()
    try:
        importlib.import_module("torchvision.transforms.functional_tensor")
    except ImportError:  # removed in torchvision 0.17; BasicSR imports rgb_to_grayscale from it
        functional = importlib.import_module("torchvision.transforms.functional")
        module = ModuleType("torchvision.transforms.functional_tensor")
        module.rgb_to_grayscale = functional.rgb_to_grayscale  # type: ignore[attr-defined]
        sys.modules[module.__name__] = module


def _import_torchvision() -> None:
    """Imports torchvision, also where its compiled operators do not fit a CPU build of torch."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for schema in _MISSING_OPERATORS:
            library.define(schema)
        _libraries.append(library)
        importlib.import_module("torchvision")
