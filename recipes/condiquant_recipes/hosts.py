"""Modules of the application that import the hosts, which take seconds to load."""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from condiquant_plugin.errors import MissingExtraError

_EXTRAS = {
    "nncf": "nncf",
    "openvino": "openvino",
    "pyvips": "upscale",
    "av": "upscale",
    "PIL": "upscale",
}
"""Of packages that no integration names; ``recipes`` brings all the rest."""
_QUIET_TRANSFORMERS = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
"""Read when transformers is imported, in processes of a command too."""
_CHATTY = ("torchao", "torch.utils._pytree")
"""Loggers that warn of themselves while transformers is imported."""


def load(name: str) -> Any:
    """Import a module of the application.

    Raises:
        ModuleNotFoundError: a host that it needs is not installed.
    """
    import rich

    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message="torch.meshgrid")  # of networks in BasicSR
    for key, value in _QUIET_TRANSFORMERS.items():
        os.environ.setdefault(key, value)
    for name_of_logger in _CHATTY:
        logging.getLogger(name_of_logger).setLevel(logging.ERROR)
    rich.reconfigure(stderr=True)  # NNCF shows its own bars on this console
    with suppress(ModuleNotFoundError):
        from nncf.common.logging import nncf_logger

        nncf_logger.setLevel(logging.ERROR)
    return importlib.import_module(f"condiquant_recipes.{name}")


@contextmanager
def naming_extras() -> Iterator[None]:
    """Raise :class:`MissingExtraError` for a package that is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if isinstance(error, MissingExtraError) or package.startswith("condiquant_"):
            raise
        extra = _EXTRAS.get(package, "recipes")
        raise MissingExtraError("this command", package, extra) from error
