"""The IR of a run, ready to enlarge pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openvino as ov

from condiquant_openvino.running.compile_cache import cache_properties
from condiquant_openvino.running.reading import read_ir, read_metadata
from condiquant_openvino.running.upscaling import Upscaler
from condiquant_plugin.errors import InputError


@dataclass(frozen=True)
class Hardware:
    """What a network runs on, and how.

    Attributes:
        threads: of inference; None for as many as there are cores.
        precision: of float operators: ``f32``, ``bf16`` or ``f16``.
        tile, overlap: as for :class:`condiquant_openvino.Upscaler`.
        cache: folder for what OpenVINO has compiled; None for the platform's.
    """

    device: str = "CPU"
    threads: int | None = None
    precision: str = "f32"
    tile: int | None = None
    overlap: int | None = None
    cache: Path | None = None

    def open(self, model: Path, ir: ov.Model, *, many: bool) -> Upscaler:
        """Compile the IR of a run, or take it from the cache.

        Args:
            ir: what was read from ``model``.
            many: whether there are more tiles than one, for which throughput counts, not latency.

        Raises:
            InputError: an IR that takes no RGB, an unknown device, an impossible tile.
        """
        properties: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": self.precision,
            "PERFORMANCE_HINT": "THROUGHPUT" if many else "LATENCY",
            **cache_properties(model, self.cache),
        }
        if self.threads is not None:
            properties["INFERENCE_NUM_THREADS"] = self.threads
        upscaler = Upscaler(model, self.device, self.tile, self.overlap, properties, ir)
        return _taking_rgb(upscaler, model)


def read_run(model: Path) -> tuple[ov.Model, float]:
    """The IR of a run and how many times larger it makes pictures.

    Raises:
        InputError: no IR, or not of a run.
    """
    ir = read_ir(model)
    return ir, float(_of_a_run(read_metadata(ir), model)["scale"])


def run_metadata(model: Path) -> dict[str, Any]:
    """Metadata of an IR that a run has exported."""
    return _of_a_run(read_metadata(model), model)


def rgb_upscaler(model: Path, *options: Any) -> Upscaler:
    """An upscaler of an IR that takes RGB."""
    return _taking_rgb(Upscaler(model, *options), model)


def _of_a_run(metadata: dict[str, Any], model: Path) -> dict[str, Any]:
    if "scale" not in metadata:
        raise InputError(
            f"{model} was not exported by condiquant: its scale is unknown; give the IR of a run"
        )
    return metadata


def _taking_rgb(upscaler: Upscaler, model: Path) -> Upscaler:
    if upscaler.channels != 3:
        raise InputError(
            f"{model} takes {upscaler.channels}-channel images, and image files are read as RGB:"
            " call condiquant_openvino.Upscaler on the channel"
        )
    return upscaler
