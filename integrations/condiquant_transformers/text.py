"""Windows of a text, and how well a model foresees it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from condiquant_plugin.errors import InputError, check_count
from condiquant_transformers.folder import LanguageModel

_TOKENS_AT_ONCE = 2048
"""In one forward pass."""
_CHARACTERS, _UNSURE = 5, 64
"""Of a token, to begin with; tokens at the end of a part of a text."""


def windows(tokenizer: Any, text: Path, *, length: int, count: int) -> Tensor:
    """The first ``count`` windows of a text that is tokenized as one, ``(count, length)``; they do not
    overlap, and there are no special tokens.

    Raises:
        InputError: a file that cannot be read, or with less than one window; numbers below 1.
    """
    check_count("length", length)
    check_count("windows", count)
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise InputError(f"cannot read {text} ({reason}): give a text file") from error
    ids = torch.tensor(_tokens(tokenizer, content, length * count))
    found = min(len(ids) // length, count)
    if found == 0:
        raise InputError(
            f"{text} has {len(ids)} tokens, less than one window of {length}: give a longer text, "
            "or a shorter window"
        )
    return ids[: found * length].view(found, length)


def _tokens(tokenizer: Any, content: str, count: int) -> list[int]:
    """The first ``count`` tokens of a text, of all of it if there are fewer: no more is tokenized."""
    end = _CHARACTERS * count
    while True:
        end = len(content) if end >= len(content) else content.find("\n", end) + 1 or len(content)
        found: list[int] = tokenizer(content[:end], add_special_tokens=False).input_ids
        # What follows may change the last tokens of a part.
        if end == len(content) or len(found) >= count + _UNSURE:
            return found[:count]
        end *= 2


def batches_of(ids: Tensor) -> list[dict[str, Any]]:
    """Arguments of a model for windows, some 2048 tokens at a time, without a cache.

    The first has one window: it goes through the whole model once more, to see how its blocks are called.
    """
    at_once = max(_TOKENS_AT_ONCE // ids.shape[1], 1)
    parts = [ids[:1], *ids[1:].split(at_once)]
    return [{"input_ids": part, "use_cache": False} for part in parts if len(part)]


@torch.no_grad()
def perplexity(language_model: LanguageModel, ids: Tensor) -> float:
    """``exp`` of the mean of ``-log p`` over all tokens but the first of each window.

    Args:
        ids: ``(count, length)``, length at least 2.
    """
    model: Any = language_model.model
    total = 0.0
    for batch in batches_of(ids):
        logits: Sequence[Tensor] = model(**batch).logits
        for window, found in zip(batch["input_ids"], logits, strict=True):
            total += float(F.cross_entropy(found[:-1].float(), window[1:], reduction="sum"))
    return math.exp(min(total / (ids.numel() - len(ids)), 700.0))
