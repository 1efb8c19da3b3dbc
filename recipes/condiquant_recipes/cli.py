"""The command line ``condiquant``: exit code 0, 1 (a run failed) or 2 (bad usage or input)."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

try:
    import typer
except ImportError:
    sys.exit('the command line needs its extra: pip install "condiquant-plugin[all]"')

from condiquant_plugin.errors import DistributedError, InputError, MissingExtraError
from condiquant_plugin.files import check_writable
from condiquant_recipes import (
    cli_compress,
    cli_quantize,
    cli_recipe,
    cli_training,
    cli_upscale,
    hosts,
    inspection,
)
from condiquant_recipes.cli_options import (
    DataOption,
    DeviceOption,
    JsonOption,
    LayersOption,
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
from condiquant_recipes.hosts import load as _hosts
from condiquant_recipes.presets import PRESETS, Preset

app = typer.Typer(
    name="condiquant",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
_SIGINT = 130
"""What newer versions of Typer make of a KeyboardInterrupt."""


@app.command()
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
        points = _hosts("front").run_front(loaded, folder, out, front, **arguments)
        console().print(_hosts("reporting").front_table(points))
        print(f"figures: {out / 'front.json'}\nplot:    {out / 'front.svg'}")
        return
    aim = None if target is None else _hosts("precision.target").Target.parse(target)
    name = f"{loaded.name}_{loaded.label if aim is None else aim.label}"
    out = out or Path("out") / name
    metrics = _hosts("run").run(loaded, folder, out, target=aim, **arguments)
    for part in _hosts("reporting").run_report(metrics):
        console().print(part)
    for note in [*metrics["warnings"], *metrics["ir"]["notes"]]:
        print(f"note: {note}")
    print(f"metrics: {out / 'metrics.json'}\nIR:      {out / 'model.xml'}")


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="model.xml, or the output folder of a run.")],
    data: DataOption = None,
    sets: SetsOption = "Set5",
    device: DeviceOption = "CPU",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """PSNR and SSIM (Y channel, crop = scale) of an IR on test sets."""
    scores = _hosts("ir").evaluate(
        ir_path(model), data_folder(data), split(sets), device, progress(quiet)
    )
    if as_json:
        print(json.dumps(scores, indent=1))
    else:
        console().print(_hosts("reporting").score_table({str(model): scores}))


@app.command()
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
    figures = _hosts("ir").export_again(
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


app.callback()(cli_recipe.about)
app.command()(cli_recipe.recipe)
app.command()(cli_quantize.quantize)
app.command()(cli_upscale.upscale)
app.command()(cli_compress.compress)
app.command()(cli_compress.compare_weights)
app.command()(cli_training.train)
app.command("test")(cli_training.evaluate)


@app.command()
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


@app.command()
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
    benchmarking = _hosts("benchmarking")
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


@app.command()
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
    comparison_table = _hosts("comparison.table")
    if methods == "help":
        known = _hosts("comparison.contenders").all_contenders(loaded)
        console().print(comparison_table.method_table(known))
        return
    folder = recipe_data(loaded, data)
    out = out or Path("out") / f"{loaded.name}_compare"
    report = _hosts("comparison.comparing").compare(
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
    page = _hosts("comparison.page").write_page(report, out)
    console().print(comparison_table.table(report))
    print(*comparison_table.remarks(report), sep="\n")
    print(f"figures: {out / 'compare.json'}\npage:    {page}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("out/demo"),
    quiet: QuietOption = False,
) -> None:
    """DAT-light x4 at 8 and 2 bits on photographs of scikit-image, beside float and NNCF's int8."""
    _hosts("demo").run_demo(out, progress(quiet), console())


def main() -> None:
    """Entry point."""
    try:
        with hosts.naming_extras():
            code = app(standalone_mode=False)
        code = _interrupted() if code == _SIGINT else code
    except (InputError, MissingExtraError) as error:
        code = _fail(str(error), 2)
    except DistributedError as error:
        code = _fail(str(error), 1)
    except typer.Exit as error:
        code = error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        code = _interrupted()
    except Exception as error:
        usage = getattr(error, "format_message", None)
        if len(sys.argv) == 1:
            code = 2  # the help has been shown
        elif usage is not None:
            code = _fail(str(usage()), 2)
        elif os.environ.get("CONDIQUANT_TRACEBACK"):
            raise
        else:
            message = " ".join(f"{type(error).__name__}: {error}".split())
            code = _fail(f"{message} (CONDIQUANT_TRACEBACK=1 shows where)", 1)
    sys.exit(code or 0)


def _interrupted() -> int:
    remedies = dict.fromkeys(("run", "quantize", "compare"), ": add --resume to go on")
    remedies["compare-weights"] = ": run it again to go on"
    remedies |= {"train": ": add --auto_resume to go on", "upscale": ": run it again to go on"}
    return _fail("interrupted" + remedies.get("".join(sys.argv[1:2]), ""), 1)


def _fail(message: str, code: int) -> int:
    print(f"condiquant: error: {' '.join(message.split())}", file=sys.stderr)
    return code
