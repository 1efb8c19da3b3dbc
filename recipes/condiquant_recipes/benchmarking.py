"""``condiquant benchmark``: IRs of any tool against each other."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import openvino as ov
from rich import box
from rich.console import Console
from rich.table import Table

import condiquant_openvino as openvino_host
from condiquant_plugin.errors import InputError
from condiquant_plugin.files import write_atomic
from condiquant_recipes.inspection import execution_table, plain_line

_UNLIMITED = 10_000
"""Characters."""


def benchmark(
    files: Sequence[Path],
    *,
    hint: str | None = None,
    iterations: int = 30,
    duration: float = 3.0,
    shape: str | None = None,
    data_shape: str | None = None,
    device: str = "CPU",
    precision: str = "f32",
) -> dict[str, Any]:
    """Measure IRs in turns.

    Args:
        shape, data_shape: as benchmark_app takes them: ``[1,3,64,64]``, or ``image[1,3,64,64]`` if
            ``image`` is an input of every IR.

    Returns:
        ``openvino``, ``device``, ``precision``, ``hint`` and ``models``: by name ``file``,
        ``xml_bytes``, ``bin_bytes`` and what :func:`condiquant_openvino.compare_latency` returns.

    Raises:
        InputError: a file that is no IR, or a setting that an IR or OpenVINO cannot take.
    """
    names = dict(zip(distinct_names(files), files, strict=True))
    sizes: list[list[int] | None] = []
    for text in (shape, data_shape):
        given = None if text is None else parse_shape(text)
        if given is not None and given[0]:
            _check_input_name(given[0], files)
        sizes.append(given and given[1])
    found = openvino_host.compare_latency(
        names,
        sizes[0],
        data_shape=sizes[1],
        iterations=iterations,
        duration=duration,
        hint=hint,
        device=device,
        precision=precision,
    )
    models = {}
    for name, figures in found.items():
        xml = names[name]
        described = {"file": str(xml), "xml_bytes": xml.stat().st_size}
        described["bin_bytes"] = xml.with_suffix(".bin").stat().st_size
        layers = [asdict(layer) for layer in figures["layers"]]
        models[name] = {**described, **figures, "layers": layers}
    return {
        "openvino": ov.get_version(),
        "device": device,
        "precision": precision,
        "hint": hint,
        "models": models,
    }


def write_report(report: dict[str, Any], path: Path) -> None:
    """Write as JSON.

    Raises:
        InputError: if the file cannot be written.
    """
    try:
        write_atomic(path, json.dumps(report, indent=1).encode())
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror}; give --out a file in a folder that exists"
        ) from error


def show(report: dict[str, Any], console: Console, *, layers: bool = False) -> None:
    """Print the figures as a table, then with ``layers`` one table for each IR.

    Names that leave no room for the figures are numbers in the table, with a legend in front.
    """
    models = report["models"]
    table = _table(report, list(models))
    unlimited = console.options.update(width=_UNLIMITED)
    if console.measure(table, options=unlimited).minimum > console.width:
        for number, name in enumerate(models, start=1):
            plain_line(console, f"{number}: {name}")
        table = _table(report, [str(number) for number, _ in enumerate(models, start=1)])
    console.print(table)
    if layers:
        for name, model in models.items():
            console.print(execution_table(model["layers"], title=name))


def _table(report: dict[str, Any], labels: Sequence[str]) -> Table:
    models = report["models"]
    shapes = {"x".join(map(str, m["shape"])) + " dynamic" * m["dynamic"] for m in models.values()}
    title = "input " + ", ".join(sorted(shapes))
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("model", min_width=max(map(len, labels)))
    headers = (".bin KiB", ".xml KiB", "ms", "p10", "p90", "ratio", "frames /s", "ratio", "int8")
    for header in headers:
        table.add_column(header, justify="right")
    for label, model in zip(labels, models.values(), strict=True):
        table.add_row(
            label,
            *(_number(model[f"{part}_bytes"] / 1024, ".0f") for part in ("bin", "xml")),
            *(_number(model[f"{part}_ms"], ".2f") for part in ("median", "p10", "p90")),
            _number(model["ratio"], ".3f"),
            _number(model["frames_per_second"], ".2f"),
            _number(model["throughput_ratio"], ".3f"),
            _number(model["int8_share"], ".0%"),
        )
    for column in table.columns[1:]:
        words = [*str(column.header).split(), *map(str, column.cells)]
        column.min_width = max(map(len, words))
    table.caption = (
        f"{report['device']}, float operators in {report['precision']}; ratios to {labels[0]}: "
        "of time (less is faster), of frames/s (more is faster); int8: share of the convolutions "
        "and matrix products"
    )
    first, *others = labels
    ratios = [model["ratio"] or 0 for model in models.values()][1:]
    if slower := [name for name, ratio in zip(others, ratios, strict=True) if ratio > 1]:
        table.caption += f"; on this machine {first} is faster than {', '.join(slower)}"
    return table


def parse_shape(text: str) -> tuple[str, list[int]]:
    """Name of the input, if given, and sizes of a shape as benchmark_app takes it.

    >>> parse_shape("image[1,3,64,64]")
    ('image', [1, 3, 64, 64])

    Raises:
        InputError: if it is none.
    """
    sizes = r"\s*\d+(?:\s*,\s*\d+)*\s*"
    found = re.fullmatch(rf"([^\[\],]*)\[({sizes})\]|({sizes})", text.strip())
    if found is None:
        raise InputError(f"shape {text!r} is none: give 1,3,height,width, such as [1,3,64,64]")
    name, *given = found.groups()
    return (name or "").strip(), [int(size) for size in (given[0] or given[1]).split(",")]


def _check_input_name(name: str, files: Sequence[Path]) -> None:
    for file in files:
        ports = openvino_host.read_ir(file).inputs
        known = {
            n for port in ports for n in (*port.get_names(), port.get_node().get_friendly_name())
        }
        if name not in known:
            raise InputError(
                f"{file} has no input {name!r}: use {', '.join(sorted(known))} or none"
            )


def distinct_names(files: Sequence[Path]) -> list[str]:
    """Stems with as many folders in front as tell them apart; a file given again is numbered.

    >>> distinct_names([Path("a/model.xml"), Path("b/model.xml")])
    ['a/model', 'b/model']
    """
    paths = [file.resolve().with_suffix("") for file in files]
    depths = range(1, max(len(path.parts) for path in paths) + 1)
    for depth in depths:
        short = {path: "/".join(path.parts[-depth:]) for path in paths}
        if len(set(short.values())) == len(short):
            break
    names: list[str] = []
    for path in paths:
        again = sum(earlier == path for earlier in paths[: len(names)])
        names.append(short[path] + (f" ({again + 1})" if again else ""))
    return names


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
