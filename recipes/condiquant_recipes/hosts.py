"""Modules of the application that import the hosts, which take seconds to load."""

from __future__ import annotations

import importlib
import logging
import warnings
from typing import Any


def load(name: str) -> Any:
    """Import a module of the application."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    import nncf

    nncf.set_log_level(logging.ERROR)
    return importlib.import_module(f"condiquant_recipes.{name}")
