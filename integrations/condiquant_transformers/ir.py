"""From a folder of transformers to OpenVINO, by optimum-intel."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from condiquant_plugin.errors import MissingExtraError


def export_ir(folder: Path, out: Path, change: Callable[[Any], object]) -> None:
    """Write ``OVModelForCausalLM`` of a folder, and its tokenizer where its converter is installed.

    Args:
        folder: as :func:`condiquant_transformers.read_folder` reads it.
        out: a folder, that ``OVModelForCausalLM`` and ``openvino_genai`` take.
        change: is given the stateful ``ov.Model`` before it is written.

    Raises:
        MissingExtraError: optimum-intel is not installed.
    """
    causal = _causal()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        exported = causal.from_pretrained(folder, export=True, compile=False, load_in_8bit=False)
    change(exported.model)
    exported.save_pretrained(out)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.save_pretrained(out)
    try:
        from openvino_tokenizers import convert_tokenizer  # noqa: F401
        from optimum.exporters.openvino.convert import export_tokenizer
    except ImportError:
        return
    export_tokenizer(tokenizer, out)


def ir_logits(folder: Path, ids: Tensor) -> Tensor:
    """Of an IR, computed in float32, ``(count, length, vocabulary)``.

    Args:
        ids: ``(count, length)``.
    """
    model = _causal().from_pretrained(
        folder,
        ov_config={"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"},
    )
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return logits


def _causal() -> Any:
    try:
        from optimum.intel import OVModelForCausalLM
    except ModuleNotFoundError as error:
        raise _missing() from error
    return OVModelForCausalLM


def check_exporter() -> None:
    """Find out before long work whether an IR can be written.

    Raises:
        MissingExtraError: optimum-intel is not installed.
    """
    if find_spec("optimum") is None or find_spec("optimum.intel") is None:
        raise _missing()


def _missing() -> MissingExtraError:
    return MissingExtraError("the IR of a language model", "optimum-intel", "transformers")
