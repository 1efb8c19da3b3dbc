"""``condiquant compress``: a language model with weights of few bits, for transformers and OpenVINO."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast, get_args

import nncf
import torch

import condiquant_nncf
from condiquant_nncf.backends.openvino_weights import PACKED, Signs
from condiquant_plugin.compression import (
    CompressionConfig,
    bits_per_weight,
    compress_blocks,
    compressed_weights,
)
from condiquant_plugin.errors import InputError, check_choice, check_count
from condiquant_plugin.files import check_writable, write_atomic
from condiquant_plugin.layerwise.blocks import find_blocks
from condiquant_plugin.layerwise.distributed import is_first, of_torchrun
from condiquant_recipes.progress import Progress
from condiquant_transformers import LanguageModel, perplexity, read_folder, save_folder, windows
from condiquant_transformers.ir import check_exporter, export_ir, ir_logits
from condiquant_transformers.text import batches_of

IR = "openvino"
"""Folder of the IR, inside that of the result."""
REPORT = "compression.json"
_ONE_BIT = ("arb_rc", "rounding")
"""Modes whose forms are signs between scales, one matrix of them."""
__all__ = ["IR", "compress", "configuration", "is_first", "notes", "of_torchrun"]


def compress(
    source: Path,
    text: Path,
    out: Path,
    config: CompressionConfig,
    *,
    count: int = 16,
    length: int = 512,
    score: Path | None = None,
    scored: int = 12,
    ir: bool = True,
    signs: str = "u2",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write ``out`` as a whole, or nothing.

    Processes of one ``torch.distributed`` group share the work; the first scores and writes.

    Args:
        source: a Hugging Face folder or a GGUF file.
        text: to calibrate on; its first ``count`` windows of ``length`` tokens.
        out: gets the model with its dense float16 weights for transformers, ``compression.json``, and in
            ``openvino`` the IR with packed weights.
        score: a text whose first ``scored`` windows are foreseen, before and after.
        ir: whether to write it.
        signs: of the IR, :data:`condiquant_nncf.backends.openvino_weights.Signs`.
        overwrite: put the result in the place of what ``out`` holds.

    Returns:
        What ``compression.json`` holds; in other processes of a group nothing of scores and IR.

    Raises:
        InputError: a folder or text that cannot be used; a setting that does not fit the model.
        MissingExtraError: what writes the IR is not installed.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not overwrite:
        raise InputError(f"{out} exists: choose another --out, or add --overwrite")
    check_writable(out)
    if length < 2:
        raise InputError(f"length={length}: use at least 2 tokens")
    check_count("scored", scored)
    check_choice("signs", signs, get_args(Signs))
    if signs == "u1" and not (ir and config.mode in _ONE_BIT and not config.bitmaps):
        raise InputError(
            f"signs='u1' is for the IR of {' or '.join(_ONE_BIT)} without bitmaps: leave it out"
        )
    if ir:
        check_exporter()
    progress = progress or Progress()
    with progress.status(f"reading {source}"):
        language_model = read_folder(source)
        calibration = windows(language_model.tokenizer, text, length=length, count=count)
        test = None
        if score is not None:
            test = windows(language_model.tokenizer, score, length=length, count=scored)
    names = find_blocks(language_model.model)
    result: dict[str, Any] = {
        "model": str(source),
        "settings": asdict(config),
        "windows": len(calibration),
        "length": length,
    }
    if test is not None and is_first():
        with progress.status("scoring the float model"):
            result["float_perplexity"] = perplexity(language_model, test)
    started = time.perf_counter()
    with progress.bar("compressing", len(names)) as advance:
        reports = compress_blocks(
            language_model.model, batches_of(calibration), config, progress=advance
        )
    result["seconds"] = time.perf_counter() - started
    result["bits_per_weight"] = bits_per_weight(reports)
    result["layers"] = [asdict(report) for report in reports.values()]
    if not is_first():
        return result
    if test is not None:
        with progress.status("scoring"):
            result["perplexity"] = perplexity(language_model, test)
    part = out.with_name(
        f".{out.name}.part"
    )  # one name, so that a rerun clears what a kill has left
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        with progress.status(f"writing {out}"):
            save_folder(language_model, part)
            if ir:
                result |= _write_ir(language_model, part, calibration[:1], cast(Signs, signs))
            write_atomic(part / REPORT, json.dumps(result, indent=1).encode())
        if out.exists():
            shutil.rmtree(out)
        os.rename(part, out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return result


def notes(result: dict[str, Any]) -> list[str]:
    """What a user should know of the result."""
    said = []
    stored = result.get("ir", {}).get("storage", {})
    unfolded = [name for name, kind in stored.items() if "unfolded" in kind]
    if unfolded:
        said.append(
            f"{len(unfolded)} layers are float16 in the IR, and unfold to 16 or 32 bits a weight when "
            "it is compiled: no kernel has bitmaps or offsets (arb_rc and pbs2p without bitmaps stay "
            "packed)"
        )
    if result["settings"]["mode"] == "magnitude" and stored:
        said.append("the IR holds float16 with zeros: no kernel skips them")
    codes = sum(any(k in kind for k in PACKED) for kind in stored.values())
    if (packed := result.get("ir", {}).get("packed_products", 0)) < codes:
        said.append(
            f"of {codes} layers of integers this CPU plugin keeps {packed} packed, and unfolds the rest"
        )
    if result["settings"]["bits"] == 3 and codes:
        said.append("codes of 3 bits take 4 in the IR: no kernel has 3")
    bits = result["bits_per_weight"]
    if bits > 4:
        said.append(f"{bits:.2f} bits a weight, all counted: compare it with plain int4")
    return said


def _write_ir(
    language_model: LanguageModel, folder: Path, ids: torch.Tensor, signs: Signs
) -> dict[str, Any]:
    """The IR of a saved model, and how near it is to it."""
    forms = compressed_weights(language_model.model)
    stored: dict[str, str] = {}
    export_ir(
        folder,
        folder / IR,
        lambda model: stored.update(condiquant_nncf.write_compressed(model, forms, signs=signs)),
    )
    packed = condiquant_nncf.packed_products(folder / IR / "openvino_model.xml")
    errors = condiquant_nncf.product_errors(forms, signs=signs)
    worst = max(errors, key=errors.__getitem__)
    with torch.no_grad():
        model: Any = language_model.model
        expected = model(input_ids=ids, use_cache=False).logits.float()
    found = ir_logits(folder / IR, ids).float()
    change = float((found - expected).abs().mean() / expected.abs().mean())
    if not math.isfinite(change):
        raise InputError(
            f"the IR computes NaN or Inf: run condiquant with --no-ir and report {worst}"
        )
    return {
        "ir": {
            "storage": stored,
            "packed_products": packed,
            "bin_bytes": (folder / IR / "openvino_model.bin").stat().st_size,
            "logits_error": change,
            "worst_layer": {"name": worst, "error": errors[worst]},
        }
    }


def configuration(method: str, pattern: str, **settings: Any) -> CompressionConfig:
    """Settings as the command line gives them.

    Raises:
        InputError: a pattern that is not ``N:M``; see also
            :class:`condiquant_plugin.compression.CompressionConfig`.
    """
    n, _, m = pattern.partition(":")
    if not (n.isdigit() and m.isdigit()):
        raise InputError(f"pattern={pattern!r}: give N:M, as in 4:8")
    mode = condiquant_nncf.CompressWeightsMode
    known = [each.value for each in mode]
    if method.lower() not in known:
        theirs = method.lower() in [each.value for each in nncf.CompressWeightsMode]
        hint = " (NNCF's own: nncf.compress_weights)" if theirs else ""
        raise InputError(f"method={method!r} is not known{hint}: use {', '.join(known)}")
    return CompressionConfig(mode(method.lower()).value, pattern=(int(n), int(m)), **settings)
