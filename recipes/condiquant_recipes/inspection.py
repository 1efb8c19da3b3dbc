"""``condiquant inspect``: IR files, recipes and checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from condiquant_plugin.errors import InputError
from condiquant_plugin.uniform.bits import FLOAT_BITS
from condiquant_recipes.hosts import load
from condiquant_recipes.precision.target import decibels


def describe(file: Path, *, layers: bool = False) -> dict[str, Any]:
    """Describe an IR (.xml), a recipe (.yml, .yaml) or a checkpoint.

    Args:
        layers: of an IR, also what each layer runs as; networks always come with their layers.

    Raises:
        InputError: missing or unreadable file.
    """
    if file.suffix in {".yml", ".yaml"}:
        return _of_network("describe_recipe", file)
    if not file.is_file():
        raise InputError(f"{file} does not exist: give an IR, a recipe or a checkpoint")
    if file.suffix == ".bin" and not file.with_suffix(".param").exists():
        raise InputError(f"{file} is half of an IR: give {file.with_suffix('.xml').name}")
    if file.suffix == ".xml":
        from condiquant_openvino.running.inspection import inspect

        return inspect(file, layers=layers)
    return _of_network("describe_checkpoint", file)


def _of_network(function: str, file: Path) -> dict[str, Any]:
    described: dict[str, Any] = getattr(load("network_inspection"), function)(file)
    return described


def show(described: dict[str, Any], console: Console) -> None:
    """Print the description: of an IR a summary first, then tables."""
    lists = {"layers", "layer_executions"}
    if "metadata" in described:
        for line in summary(described):
            plain_line(console, line)
    console.print(property_table({k: v for k, v in described.items() if k not in lists}))
    if "layer_executions" in described:
        console.print(execution_table(described["layer_executions"]))
    if "layers" in described:
        layers = Table("layer", "weight", "condition number")
        layers.columns[0].no_wrap = True
        for row in described["layers"]:
            shape = "x".join(map(str, row["shape"] or ())) or "product"
            kappa = "" if row["condition"] is None else f"{row['condition']:.1f}"
            layers.add_row(row["name"], shape, kappa)
        console.print(layers)
        # Outside the table, or its columns would break what is to be copied.
        console.print("NNCF's nodes of these layers, for ignored_scope:")
        for row in described["layers"]:
            plain_line(console, row["nncf_node"])


def plain_line(console: Console, text: str) -> None:
    """Print as it is: what does not fit is left to the terminal."""
    console.print(text, soft_wrap=True, highlight=False, markup=False)


def summary(described: Mapping[str, Any]) -> Iterator[str]:
    """What a user wants to know of an IR, in a few lines."""
    metadata = described["metadata"]
    if "scale" in metadata:
        made = f"{metadata.get('network', 'a network')}, enlarges {metadata['scale']} times"
        if "weight_bits" in metadata:
            made += (
                f"; {metadata['weight_bits']}-bit weights and {metadata['activation_bits']}-bit inputs"
                f" of the layers in scope ({metadata['scope']})"
            )
        yield made
    else:
        yield "not exported by condiquant: scale and bits are unknown"
    (takes, *_), (gives, *_) = described["inputs"].values(), described["outputs"].values()
    multiple = int(metadata.get("pad_multiple", 1))
    sides = f", height and width multiples of {multiple}" if multiple > 1 else ""
    yield f"takes {takes}{sides}, gives {gives}"
    weights, graph = (described[f"{part}_bytes"] / 1024 for part in ("bin", "xml"))
    executes = described["executes"]
    yield (
        f"{weights:.0f} KiB of weights, {graph:.0f} KiB of graph; of {sum(executes.values())} convolutions"
        f" and matrix products {executes.get('int8', 0)} run as int8 on this CPU"
    )


def sensitivity_table(folder: Path) -> Table:
    """What the bits of each layer cost by prediction, and which a target's search chose.

    Args:
        folder: of a run with a target.

    Raises:
        InputError: it holds none.
    """
    try:
        record = json.loads((folder / "metrics.json").read_text())["precision"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{folder} holds no run with a target: give the folder of `condiquant run … --target`"
        ) from error
    parts = record["sensitivity"]
    widths = sorted({int(w) for part in parts.values() for by in part.values() for w in by})
    heads = [f"{kind}{width}" for kind in "wa" for width in widths]
    table = Table("layer", "bits", *heads, title="PSNR to the float output with this alone, dB")
    table.columns[0].overflow = "fold"
    for name, (weight, activation) in record["bits"].items():
        cells = [
            f"{decibels(by[str(width)]):.0f}" if by else ""
            for by in (parts["weights"].get(name), parts["inputs"].get(name))
            for width in widths
        ]
        bits = f"w{weight}a{activation}" if name in parts["weights"] else f"a{activation}"
        table.add_row(name, bits.replace(str(FLOAT_BITS), "float"), *cells)
    return table


def property_table(values: Mapping[str, Any]) -> Table:
    """A row for each value, those of dictionaries by dotted names."""
    table = Table("property", "value")
    table.columns[0].no_wrap, table.columns[1].overflow = True, "fold"
    for key, value in _flat(values):
        table.add_row(key, value)
    return table


def execution_table(layers: Iterable[Mapping[str, str]], title: str | None = None) -> Table:
    """What each layer of an IR runs as."""
    table = Table("layer", "operator", "operands", "runs as", "why not int8", title=title)
    table.columns[0].overflow = "fold"
    for layer in layers:
        columns = ("name", "operator", "operands", "runs_as", "reason")
        table.add_row(*(layer[column] for column in columns))
    return table


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)
