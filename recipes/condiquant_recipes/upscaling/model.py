"""The IR of a run, ready to enlarge pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from condiquant_openvino.running.compile_cache import cache_properties
from condiquant_openvino.running.reading import read_metadata
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

    def open(self, model: Path, *, many: bool) -> Upscaler:
        """Compile the IR of a run, or take it from the cache.

        Args:
            many: whether there are more tiles than one, for which throughput counts, not latency.

        Raises:
            InputError: no IR of a run, one that takes no RGB, an unknown device, an impossible tile.
        """
        run_metadata(model)
        properties: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": self.precision,
            "PERFORMANCE_HINT": "THROUGHPUT" if many else "LATENCY",
            **cache_properties(model, self.cache),
        }
        if self.threads is not None:
            properties["INFERENCE_NUM_THREADS"] = self.threads
        return rgb_upscaler(model, self.device, self.tile, self.overlap, properties)


def run_metadata(model: Path) -> dict[str, Any]:
    """Metadata of an IR that a run has exported."""
    metadata = read_metadata(model)
    if "scale" not in metadata:
        raise InputError(
            f"{model} was not exported by condiquant: its scale is unknown; give the IR of a run"
        )
    return metadata


def rgb_upscaler(model: Path, *options: Any) -> Upscaler:
    """An upscaler of an IR that takes RGB."""
    upscaler = Upscaler(model, *options)
    if upscaler.channels != 3:
        raise InputError(
            f"{model} takes {upscaler.channels}-channel images, and image files are read as RGB:"
            " call condiquant_openvino.Upscaler on the channel"
        )
    return upscaler
