"""A comparison of weights as a page and on the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich import box
from rich.table import Table

from condiquant_plugin.files import write_atomic
from condiquant_recipes.comparison import page as comparison_page
from condiquant_recipes.comparison.page import Column
from condiquant_recipes.comparison.plots import Plot, scatter
from condiquant_recipes.weight_comparison.comparing import foresight
from condiquant_recipes.weight_comparison.contenders import GROUPS

PAGE = "compare.html"
_MIB = 1024.0**2
COLUMNS = (
    Column("perplexity", "Perplex\u00adity", "{:.4g}"),
    Column("bits_per_weight", "Bits", "{:.2f}"),
    Column("output_error", "Output error", "{:.4f}"),
    Column("bin_bytes", ".bin, MiB", "{:,.0f}", _MIB),
    Column("memory_bytes", "Memory, MiB", "{:,.0f}", _MIB),
    Column("tokens_per_second", "Tokens/s", "{:.1f}"),
    Column("seconds", "s", "{:,.0f}"),
    Column("cpu_seconds", "CPU s", "{:,.0f}"),
    Column("peak_memory_bytes", "Peak, MiB", "{:,.0f}", _MIB),
)

_SHOWN = ("perplexity", "bits_per_weight", "bin_bytes", "memory_bytes", "cpu_seconds")
"""Of them what 80 columns of a terminal hold."""


def write_page(report: Mapping[str, Any], folder: Path) -> Path:
    """Write ``folder/compare.html`` from the content of ``compare.json``; names in it are escaped."""
    rows = [row | {"number": number} for number, row in enumerate(report["rows"], 1)]
    measured = [row for row in rows if not row["reason"]]
    places = [Path(__file__).parent, Path(comparison_page.__file__).parent]
    environment = Environment(
        loader=FileSystemLoader(places),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    plot = front(measured)
    page = environment.get_template("weights.html.j2").render(
        report=report,
        groups={g: title for g, title in GROUPS.items() if any(r["group"] == g for r in rows)},
        rows=rows,
        columns=COLUMNS,
        measured=[(row, [c.cell(row) for c in COLUMNS]) for row in measured],
        failed=[row for row in rows if row["reason"]],
        plot=plot,
        below=[(number, math.exp(-value)) for number, value in (plot.below if plot else [])],
    )
    target = folder / PAGE
    write_atomic(target, page.encode())
    return target


def front(rows: list[dict[str, Any]]) -> Plot | None:
    """Perplexity, the lowest on top, against bits per weight; rows with their ``number``."""
    return scatter(
        rows,
        lambda row: (row.get("bits_per_weight"), foresight(row)),
        "pareto_bits",
        title="Perplexity against bits per weight",
        x_label="bits per weight, all that is stored counted",
        y_label="perplexity",
        log=True,
        y_text=lambda value: f"{math.exp(-value):.3g}",
    )


def table(report: Mapping[str, Any]) -> Table:
    """One row per method; those that failed have no figures."""
    result = Table(title=f"weights of {report['model']}", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    result.add_column("method", overflow="fold")
    columns = [column for column in COLUMNS if column.key in _SHOWN]
    for column in columns:
        result.add_column(column.head.replace("\u00ad", ""), justify="right")
    result.add_column("front")
    for row in report["rows"]:
        cells = [column.cell(row)[1] for column in columns]
        result.add_row(row["label"], *cells, "*" if row["pareto_bits"] else "")
    result.caption = (
        "perplexity, file and memory of the IR; bits of all that the compressed layers store; CPU s to "
        "compress; front: none has fewer bits and a lower perplexity; speed and more are in the page"
    )
    return result


def remarks(report: Mapping[str, Any]) -> Iterator[str]:
    """Why rows have no figures."""
    for row in report["rows"]:
        if row["reason"]:
            yield f"{row['id']}: no result: {row['reason']}"
