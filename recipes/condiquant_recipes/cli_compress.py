"""The commands ``condiquant compress`` and ``condiquant compare-weights``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from condiquant_recipes.cli_options import (
    OverwriteOption,
    QuietOption,
    console,
    progress,
    split,
)
from condiquant_recipes.hosts import load

InputsOption = Annotated[
    str,
    typer.Option(
        help="What layers are solved on: compressed (what the blocks before give by then) or "
        "original (the float model's values)."
    ),
]


def compress(
    model: Annotated[
        Path, typer.Argument(help="Hugging Face folder of a language model, or a GGUF file.")
    ],
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
    inputs: InputsOption = "compressed",
    windows: Annotated[int, typer.Option(help="Of the text, to calibrate on.")] = 16,
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
    score: Annotated[
        Path | None, typer.Option(help="Text file for the perplexity before and after.")
    ] = None,
    ir: Annotated[bool, typer.Option("--ir/--no-ir", help="Write OpenVINO IR too.")] = True,
    signs: Annotated[
        str,
        typer.Option(
            help="arb_rc, rounding: type of signs in the IR, u2 or u1 (half of their file; with VNNI "
            "twice the time of a token)."
        ),
    ] = "u2",
    overwrite: OverwriteOption = False,
    quiet: QuietOption = False,
) -> None:
    """A language model with weights of one or two bits, or of low rank.

    In two processes: torchrun --nproc_per_node=2 -m condiquant_recipes compress MODEL --text FILE --out OUT
    """
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
        inputs=inputs,
    )
    with application.of_torchrun():
        result = application.compress(
            model,
            text,
            out,
            config,
            count=windows,
            length=length,
            score=score,
            ir=ir,
            signs=signs,
            overwrite=overwrite,
            progress=progress(quiet or not application.is_first()),
        )
        if not application.is_first():
            return
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


def compare_weights(
    model: Annotated[
        Path, typer.Argument(help="Hugging Face folder of a language model, or a GGUF file.")
    ],
    calibration: Annotated[Path, typer.Option(help="Text file to calibrate on.")],
    text: Annotated[Path, typer.Option(help="Text file to score on, another one.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Output folder; a rerun goes on.")],
    methods: Annotated[
        str, typer.Option(help="Ids, comma-separated (default: all); help lists them.")
    ] = "",
    group_size: Annotated[int, typer.Option(help="Weights of a row that share scales.")] = 64,
    inputs: InputsOption = "compressed",
    windows: Annotated[int, typer.Option(help="Of the calibration text.")] = 16,
    scored: Annotated[int, typer.Option(help="Windows of the text to score on.")] = 12,
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
    overwrite: OverwriteOption = False,
    quiet: QuietOption = False,
) -> None:
    """Perplexity, real bits, memory and speed of a language model by every method, side by side."""
    page = load("weight_comparison.page")
    if methods == "help":
        known = load("weight_comparison.contenders").all_contenders(group_size)
        console().print(load("comparison.table").method_table(known))
        return
    job = load("weight_comparison.job").WeightJob(
        str(model.resolve()),
        str(calibration.resolve()),
        str(text.resolve()),
        windows,
        scored,
        length,
        group_size,
        inputs,
    )
    report = load("weight_comparison.comparing").compare_weights(
        job,
        out,
        methods=split(methods),
        overwrite=overwrite,
        command=shlex.join(["condiquant", *sys.argv[1:]]),
        progress=progress(quiet),
    )
    written = page.write_page(report, out)
    console().print(page.table(report))
    for remark in page.remarks(report):
        print(remark)
    print(f"figures: {out / 'compare.json'}\npage:    {written}")
