"""The commands ``condiquant inspect``, ``benchmark``, ``compare`` and ``demo``."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from condiquant_plugin.errors import InputError
from condiquant_plugin.files import check_writable
from condiquant_recipes import inspection
from condiquant_recipes.cli_options import (
    DataOption,
    JsonOption,
    LayersOption,
    OverwriteOption,
    QuietOption,
    RecipeArgument,
    SetOption,
    SetsOption,
    console,
    ir_path,
    progress,
    recipe_data,
    split,
)
from condiquant_recipes.hosts import load


def inspect(
    file: Annotated[
        Path,
        typer.Argument(help="An IR (.xml) or a run's folder, a recipe (.yml) or a checkpoint."),
    ],
    as_json: JsonOption = False,
    layers: LayersOption = False,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Of a run with a target: what bits cost.")
    ] = False,
) -> None:
    """What is in an IR, a recipe's network, or a checkpoint: layers, shapes, condition numbers."""
    if sensitivity:
        console().print(inspection.sensitivity_table(file))
        return
    described = inspection.describe(ir_path(file), layers=layers)
    if as_json:
        print(json.dumps(described, indent=1, default=str))
    else:
        inspection.show(described, console())


def benchmark(
    models: Annotated[
        list[Path],
        typer.Argument(metavar="MODEL...", help="IRs of any tool, or output folders of runs."),
    ],
    hint: Annotated[
        str | None,
        typer.Option(
            "-hint", "--hint", help="latency, throughput: only that; none: no performance hint."
        ),
    ] = None,
    iterations: Annotated[
        int, typer.Option("-niter", "--niter", help="Iterations of the latency measurement.")
    ] = 30,
    duration: Annotated[
        float, typer.Option("-t", "--t", help="Seconds of the throughput measurement, for each IR.")
    ] = 3.0,
    shape: Annotated[
        str | None,
        typer.Option("-shape", "--shape", help="Make dynamic IRs static with it: [1,3,64,64]."),
    ] = None,
    data_shape: Annotated[
        str | None,
        typer.Option("-data_shape", "--data_shape", help="Of images for IRs that stay dynamic."),
    ] = None,
    device: Annotated[str, typer.Option("-d", "--d", "--device", help="OpenVINO device.")] = "CPU",
    precision: Annotated[
        str,
        typer.Option(
            "-infer_precision", "--infer_precision", help="Of float operators: f32, bf16 or f16."
        ),
    ] = "f32",
    as_json: JsonOption = False,
    out: Annotated[Path | None, typer.Option(help="Write JSON to this file.")] = None,
    layers: LayersOption = False,
) -> None:
    """Paired latency and throughput of IRs, the first one the reference; sizes and precisions."""
    if out is not None:
        if out.is_dir() or not out.parent.is_dir():
            raise InputError(f"cannot write {out}: give --out a file in a folder that exists")
        check_writable(out.parent)
    benchmarking = load("benchmarking")
    report = benchmarking.benchmark(
        [ir_path(model) for model in models],
        hint=hint,
        iterations=iterations,
        duration=duration,
        shape=shape,
        data_shape=data_shape,
        device=device,
        precision=precision,
    )
    if out is not None:
        benchmarking.write_report(report, out)
    if as_json:
        print(json.dumps(report, indent=1))
    else:
        benchmarking.show(report, console(), layers=layers)


def compare(
    recipe: RecipeArgument,
    methods: Annotated[
        str, typer.Option(help="Ids, comma-separated (default: all); help lists them.")
    ] = "",
    data: DataOption = None,
    sets: SetsOption = "",
    also: Annotated[
        list[Path] | None,
        typer.Option(help="An experiment of `condiquant train`: its network is a row, as it is."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Output folder (default: out/<name>_compare).")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep finished methods of this folder.")
    ] = False,
    overwrite: OverwriteOption = False,
    overrides: SetOption = None,
    quiet: QuietOption = False,
) -> None:
    """NNCF's methods, 2DQuant and CondiQuant on the network of a recipe, side by side."""
    from condiquant_recipes.recipe_files import find_recipe

    loaded = find_recipe(recipe, overrides or [])
    comparison_table = load("comparison.table")
    if methods == "help":
        known = load("comparison.contenders").all_contenders(loaded)
        console().print(comparison_table.method_table(known))
        return
    folder = recipe_data(loaded, data)
    out = out or Path("out") / f"{loaded.name}_compare"
    report = load("comparison.comparing").compare(
        loaded,
        folder,
        out,
        sets=split(sets),
        methods=split(methods),
        also=also or [],
        resume=resume,
        overwrite=overwrite,
        command=shlex.join(["condiquant", *sys.argv[1:]]),
        progress=progress(quiet),
    )
    page = load("comparison.page").write_page(report, out)
    console().print(comparison_table.table(report))
    print(*comparison_table.remarks(report), sep="\n")
    print(f"figures: {out / 'compare.json'}\npage:    {page}")


def demo(
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("out/demo"),
    quiet: QuietOption = False,
) -> None:
    """DAT-light x4 at 8 and 2 bits on photographs of scikit-image, beside float and NNCF's int8."""
    load("demo").run_demo(out, progress(quiet), console())
