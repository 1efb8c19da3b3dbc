"""A comparison on the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from rich import box
from rich.table import Table

from condiquant_recipes.comparison.scoring import size

_MISSING = "–"


def table(report: Mapping[str, Any]) -> Table:
    """One row per method; those that failed have no figures."""
    sets, to_float = report["sets"], report["reference"] == "float"
    rows = [row for row in report["rows"] if not row["reason"]]
    result = Table(
        title=f"{report['recipe']} x{report['scale']}", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    result.add_column("method", overflow="fold")
    accuracy = "PSNR to float, {} dB" if to_float else "{} dB"
    columns: list[tuple[str, list[str]]] = [
        (accuracy.format(name), [_cell(row["psnr"][name], ".2f", "same") for row in rows])
        for name in sets
    ]
    columns.append(("SSIM", [_cell(fmean(row["ssim"].values()), ".4f") for row in rows]))
    if not to_float:
        columns.append(("drop", [_cell(_mean(row["drop"]), ".2f") for row in rows]))
        columns.append(("fid. dB", [_cell(_mean(row["fidelity"]), ".2f", "same") for row in rows]))
    columns += [
        ("KiB", [_cell(size(row) / 1024, ",.0f") for row in rows]),
        ("smaller", [_cell(row["compression"], ".2f") for row in rows]),
        ("latency", [_cell(row["latency_ratio"], ".3f") for row in rows]),
        ("int8", [_cell(row["int8_share"], ".0%") for row in rows]),
        ("s", [_cell(row["calibration_seconds"], ",.0f") for row in rows]),
        ("MiB", [_cell(row["peak_memory_bytes"], ",.0f", unit=2**20) for row in rows]),
        ("front", ["s" * row["pareto_size"] + "l" * row["pareto_latency"] for row in rows]),
    ]
    for header, cells in columns:
        widest = max(map(len, (*header.split(), *cells)))
        result.add_column(header, justify="right", min_width=widest)
    figures = {row["id"]: cells for row, *cells in zip(rows, *(c for _, c in columns), strict=True)}
    for row in report["rows"]:
        result.add_row(row["label"], *figures.get(row["id"], [_MISSING] * len(columns)))
    means = ", means over sets" * (len(sets) > 1)
    accuracy = (
        f"PSNR and SSIM against the float output{means}"
        if to_float
        else f"PSNR and SSIM against HR, drop from float, fidelity: PSNR to the float output{means}"
    )
    result.caption = (
        f"{accuracy}; KiB of .bin + .xml, times smaller than float; latency: ratio to float; int8: "
        "share of the convolutions and matrix products; s and MiB that calibration took; front: "
        "Pareto front of PSNR against size (s), against latency (l)"
    )
    return result


def remarks(report: Mapping[str, Any]) -> Iterator[str]:
    """Why rows have no figures, then what is to be known about the others; each once."""
    for row in report["rows"]:
        if row["reason"]:
            yield f"{row['id']}: no result: {row['reason']}"
    notes: dict[str, list[str]] = {}
    for row in report["rows"]:
        for note in row["notes"]:
            notes.setdefault(note, []).append(row["id"])
    for note, ids in notes.items():
        yield f"note: {note} ({', '.join(ids)})"


def method_table(methods: Sequence[Any]) -> Table:
    """What ``--methods`` takes."""
    result = Table("id", "method", "group", box=box.SIMPLE_HEAD)
    for method in methods:
        result.add_row(method.id, method.label, method.group)
    return result


def _mean(values: Mapping[str, float | None]) -> float | None:
    """None where the images are identical."""
    found = [value for value in values.values() if value is not None]
    return fmean(found) if found and len(found) == len(values) else None


def _cell(value: float | None, form: str, missing: str = _MISSING, unit: int = 1) -> str:
    return missing if value is None else format(value / unit, form)
