"""Intel Neural Compressor's static int8, as an IR."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from condiquant_openvino.writing.from_torch import from_torch
from condiquant_plugin.errors import InputError
from condiquant_recipes.comparison.job import Calibrated, Job

_DISTRIBUTION = "neural-compressor-pt"


@contextmanager
def _without_logs() -> Iterator[None]:
    """Its level goes by an environment variable, and it warns of other devices."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@_without_logs()
@torch.no_grad()
def static_int8(job: Job) -> Calibrated:
    """Its post-training quantization of the exported network with default settings, all crops seen.

    Raises:
        InputError: it is not installed.
    """
    try:
        from neural_compressor.torch.export import export
        from neural_compressor.torch.quantization import StaticQuantConfig, convert, prepare
    except ModuleNotFoundError as error:
        raise InputError(
            f"needs Intel Neural Compressor ({error.name} is missing): pip install {_DISTRIBUTION}"
        ) from error
    size = torch.export.Dim.AUTO
    shapes: Any = ({2: size, 3: size},) if job.float_ir.is_dynamic() else None
    example = (job.source.crops[:1],)
    prepared = prepare(export(job.source.network, example, shapes), StaticQuantConfig())
    for crop in job.source.crops.split(1):
        prepared(crop)
    quantized = torch.export.export(convert(prepared), example, dynamic_shapes=shapes)
    return Calibrated(from_torch(quantized))
