"""OpenVINO's own conversion of torch networks, without what it leaves behind."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openvino as ov
import torch
from openvino import frontend
from torch import Tensor

_FAILURES = (
    frontend.GeneralFailure,
    frontend.NotImplementedFailure,
    frontend.OpConversionFailure,
    frontend.OpValidationFailure,
)


@torch.no_grad()
def from_torch(model: Any, image: Tensor | None = None, **options: Any) -> ov.Model:
    """``ov.convert_model``, traced once, silent, and without traces of a failure.

    Args:
        model: a network, or a program of ``torch.export``.
        image: to trace a network with.
        options: of ``ov.convert_model``.

    Raises:
        RuntimeError: it cannot be traced or converted.
    """
    with warnings.catch_warnings(), _root_logger_kept():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        if image is not None:
            # OpenVINO's own trace would be traced again to be compared.
            model = torch.jit.trace(model, image, strict=False, check_trace=False)
            options |= {"example_input": image}
        try:
            return ov.convert_model(model, **options)
        except _FAILURES as error:
            summary = str(error).partition("Summary:")[2] or str(error)
            raise RuntimeError(" ".join(summary.split())) from error


@contextmanager
def _root_logger_kept() -> Iterator[None]:
    """A conversion that fails leaves it at ERROR, with a filter."""
    root = logging.getLogger()
    level, filters, handlers = root.level, root.filters[:], root.handlers[:]
    try:
        yield
    finally:
        root.setLevel(level)
        root.filters[:], root.handlers[:] = filters, handlers
