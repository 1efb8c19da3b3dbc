"""Folders of models, as transformers reads and writes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from condiquant_plugin.errors import InputError

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model and its tokenizer."""

    model: nn.Module
    """In float32 and evaluation mode; keeps no cache between calls."""
    tokenizer: Any
    """``transformers``' own."""


def read_folder(folder: Path) -> LanguageModel:
    """A model from a folder, nothing from elsewhere.

    Raises:
        InputError: no folder, or without a model, weights or tokenizer, or of an unknown kind.
    """
    if not folder.is_dir():
        raise InputError(f"model folder {folder} does not exist: give a Hugging Face folder")
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} has no config.json: give a Hugging Face folder")
    if not any(list(folder.glob(pattern)) for pattern in _WEIGHTS):
        raise InputError(f"{folder} has no weights: put model.safetensors there")
    tokenizer = read_tokenizer(folder)
    from transformers import AutoModelForCausalLM

    with _naming(folder):
        model = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32
        )
    return LanguageModel(model.eval(), tokenizer)


def read_tokenizer(folder: Path) -> Any:
    """That of a folder.

    Raises:
        InputError: there is none, or of an unknown kind.
    """
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise InputError(f"{folder} has no tokenizer: put tokenizer.json there")
    from transformers import AutoTokenizer

    with _naming(folder):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError, KeyError) as error:
        said = " ".join(str(error).split())
        raise InputError(f"transformers cannot read {folder} ({said}): check the folder") from error


def save_folder(language_model: LanguageModel, folder: Path) -> None:
    """Write a folder that :func:`read_folder` and plain transformers read, weights in float16."""
    model: Any = language_model.model
    state = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
    }
    before = model.config.dtype
    model.config.dtype = torch.float16
    try:
        model.save_pretrained(folder, state_dict=state)
    finally:
        model.config.dtype = before
    language_model.tokenizer.save_pretrained(folder)
