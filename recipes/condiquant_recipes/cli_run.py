"""The commands ``condiquant run``, ``evaluate`` and ``export``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from condiquant_plugin.errors import InputError
from condiquant_plugin.files import check_writable
from condiquant_recipes import inspection
from condiquant_recipes.cli_options import (
    DataOption,
    DeviceOption,
    JsonOption,
    OverwriteOption,
    QuietOption,
    RecipeArgument,
    SetOption,
    SetsOption,
    console,
    data_folder,
    ir_path,
    progress,
    recipe_data,
    split,
)
from condiquant_recipes.hosts import load
from condiquant_recipes.presets import PRESETS, Preset


def run(
    recipe: RecipeArgument,
    data: DataOption = None,
    sets: SetsOption = "",
    out: Annotated[
        Path | None, typer.Option(help="Output folder (default: out/<name>_w4a4).")
    ] = None,
    preset: Annotated[
        Preset | None,
        typer.Option(help="Bits: int8 (8, untrained), small (weights 4, inputs 8), 4bit."),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="AIM=VALUE",
            help="Find the bits of every layer for fidelity=45 or drop=0.1 (dB), size=0.2 or "
            "latency=0.8 (of the float IR).",
        ),
    ] = None,
    front: Annotated[
        int | None,
        typer.Option(help="That many runs of different sizes, each with the best bits for it."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep finished stages of this folder.")
    ] = False,
    overwrite: OverwriteOption = False,
    overrides: SetOption = None,
    quiet: QuietOption = False,
) -> None:
    """Recondition, quantize, distil, evaluate and export the network of a recipe."""
    from condiquant_recipes.recipe_files import find_recipe

    loaded = find_recipe(recipe, [*PRESETS.get(preset, ()), *(overrides or [])])
    folder = recipe_data(loaded, data)
    arguments = {
        "sets": split(sets),
        "resume": resume,
        "overwrite": overwrite,
        "progress": progress(quiet),
    }
    if front is not None:
        if target is not None:
            raise InputError("--front goes through all sizes: leave out --target")
        out = out or Path("out") / f"{loaded.name}_front"
        points = load("front").run_front(loaded, folder, out, front, **arguments)
        console().print(load("reporting").front_table(points))
        print(f"figures: {out / 'front.json'}\nplot:    {out / 'front.svg'}")
        return
    aim = None if target is None else load("precision.target").Target.parse(target)
    name = f"{loaded.name}_{loaded.label if aim is None else aim.label}"
    out = out or Path("out") / name
    metrics = load("run").run(loaded, folder, out, target=aim, **arguments)
    for part in load("reporting").run_report(metrics):
        console().print(part)
    for note in [*metrics["warnings"], *metrics["ir"]["notes"]]:
        print(f"note: {note}")
    print(f"metrics: {out / 'metrics.json'}\nIR:      {out / 'model.xml'}")


def evaluate(
    model: Annotated[Path, typer.Argument(help="model.xml, or the output folder of a run.")],
    data: DataOption = None,
    sets: SetsOption = "Set5",
    device: DeviceOption = "CPU",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """PSNR and SSIM (Y channel, crop = scale) of an IR on test sets."""
    scores = load("ir").evaluate(
        ir_path(model), data_folder(data), split(sets), device, progress(quiet)
    )
    if as_json:
        print(json.dumps(scores, indent=1))
    else:
        console().print(load("reporting").score_table({str(model): scores}))


def export(
    folder: Annotated[
        Path, typer.Argument(help="Output folder of a run, or an experiment of `condiquant train`.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder for model.xml (default: the run's).")
    ] = None,
    iteration: Annotated[
        int | None, typer.Option(help="Of an experiment: this checkpoint (default: the newest).")
    ] = None,
    ema: Annotated[
        bool | None,
        typer.Option(
            "--ema/--no-ema", help="Of an experiment: the moving average (default: if any)."
        ),
    ] = None,
    static: Annotated[
        bool | None, typer.Option("--static/--dynamic", help="Fix height and width.")
    ] = None,
    tile: Annotated[int | None, typer.Option(help="Height and width to trace with.")] = None,
    fp16: Annotated[
        bool | None, typer.Option("--fp16/--fp32", help="Store float leftovers in half precision.")
    ] = None,
    u8_nhwc: Annotated[
        bool | None,
        typer.Option("--u8-nhwc/--f32-nchw", help="Take and give 8-bit images (1, H, W, 3)."),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="CPU, or NPU: zero on every grid, static; untested on the device."),
    ] = None,
    isa: Annotated[
        str | None, typer.Option(help="Fast with vnni or avx2, right on both; auto: as this CPU.")
    ] = None,
    also_float: Annotated[
        bool, typer.Option("--float", help="Write the network before quantization, too: float.xml.")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Export a trained experiment, or a finished run once more with other shapes or for a device."""
    given: dict[str, object] = {"static": static, "tile": tile, "compress_to_fp16": fp16}
    given |= {"u8_nhwc": u8_nhwc, "device": device, "isa": isa}
    changes = {key: value for key, value in given.items() if value is not None}
    target = out or folder
    check_writable(target)
    figures = load("ir").export_again(
        folder, target, changes, progress(quiet), iteration, ema, also_float=also_float
    )
    file = str(target / "model.xml")
    if as_json:
        print(json.dumps({"file": file, **figures}, indent=1))
        return
    notes = figures.pop("notes")
    del figures["layer_executions"]  # `condiquant inspect --layers` shows them
    console().print(inspection.property_table(figures))
    for note in notes:
        print(f"note: {note}")
    print(f"IR: {file}")
