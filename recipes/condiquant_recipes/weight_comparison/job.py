"""What all rows of a comparison of weights share, on disk for the processes that compute them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from condiquant_plugin.compression import CompressionConfig
from condiquant_plugin.layerwise.blocks import Inputs

FLOAT, ROWS, MODEL = "float", "rows", "openvino_model.xml"
_JOB = "job.json"


@dataclass(frozen=True)
class WeightJob:
    """Settings of a comparison."""

    model: str
    """A Hugging Face folder or a GGUF file."""
    calibration: str
    """Text to calibrate on: its first ``windows`` windows."""
    text: str
    """Text to score on: its first ``scored`` windows."""
    windows: int = 16
    scored: int = 12
    length: int = 512
    """Tokens of a window."""
    group_size: int = 64
    inputs: Inputs = CompressionConfig.inputs

    @classmethod
    def read(cls, out: Path) -> WeightJob:
        """That of a folder."""
        return cls(**json.loads((out / _JOB).read_text())["job"])

    def identity(self, versions: dict[str, str]) -> bytes:
        """Content of the file that says what a folder's rows were made of."""
        texts = {name: _digest(Path(getattr(self, name))) for name in ("calibration", "text")}
        path = Path(self.model)
        files = [path] if path.is_file() else filter(Path.is_file, path.iterdir())
        model = sorted([file.name, file.stat().st_size] for file in files)
        content: dict[str, Any] = {"job": asdict(self), "versions": versions}
        return json.dumps(content | {"texts": texts, "model": model}, indent=1).encode()


def job_file(out: Path) -> Path:
    """Where :meth:`WeightJob.identity` lies."""
    return out / _JOB


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
