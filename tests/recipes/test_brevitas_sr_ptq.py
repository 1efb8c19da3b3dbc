"""The Brevitas example on a tiny network: its table, its JSON, its errors."""

import json

import pytest
import torch
from brevitas import nn as qnn

import brevitas_sr_ptq as script
import networks
from condiquant_brevitas import quantize_sr


def test_table_and_json(make_job, capsys):
    job = make_job("edsr")
    options = ["--recipe", job.write(), "--data", job.data, "--sets", "Tiny", "--crops", 2]
    options += ["--weight-bits", 4, "--activation-bits", 8, "--json", job.folder / "table.json"]
    options += ["--methods", "mse", "mse_gptq_bias", "condiquant"]
    script.main([str(option) for option in options])
    rows = json.loads((job.folder / "table.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["float", "mse", "mse_gptq_bias", "condiquant"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| bits | method | Tiny PSNR / SSIM | drop | seconds |"
    assert all(line.count("|") == lines[0].count("|") for line in lines)
    for row, line in zip(rows, lines[2:], strict=True):
        score = row["scores"]["Tiny"]
        assert f"| {score['psnr']:.2f} / {score['ssim']:.4f} |" in line
    assert all(line.startswith("| W4A8 |") for line in lines[3:])
    scores = [row["scores"]["Tiny"]["psnr"] for row in rows]
    assert len(set(scores)) == 4


@pytest.mark.parametrize(
    ("name", "scope", "operands"),
    [("swinir", "transformer", 4 * 2 * 2), ("edsr", "all", 0)],  # blocks, products, factors
)
def test_all_methods_quantize_the_same(name, scope, operands):
    network = networks.build(name).eval()
    crops = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    quantizers = script.UPSTREAM["mse"]["tensor"]
    theirs = script.quantize_upstream(network, crops, scope, (3, 4), quantizers, 1)
    ours = quantize_sr(
        network, crops, weight_bits=3, activation_bits=4, scope=scope, reconditioning=None
    )

    def widths(model):
        return {
            name: int(module.bit_width())
            for name, module in model.named_modules()
            if name.endswith("_quant") and getattr(module, "is_quant_enabled", False)
        }

    assert widths(theirs) == widths(ours)
    stubs = [m for m in theirs.modules() if isinstance(m, qnn.QuantIdentity)]
    assert len(stubs) == operands


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "nowhere"], "no data folder nowhere: give --data"),
        (["--weight-bits", "4", "3", "--activation-bits", "4"], "go in pairs"),
        (["--weight-bits", "9"], "bits=9 is not supported"),
        (["--batch-size", "0"], "--batch-size=0 is too small"),
        (["--sets", "Set9"], "Set9"),
        (["--recipe", "none.yml"], "recipe none.yml does not exist"),
        (["--json", "net.pth/table.json"], "cannot write to net.pth"),
    ],
)
def test_errors_are_one_line(make_job, capsys, options, message):
    job = make_job("swinir")
    defaults = ["--recipe", str(job.write()), "--data", str(job.data), "--sets", "Tiny"]
    with pytest.raises(SystemExit) as exit_info:
        script.main([*defaults, *options])
    captured = capsys.readouterr()
    assert (exit_info.value.code, captured.out) == (2, "")
    (line,) = captured.err.splitlines()
    assert line.startswith("brevitas_sr_ptq: error: ")
    assert message in line
