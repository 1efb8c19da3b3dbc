"""Rows of a comparison of weights: computed one process after another, kept, and put together."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from condiquant_plugin.errors import InputError, check_count
from condiquant_plugin.files import check_writable, write_atomic
from condiquant_recipes.progress import Progress
from condiquant_recipes.weight_comparison.contenders import (
    WeightContender,
    all_contenders,
    choose,
)
from condiquant_recipes.weight_comparison.job import FLOAT, MODEL, ROWS, WeightJob, job_file
from condiquant_recipes.workspace import remove
from condiquant_transformers import read_folder, read_tokenizer, save_folder, windows
from condiquant_transformers.ir import check_exporter, export_ir

Row = dict[str, Any]
REPORT = "compare.json"
_STEPS = ("compress", "measure")
_REASON_LENGTH = 300


def compare_weights(
    job: WeightJob,
    out: Path,
    *,
    methods: Sequence[str] = (),
    overwrite: bool = False,
    command: str = "",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compress a language model in every way, and measure what each gives; writes ``compare.json``.

    A row that ``out`` holds from an earlier call with the same model, texts, settings and versions is not
    computed again, unless it failed.

    Args:
        methods: ids of :func:`condiquant_recipes.weight_comparison.contenders.all_contenders`; by default
            all.
        overwrite: drop what ``out`` holds.
        command: what the report should say it was made with.

    Returns:
        The content of ``compare.json``. A method that failed has its row with a ``reason``.

    Raises:
        InputError: a model, text or setting that cannot be used; ``out`` holds another comparison.
    """
    progress = progress or Progress()
    chosen = choose(all_contenders(job.group_size, job.inputs), methods)
    if job.length < 2:
        raise InputError(f"length={job.length}: use at least 2 tokens")
    check_count("scored", job.scored)
    check_exporter()
    counts = _check_texts(job)
    versions = {name: version(name) for name in ("torch", "transformers", "openvino", "nncf")}
    _open(out, job, versions, overwrite=overwrite)
    if not (out / FLOAT / MODEL).is_file():
        with progress.status("converting the float model"):
            _convert(Path(job.model), out)
    rows = []
    for number, contender in enumerate(chosen, 1):
        with progress.status(f"{number}/{len(chosen)} {contender.label}"):
            rows.append(_row(contender, out))
        if contender.group == "float" and rows[-1]["reason"]:
            raise InputError(f"the float model: {rows[-1]['reason']}")
    for row in rows:
        row["pareto_bits"] = _is_on_front(row, rows)
    report = {
        "model": Path(job.model).name,
        "texts": {key: Path(getattr(job, key)).name for key in ("calibration", "text")},
        "windows": counts,
        "length": job.length,
        "group_size": job.group_size,
        "inputs": job.inputs,
        "versions": versions,
        "command": command,
        "rows": rows,
    }
    write_atomic(out / REPORT, json.dumps(report, indent=1).encode())
    return report


def _check_texts(job: WeightJob) -> dict[str, int]:
    """How many windows the texts have, of those asked for."""
    if Path(job.calibration).resolve() == Path(job.text).resolve():
        raise InputError(f"{job.text} is the calibration text, too: score on another")
    tokenizer = read_tokenizer(Path(job.model))
    asked = {"calibration": job.windows, "text": job.scored}
    return {
        key: len(windows(tokenizer, Path(getattr(job, key)), length=job.length, count=count))
        for key, count in asked.items()
    }


def _open(out: Path, job: WeightJob, versions: dict[str, str], *, overwrite: bool) -> None:
    check_writable(out)
    identity, file = job.identity(versions), job_file(out)
    if overwrite:
        for path in (file, out / FLOAT, out / ROWS, out / REPORT):
            remove(path)
    if file.exists() and file.read_bytes() != identity:
        raise InputError(
            f"{out} holds a comparison of another model, text, setting or version: give another --out, "
            "or --overwrite to drop it"
        )
    if not file.exists() and out.exists() and any(out.iterdir()):
        raise InputError(f"{out} holds something else: give another --out")
    (out / ROWS).mkdir(parents=True, exist_ok=True)
    write_atomic(file, identity)


def _convert(model: Path, out: Path) -> None:
    """The IR that all rows start from, float16."""
    with TemporaryDirectory(dir=out) as part:
        save_folder(read_folder(model), Path(part) / "half")
        export_ir(Path(part) / "half", Path(part) / FLOAT, lambda _: None)
        (Path(part) / FLOAT).rename(out / FLOAT)


def _row(contender: WeightContender, out: Path) -> Row:
    """That of an earlier call if it finished."""
    folder = out / ROWS / contender.id
    file = folder.with_name(f"{contender.id}.json")
    if file.is_file():
        before: Row = json.loads(file.read_text())
        if before["reason"] is None:
            return before
    row: Row = {"id": contender.id, "label": contender.label, "group": contender.group}
    row["reason"] = None
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for step in _STEPS:
        if row["reason"] is None:
            row |= _run(step, out, contender.id)
    shutil.rmtree(folder)  # some 100 MB each
    write_atomic(file, json.dumps(row, indent=1).encode())
    return row


def _run(step: str, out: Path, name: str) -> Row:
    """A step of a row in its own process; its reason if it failed."""
    module = "condiquant_recipes.weight_comparison.process"
    done = subprocess.run(
        [sys.executable, "-m", module, step, str(out), name],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        found: Row = json.loads(done.stdout.splitlines()[-1])
        return found
    said = (done.stderr.strip() or f"it ended with {done.returncode}").splitlines()[-1]
    return {"reason": said[:_REASON_LENGTH]}


def foresight(row: Mapping[str, Any]) -> float | None:
    """``-ln`` of the perplexity: higher is better; None where there is none."""
    value = row.get("perplexity")
    return None if value is None or not math.isfinite(value) else -math.log(value)


def _is_on_front(row: Row, rows: Sequence[Row]) -> bool:
    """Whether no other row has fewer bits and a lower perplexity."""

    def point(each: Row) -> tuple[float, float] | None:
        good = foresight(each)
        return None if each["reason"] or good is None else (good, -each["bits_per_weight"])

    mine = point(row)
    others = [point(each) for each in rows]
    return mine is not None and not any(
        other and other != mine and other[0] >= mine[0] and other[1] >= mine[1] for other in others
    )
