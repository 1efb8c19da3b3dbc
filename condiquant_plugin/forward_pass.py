"""A forward pass on a batch in any of the forms that calibration takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def run(model: nn.Module, batch: Any) -> Any:
    """What ``model`` gives for a tensor, a tuple of positional or a dict of keyword arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)
