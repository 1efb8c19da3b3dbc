"""Folders of models and GGUF files, as transformers reads them, and writes folders."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from condiquant_plugin.errors import InputError, MissingExtraError

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_GGUF_MARKS = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
}
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model and its tokenizer."""

    model: nn.Module
    """In float32 and evaluation mode; keeps no cache between calls."""
    tokenizer: Any
    """``transformers``' own."""


def read_folder(folder: Path) -> LanguageModel:
    """A model from a folder or a GGUF file, whose weights are dequantized; nothing from elsewhere.

    Raises:
        InputError: no folder, or without a model, weights or tokenizer, or of an unknown kind; NaN or Inf.
        MissingExtraError: what reads GGUF is not installed.
    """
    if not _is_gguf(folder):
        if not folder.is_dir():
            raise InputError(
                f"model folder {folder} does not exist: give a Hugging Face folder or a .gguf file"
            )
        if not (folder / "config.json").is_file():
            raise InputError(f"{folder} has no config.json: give a Hugging Face folder")
        if not any(list(folder.glob(pattern)) for pattern in _WEIGHTS):
            raise InputError(f"{folder} has no weights: put model.safetensors there")
    tokenizer = read_tokenizer(folder)
    from transformers import AutoModelForCausalLM

    with _naming(folder):
        model = AutoModelForCausalLM.from_pretrained(**_source(folder), dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(f"NaN or Inf in {name}: check the checkpoint")
    return LanguageModel(model.eval(), tokenizer)


def read_tokenizer(folder: Path) -> Any:
    """That of a folder or a GGUF file.

    Raises:
        InputError: there is none, or of an unknown kind.
        MissingExtraError: what reads GGUF is not installed.
    """
    if not _is_gguf(folder) and not any((folder / name).is_file() for name in _TOKENIZERS):
        raise InputError(f"{folder} has no tokenizer: put tokenizer.json there")
    from transformers import AutoTokenizer

    with _naming(folder):
        tokenizer = AutoTokenizer.from_pretrained(**_source(folder))
        return _of_gguf(tokenizer, folder) if _is_gguf(folder) else tokenizer


def _of_gguf(tokenizer: Any, file: Path) -> Any:
    """A tokenizer that is the same again when it was saved and read, with the marks of the file."""
    from gguf import GGUFReader
    from tokenizers.processors import ByteLevel
    from transformers import PreTrainedTokenizerFast

    backend, fields = tokenizer.backend_tokenizer, GGUFReader(file).fields

    def value(name: str) -> Any:
        return fields[name].contents() if name in fields else None

    given = {"chat_template": value("tokenizer.chat_template")}
    for name, kind in _GGUF_MARKS.items():
        if (number := value(f"tokenizer.ggml.{kind}_token_id")) is not None:
            given[name] = backend.id_to_token(int(number))
    if value("tokenizer.ggml.add_bos_token") is False:
        backend.post_processor = ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **given)


def _is_gguf(path: Path) -> bool:
    if path.suffix != ".gguf" or not path.is_file():
        return False
    for package in ("gguf", "accelerate"):
        if find_spec(package) is None:
            raise MissingExtraError("a GGUF file", package, "transformers")
    return True


def _source(path: Path) -> dict[str, Any]:
    """Arguments of ``from_pretrained``."""
    found: dict[str, Any] = {"pretrained_model_name_or_path": path, "local_files_only": True}
    if _is_gguf(path):
        found |= {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    return found


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError, KeyError) as error:
        said = " ".join(str(error).split())
        raise InputError(f"transformers cannot read {folder} ({said}): check it") from error


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
