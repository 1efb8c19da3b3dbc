"""The command ``condiquant compress``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from condiquant_recipes.cli_options import OverwriteOption, QuietOption, progress
from condiquant_recipes.hosts import load


def compress(
    model: Annotated[Path, typer.Argument(help="A Hugging Face folder of a language model.")],
    text: Annotated[Path, typer.Option(help="Text file to calibrate on.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Output folder.")],
    method: Annotated[
        str,
        typer.Option(help="arb_rc, pbs2p, adasvd, arb, arb_x, billm, rounding, gptq, magnitude."),
    ] = "arb_rc",
    ratio: Annotated[
        float | None, typer.Option(help="adasvd: of the parameters, retained (default 0.8).")
    ] = None,
    group_size: Annotated[
        int, typer.Option(help="Weights of a row that share scales; -1: all of it.")
    ] = 64,
    bits: Annotated[int | None, typer.Option(help="gptq: of a weight (default 4).")] = None,
    pattern: Annotated[
        str, typer.Option(help="pbs2p, magnitude: N of every M weights kept.")
    ] = "4:8",
    bitmaps: Annotated[
        bool, typer.Option("--bitmaps", help="As in the papers; no kernel keeps them packed.")
    ] = False,
    residual_rank: Annotated[int, typer.Option(help="Of a low-rank matrix for what is left.")] = 0,
    rounds: Annotated[
        int | None, typer.Option(help="Of refinement (default: the method's).")
    ] = None,
    windows: Annotated[int, typer.Option(help="Of the text, to calibrate on.")] = 16,
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
    score: Annotated[
        Path | None, typer.Option(help="Text file for the perplexity before and after.")
    ] = None,
    ir: Annotated[bool, typer.Option("--ir/--no-ir", help="Write OpenVINO IR too.")] = True,
    overwrite: OverwriteOption = False,
    quiet: QuietOption = False,
) -> None:
    """A language model with weights of one or two bits, or of low rank."""
    application = load("weight_compression")
    config = application.configuration(
        method,
        pattern,
        ratio=ratio,
        group_size=group_size,
        bitmaps=bitmaps,
        residual_rank=residual_rank,
        rounds=rounds,
        bits=bits,
    )
    result = application.compress(
        model,
        text,
        out,
        config,
        count=windows,
        length=length,
        score=score,
        ir=ir,
        overwrite=overwrite,
        progress=progress(quiet),
    )
    for note in application.notes(result):
        print(f"note: {note}")
    said = f"{out}: {result['bits_per_weight']:.2f} bits a weight"
    if score is not None:
        said += f", perplexity {result['float_perplexity']:.2f} to {result['perplexity']:.2f}"
    print(said)
    if ir:
        written = result["ir"]
        print(
            f"{out / application.IR}: {written['bin_bytes'] / 2**20:.1f} MiB, logits within "
            f"{written['logits_error']:.1e} of torch's"
        )
