"""The page ``compare.html`` of a comparison: one file, opens from disk without a network."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from condiquant_plugin.files import write_atomic
from condiquant_recipes.comparison.plots import Plot, layer_errors, scatter, sensitivity

TEMPLATE = "page.html.j2"
MISSING = "–"
KIB = 1024.0

GROUPS = {
    "float": "Float",
    "nncf-int8": "NNCF int8",
    "nncf-weights": "NNCF weight compression",
    "nncf-low-bit": "NNCF MinMax at low bits",
    "neural-compressor": "Intel Neural Compressor",
    "2dquant": "2DQuant",
    "condiquant": "CondiQuant",
    "trained": "Trained with few bits from the start",
}


@dataclass(frozen=True)
class Column:
    """A number of the table: ``key`` in the row, then ``dataset`` in it where there is one."""

    key: str
    head: str
    form: str
    unit: float = 1.0
    dataset: str | None = None

    def cell(self, row: Mapping[str, Any]) -> tuple[float | None, str]:
        """Value to sort by and text."""
        value = _number(row, self.key, self.dataset)
        # Adding zero turns the -0.0 that rounding may leave into 0.0.
        text = MISSING if value is None else self.form.format(round(value / self.unit, 4) + 0.0)
        return value, text


COSTS = (
    Column("bin_bytes", ".bin, KiB", "{:,.0f}", KIB),
    Column("xml_bytes", ".xml, KiB", "{:,.0f}", KIB),
    Column("compression", "Compres\u00adsion", "{:.2f}×"),
    Column("latency_ratio", "Latency to float", "{:.3f}"),
    Column("latency_ms", "Latency, ms", "{:,.2f}"),
    Column("int8_share", "int8 share", "{:.0%}"),
    Column("calibration_seconds", "Calibra\u00adtion, s", "{:,.1f}"),
    Column("peak_memory_bytes", "Peak memory, MiB", "{:,.0f}", KIB**2),
)
BITS = (Column("weight_bits", "W", "{:.0f}"), Column("activation_bits", "A", "{:.0f}"))
SCORES = (
    ("psnr", "PSNR{}, dB", "{:.2f}"),
    ("ssim", "SSIM{}", "{:.4f}"),
    ("drop", "Drop, dB", "{:.2f}"),
    ("fidelity", "Fidelity, dB", "{:.2f}"),
)


def write_page(report: Mapping[str, Any], folder: Path) -> Path:
    """Write ``folder/compare.html`` from the content of ``compare.json``.

    Args:
        report: the comparison; names and reasons in it are escaped.
        folder: where the page goes and what the crops' files are relative to.

    Raises:
        OSError: a crop's file is missing or the folder is not writable; no page is left behind.
    """
    rows = _numbered(report)
    measured = [row for row in rows if not row.get("reason")]
    to_float = " to float" if report["reference"] == "float" else ""
    scores = {
        head.format(to_float): [Column(key, name, form, dataset=name) for name in report["sets"]]
        for key, head, form in SCORES
    }
    columns = [*BITS, *(c for group in scores.values() for c in group), *COSTS]
    left, right, choices = _choices(rows, report)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(TEMPLATE).render(
        report=report,
        groups={g: title for g, title in GROUPS.items() if any(r["group"] == g for r in rows)},
        rows=rows,
        measured=[(row, [c.cell(row) for c in columns]) for row in measured],
        failed=[(row, [c.cell(row) for c in BITS]) for row in rows if row.get("reason")],
        bits=BITS,
        scores=scores,
        costs=COSTS,
        plots=fronts(report),
        layer_errors=layer_errors(report["layers"]),
        sensitivities={
            label: sensitivity(record) for label, record in report.get("precision", {}).items()
        },
        crops=[_embedded(crop, folder) for crop in report["crops"]],
        choices=choices,
        left=left,
        right=right,
    )
    target = folder / "compare.html"
    write_atomic(target, page.encode())
    return target


def _number(row: Mapping[str, Any], key: str, dataset: str | None = None) -> float | None:
    value = row.get(key)
    if dataset is not None:
        value = (value or {}).get(dataset)
    return value if value is not None and isfinite(value) else None


def _numbered(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [row | {"number": number} for number, row in enumerate(report["rows"], 1)]


def fronts(report: Mapping[str, Any]) -> list[Plot]:
    """Accuracy against size and against latency, of the methods of a comparison that have a result."""
    rows = [row for row in _numbered(report) if not row.get("reason")]
    measure = "fidelity" if report["reference"] == "float" else "psnr"

    def accuracy(row: Mapping[str, Any]) -> float | None:
        values = [_number(row, measure, name) for name in report["sets"]]
        found = [value for value in values if value is not None]
        return fmean(found) if found and len(found) == len(values) else None

    def size(row: Mapping[str, Any]) -> float | None:
        parts = [_number(row, key) for key in ("bin_bytes", "xml_bytes")]
        return None if None in parts else sum(part or 0 for part in parts) / KIB

    name = "Fidelity to float" if measure == "fidelity" else "PSNR"
    mean = "mean of " if len(report["sets"]) > 1 else ""
    y_label = f"{name}, {mean}{', '.join(report['sets'])}, dB"
    plots = (
        scatter(
            rows,
            lambda row: (size(row), accuracy(row)),
            "pareto_size",
            title=f"{name} against size",
            x_label=".bin + .xml, KiB",
            y_label=y_label,
            log=True,
        ),
        scatter(
            rows,
            lambda row: (_number(row, "latency_ratio"), accuracy(row)),
            "pareto_latency",
            title=f"{name} against latency",
            x_label="latency, ratio to float",
            y_label=y_label,
        ),
    )
    return [plot for plot in plots if plot]


def _choices(
    rows: Sequence[Mapping[str, Any]], report: Mapping[str, Any]
) -> tuple[str, str, dict[str, str]]:
    """Left and right method to begin with, and the label of each that has crops.

    The last of CondiQuant's at the bits of the layers shown, and of the others with as many bits.
    """
    pictured = {key for crop in report["crops"] for key in crop["files"]}
    rows = [row for row in rows if row["id"] in pictured]
    choices = {"reference": "reference"} if "reference" in pictured else {}
    choices |= {row["id"]: f"{row['number']} {row['label']}" for row in rows}
    if not rows:
        return "reference", "reference", choices
    bits = report["layers"][0]["bits"] if report["layers"] else None
    ours = [row for row in rows if row["group"] == "condiquant"]
    at_bits = [row for row in ours if row["weight_bits"] == bits]
    right = (at_bits or ours or rows)[-1]
    rivals = [row for row in rows if row["group"] not in ("condiquant", "float")]
    equal = [r for r in rivals if all(r[column.key] == right[column.key] for column in BITS)]
    left = (equal or rivals or rows[:1])[-1]
    return left["id"], right["id"], choices


def _embedded(crop: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The crop with its images as data URIs and the whole factor they are enlarged by."""
    images = {
        key: "data:image/png;base64," + b64encode((folder / file).read_bytes()).decode()
        for key, file in crop["files"].items()
    }
    return dict(crop) | {"images": images, "zoom": max(1, 384 // crop["width"])}
