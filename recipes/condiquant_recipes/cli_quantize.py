"""The command ``condiquant quantize``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from condiquant_plugin.errors import InputError
from condiquant_recipes.cli_options import (
    OverwriteOption,
    QuietOption,
    SetOption,
    console,
    progress,
)
from condiquant_recipes.hosts import load
from condiquant_recipes.presets import PRESETS, Preset

BitsOption = Annotated[int | None, typer.Option(min=2, max=8, help="Instead of the preset's.")]


class ScopeChoice(StrEnum):
    """What is quantized."""

    auto = "auto"
    transformer = "transformer"
    all = "all"


def quantize(
    model: Annotated[Path, typer.Argument(help="A checkpoint of a super-resolution network.")],
    images: Annotated[Path, typer.Option(help="Folder of photographs to calibrate on.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Output folder (default: out/<model>_<bits>)."),
    ] = None,
    preset: Annotated[
        Preset, typer.Option(help="int8 (8, untrained), small (weights 4, inputs 8), 4bit.")
    ] = Preset.int8,
    bits: BitsOption = None,
    weight_bits: BitsOption = None,
    activation_bits: BitsOption = None,
    target: Annotated[
        str | None,
        typer.Option(metavar="AIM=VALUE", help="Find bits for fidelity, drop, size or latency."),
    ] = None,
    iterations: Annotated[
        int | None, typer.Option(min=0, help="Of training against the float network.")
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(min=0, help="Train for as long as the whole is expected to end within them."),
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.py:Class",
            help="A network that is not recognised. Runs the code in the file. Arguments of the class: "
            "--set network_g.NAME=VALUE.",
        ),
    ] = None,
    scope: Annotated[ScopeChoice, typer.Option(help="Which layers.")] = ScopeChoice.auto,
    also_float: Annotated[
        bool, typer.Option("--float", help="Write the network before quantization, too: float.xml.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Keep finished stages.")] = False,
    overwrite: OverwriteOption = False,
    overrides: SetOption = None,
    quiet: QuietOption = False,
) -> None:
    """From a checkpoint and photographs to an OpenVINO IR of few bits."""
    if bits is not None and (weight_bits is not None or activation_bits is not None):
        raise InputError("--bits is for weights and inputs: leave out the other two, or --bits")
    if minutes is not None and iterations is not None:
        raise InputError("--minutes sets the iterations: leave out --iterations, or --minutes")
    if minutes is not None and target is not None:
        raise InputError("--minutes knows nothing of the search for a target: give --iterations")
    shown = progress(quiet)
    if network is not None:
        shown.note(f"running the code of {Path(network.rpartition(':')[0]).resolve()}")
    given = {
        "condiquant.weight_bits": weight_bits or bits,
        "condiquant.activation_bits": activation_bits or bits,
        "condiquant.distillation.iterations": iterations,
    }
    chosen = [f"{key}={value}" for key, value in given.items() if value is not None]
    found = load("checkpoint").recipe_for(
        model,
        images,
        None if scope is ScopeChoice.auto else scope.value,
        [*PRESETS[preset], *chosen, *(overrides or [])],
        network,
    )
    aim = None if target is None else load("precision.target").Target.parse(target)
    label = found.label if aim is None else aim.label
    out = out or Path("out") / f"{found.name}_{label}"
    if minutes is not None:
        found = load("expected_time").within(found, minutes, None if overwrite else out, shown)
    metrics = load("run").run(
        found,
        Path(),
        out,
        target=aim,
        resume=resume,
        overwrite=overwrite,
        progress=shown,
    )
    if also_float:
        load("float_export").export_float_of(found, out, shown)
    ir = metrics["ir"]
    share = ir["bin_bytes"] / ir["float_bin_bytes"]
    for note in [*metrics["warnings"], *ir["notes"]]:
        print(f"note: {note}")
    console().print(
        f"{out / 'model.xml'}: {1 / ir['latency_ratio']:.1f} times as fast as the float network, "
        f"{metrics['fidelity']:.1f} dB to its output on held-out crops, "
        f"{ir['bin_bytes'] / 1024:.0f} KiB of weights ({share:.2f} of float)",
        soft_wrap=True,
        highlight=False,
    )
