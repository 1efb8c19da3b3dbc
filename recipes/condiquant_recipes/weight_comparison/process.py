"""A row of a comparison, in two processes: one compresses, one measures what that wrote.

``python -m condiquant_recipes.weight_comparison.process compress|measure OUT ID``; the last line that it
prints is the row's part as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino as ov

import condiquant_nncf
from condiquant_nncf.backends.openvino_weights import ir_bits_per_weight
from condiquant_plugin.compression import (
    CompressionConfig,
    bits_per_weight,
    compress_blocks,
    compressed_weights,
)
from condiquant_plugin.errors import InputError
from condiquant_recipes.comparison.measuring import memory
from condiquant_recipes.weight_comparison.contenders import WeightContender, all_contenders
from condiquant_recipes.weight_comparison.job import FLOAT, MODEL, ROWS, WeightJob
from condiquant_transformers import read_folder, read_tokenizer, windows
from condiquant_transformers.text import batches_of

Row = dict[str, Any]


def compress(contender: WeightContender, job: WeightJob, out: Path) -> Row:
    """Write the row's IR; bits, output error, seconds and peak memory of the process so far."""
    float_ir = out / FLOAT / MODEL
    if contender.config is not None:
        model, row = _with_own(contender.config, job, float_ir)
    elif contender.nncf:
        model, row = _with_nncf(contender, job, ov.Core().read_model(float_ir))
    else:
        model = ov.Core().read_model(float_ir)
        row = {"bits_per_weight": ir_bits_per_weight(model)}
    ov.save_model(model, out / ROWS / contender.id / MODEL, compress_to_fp16=True)
    return row


def _with_own(config: CompressionConfig, job: WeightJob, float_ir: Path) -> tuple[Any, Row]:
    language_model = read_folder(Path(job.model))
    ids = windows(
        language_model.tokenizer, Path(job.calibration), length=job.length, count=job.windows
    )
    reports, row = _timed(lambda: compress_blocks(language_model.model, batches_of(ids), config))
    model = ov.Core().read_model(float_ir)
    stored = condiquant_nncf.write_compressed(model, compressed_weights(language_model.model))
    return model, row | {
        "bits_per_weight": bits_per_weight(reports),
        "output_error": sum(r.output_error for r in reports.values()) / len(reports),
        "storage": "+".join(sorted({part for kind in stored.values() for part in kind.split("+")})),
    }


def _with_nncf(contender: WeightContender, job: WeightJob, float_ir: Any) -> tuple[Any, Row]:
    settings = dict(contender.nncf)
    products = [n for n in float_ir.get_ordered_ops() if n.get_type_name() == "MatMul"]
    head = products[-1].get_friendly_name()
    scope = nncf.IgnoredScope(types=["Gather"], names=[head], validate=False)
    if settings.pop("dataset", False):
        settings["dataset"] = nncf.Dataset(_inputs(job), lambda item: item)
        settings["subset_size"] = job.windows
    if not settings["mode"].startswith("int8"):
        settings["backup_mode"] = nncf.BackupMode.NONE
    model, row = _timed(
        lambda: condiquant_nncf.compress_weights(float_ir, ignored_scope=scope, **settings)
    )
    return model, row | {"bits_per_weight": ir_bits_per_weight(model), "storage": "NNCF's"}


def _inputs(job: WeightJob) -> list[dict[str, np.ndarray[Any, Any]]]:
    """The calibration windows, as a stateful IR takes them."""
    tokenizer = read_tokenizer(Path(job.model))
    ids = windows(tokenizer, Path(job.calibration), length=job.length, count=job.windows).numpy()
    return [
        {
            "input_ids": row[None],
            "attention_mask": np.ones((1, job.length), np.int64),
            "position_ids": np.arange(job.length, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        for row in ids
    ]


def _timed(function: Callable[[], Any]) -> tuple[Any, Row]:
    started, busy = time.perf_counter(), time.process_time()
    result = function()
    return result, {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - busy,
        # Not ru_maxrss, which begins with what the process had that started this one.
        "peak_memory_bytes": memory("VmHWM") or None,
    }


def measure(contender: WeightContender, job: WeightJob, out: Path) -> Row:
    """File, memory, speed and perplexity of the row's IR."""
    from condiquant_recipes.weight_comparison import measuring

    tokenizer = read_tokenizer(Path(job.model))
    ids = windows(tokenizer, Path(job.text), length=job.length, count=job.scored)
    return measuring.measure(out / ROWS / contender.id, tokenizer, ids)


def main(step: str, out: Path, name: str) -> None:
    """One step of one row."""
    job = WeightJob.read(out)
    contender = next(c for c in all_contenders(job.group_size, job.inputs) if c.id == name)
    try:
        found = {"compress": compress, "measure": measure}[step](contender, job, out)
    except InputError as error:
        found = {"reason": str(error)}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
