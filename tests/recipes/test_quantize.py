"""``condiquant quantize``: a checkpoint and a folder of photographs."""

import sys

import pytest
import torch

from command_line import fails
from condiquant_openvino import read_ir, read_metadata
from condiquant_recipes import cli
from condiquant_recipes.checkpoint import recipe_for


def quantize(capsys, monkeypatch, *arguments) -> str:
    monkeypatch.setattr(sys, "argv", ["condiquant", "quantize", *map(str, arguments), "-q"])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    captured = capsys.readouterr()
    assert not exit_info.value.code, captured.err
    return captured.out.splitlines()[-1]


@pytest.mark.parametrize(
    ("more", "bits"), [([], (8, 8)), (["--preset", "small", "--iterations", "2"], (4, 8))]
)
def test_a_checkpoint_becomes_an_ir(make_job, capsys, monkeypatch, more, bits):
    job = make_job("compact")
    keys = ["datasets.calibration.count=4", "datasets.calibration.held_out=2"]
    sets = [part for key in keys for part in ("--set", key)]
    last = quantize(
        capsys, monkeypatch, job.folder / "net.pth", "--images", job.data / "calibration",
        "--set", "export.tile=32", *sets, *more,
    )  # fmt: skip
    label = f"w{bits[0]}a{bits[1]}"
    path = job.folder / "out" / f"net_{label}" / "model.xml"
    assert last.startswith(f"out/net_{label}/model.xml: ")
    assert "times as fast as the float network" in last
    assert "dB to its output on held-out crops" in last
    metadata = read_metadata(read_ir(path))
    assert (metadata["weight_bits"], metadata["activation_bits"]) == bits
    assert metadata["scope"] == "all"
    assert metadata["scale"] == 2


def test_a_network_with_attention_is_found_to_have_it(make_job):
    job = make_job("swinir")
    recipe = recipe_for(job.folder / "net.pth", job.data / "calibration")
    assert recipe.condiquant.scope == "transformer"
    assert recipe.scale == 2
    assert recipe.datasets.calibration.crop % 8 == 0
    chosen = recipe_for(job.folder / "net.pth", job.data, "all", ["condiquant.weight_bits=3"])
    assert chosen.condiquant.scope == "all"
    assert chosen.bits.weight == 3


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["{folder}/none.pth", "--images", "{images}"], "no such file"),
        (["{folder}/net.pth", "--images", "{folder}/none"], "none is no folder"),
        (["{folder}/net.pth", "--images", "{folder}/empty"], "no calibration images in"),
        (["{folder}/recipe.yml", "--images", "{images}"], "give it to `condiquant run`"),
        (["{folder}/net.pth", "--images", "{images}", "--bits", "9"], "--bits"),
        (
            ["{folder}/net.pth", "--images", "{images}", "--bits", "4", "--weight-bits", "3"],
            "leave out",
        ),
        (["{folder}/other.pth", "--images", "{images}"], "other.pth"),
    ],
)
def test_what_cannot_be_quantized(make_job, capsys, monkeypatch, arguments, named):
    job = make_job("compact")
    (job.folder / "empty").mkdir()
    job.write()
    torch.save({"params": {"weight": torch.zeros(3)}}, job.folder / "other.pth")
    places = {"folder": job.folder, "images": job.data / "calibration"}
    given = [argument.format(**places) for argument in arguments]
    assert named in fails(capsys, monkeypatch, "quantize", *given, "-q")
    assert not (job.folder / "out").exists()
