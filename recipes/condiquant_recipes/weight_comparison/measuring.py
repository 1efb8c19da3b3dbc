"""What an IR of a language model takes and how well it foresees a text, in a process of its own."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import openvino as ov
import torch
from torch import Tensor

from condiquant_recipes.comparison.measuring import memory
from condiquant_recipes.weight_comparison.job import MODEL
from condiquant_transformers import LanguageModel, perplexity

# What the weights cost, not what bfloat16, int8 activations or a cache of int8 cost.
_EXACT = {
    "INFERENCE_PRECISION_HINT": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    "KV_CACHE_PRECISION": "f32",
}
_PROMPT, _STEPS = 64, 32
"""Tokens that speed is measured behind, and at."""


class IRModel:
    """A stateful IR, called as :func:`condiquant_transformers.perplexity` calls a torch model."""

    def __init__(self, xml: Path) -> None:
        compiled = ov.Core().compile_model(xml, "CPU", _EXACT)
        self._names = {name for port in compiled.inputs for name in port.get_names()}
        self._request = compiled.create_infer_request()

    def __call__(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        """Logits of whole windows."""
        self._request.reset_state()
        return SimpleNamespace(logits=torch.from_numpy(self.step(input_ids.numpy(), 0)))

    def step(self, ids: np.ndarray[Any, Any], before: int) -> np.ndarray[Any, Any]:
        """Logits ``(count, length, vocabulary)`` of ids behind ``before`` others of each sequence."""
        count, length = ids.shape
        places = np.arange(before, before + length, dtype=np.int64)
        given = {
            "input_ids": ids,
            "attention_mask": np.ones((count, before + length), np.int64),
            "position_ids": np.broadcast_to(places, (count, length)),
            "beam_idx": np.arange(count, dtype=np.int32),
        }
        found = self._request.infer({k: v for k, v in given.items() if k in self._names})
        logits: np.ndarray[Any, Any] = found["logits"]
        return logits.copy()

    def tokens_per_second(self, prompt: Tensor) -> float:
        """Of single tokens behind a prompt ``(1, length)``, the likeliest one each time."""
        self._request.reset_state()
        last = self.step(prompt.numpy(), 0)[:, -1:].argmax(-1)
        seconds = []
        for step in range(_STEPS):
            started = time.perf_counter()
            last = self.step(last, prompt.shape[1] + step)[:, -1:].argmax(-1)
            seconds.append(time.perf_counter() - started)
        return 1 / median(seconds)


def measure(folder: Path, tokenizer: Any, ids: Tensor) -> dict[str, float]:
    """Figures of ``folder``'s IR.

    Args:
        ids: windows to score, ``(count, length)``.

    Returns:
        ``memory_bytes``: growth of this process by compiling and one token, with what it maps of the file;
        ``tokens_per_second``; ``perplexity``; ``bin_bytes``.
    """
    before = memory("VmRSS")
    model = IRModel(folder / MODEL)
    model(ids[:1, :1])
    grown = memory("VmRSS") - before
    speed = model.tokens_per_second(ids[:1, :_PROMPT])
    found: Any = model
    return {
        "bin_bytes": (folder / MODEL).with_suffix(".bin").stat().st_size,
        "memory_bytes": grown,
        "tokens_per_second": speed,
        "perplexity": perplexity(LanguageModel(found, tokenizer), ids),
    }
