"""Torchvision, also where its compiled operators do not fit a CPU build of torch."""

from __future__ import annotations

import importlib
import sys

import torch

_MISSING_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: list[torch.library.Library] = []  # a Library that is freed takes its schemas along


def import_torchvision() -> None:
    """Make torchvision importable; a second call changes nothing.

    Raises:
        ImportError: it is not installed.
    """
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
