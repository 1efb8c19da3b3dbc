"""``condiquant benchmark`` and ``inspect --layers`` through the command line."""

import json
import shutil
from pathlib import Path

import openvino as ov
import pytest
import torch

from condiquant_basicsr import write_image
from condiquant_openvino import convert, save, set_metadata
from condiquant_recipes.benchmarking import distinct_names, parse_shape
from networks import build

QUICK = ("-niter", 2, "-t", 0.01)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two runs' IRs, one of another tool, and a photograph."""
    folder, x = tmp_path_factory.mktemp("irs"), torch.rand(1, 3, 24, 24)
    with pytest.MonkeyPatch.context() as patch:
        # Else OpenVINO reports every conversion to its makers, which takes a second offline.
        patch.setenv("CI", "true")
        for name, run, multiple in (("compact", "plain", 1), ("swinir", "windows", 8)):
            ir = convert(build(name), x)
            set_metadata(ir, {"scale": 2, "pad_multiple": multiple})
            save(ir, folder / run / "model.xml")
        foreign = ov.convert_model(build("compact"), example_input=x)
    ov.save_model(foreign, folder / "foreign.xml")
    write_image(folder / "image.png", torch.rand(3, 24, 24))
    return folder


def test_table_has_a_row_for_each_ir(condiquant, folder, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    printed = condiquant(
        "benchmark", folder / "plain", folder / "windows" / "model.xml", folder / "foreign.xml",
        "-shape", "[1,3,16,24]", *QUICK,
    )  # fmt: skip
    assert "input 1x3x16x24" in printed
    rows = [line.split() for line in printed.splitlines()]
    for name in ("plain/model", "windows/model", f"{folder.name}/foreign"):
        (row,) = (row for row in rows if row[:1] == [name])
        bin_kib, xml_kib, median, p10, p90, ratio, fps, throughput_ratio = map(float, row[1:9])
        assert min(bin_kib, xml_kib, median, fps, ratio, throughput_ratio) > 0
        assert p10 <= median <= p90
        assert row[9] == "0%"


def test_json_on_stdout_and_in_a_file(condiquant, folder, tmp_path):
    arguments = ("benchmark", folder / "plain", "--shape", "1,3,16,16", "--niter", 3, "--t", 0.01)
    report = json.loads(condiquant(*arguments, "--json", "--out", tmp_path / "report.json"))
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert report["device"] == "CPU"
    figures = report["models"]["model"]
    assert Path(figures["file"]) == folder / "plain" / "model.xml"
    assert figures["bin_bytes"] == (folder / "plain" / "model.bin").stat().st_size
    assert figures["xml_bytes"] == (folder / "plain" / "model.xml").stat().st_size
    assert figures["shape"] == [1, 3, 16, 16]
    assert figures["layers"][0] | {"name": ""} == {
        "name": "", "operator": "Convolution", "runs_as": "f32", "reason": "not quantized",
        "operands": "float, float",
    }  # fmt: skip


def test_layers_of_each_ir(condiquant, folder, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    arguments = ("benchmark", folder / "plain", "-hint", "latency", *QUICK)
    assert "why not int8" not in condiquant(*arguments)
    printed = condiquant(*arguments, "--layers")
    assert printed.count("not quantized") == 5


def test_inspect_counts_what_runs_and_lists_it_on_request(condiquant, folder):
    xml = folder / "plain" / "model.xml"
    described = json.loads(condiquant("inspect", xml, "--json"))
    assert described["executes"] == {"f32": 5}
    assert "layer_executions" not in described
    described = json.loads(condiquant("inspect", xml, "--json", "--layers"))
    assert [layer["runs_as"] for layer in described["layer_executions"]] == ["f32"] * 5
    printed = condiquant("inspect", xml, "--layers")
    assert "executes.f32" in printed
    assert printed.count("not quantized") == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-niter", 0), "0 iterations"),
        (("-t", 0), "0.0 s"),
        (("-t", "inf"), "inf s"),
        (("-hint", "fast"), "'fast' is not known: use one of latency, throughput, none"),
        (("-d", "ABACUS"), "device 'ABACUS' is not available"),
        (("-shape", "[1,3,20,20]"), "multiples of 8, such as 24x24"),
        (("-data_shape", "[1,3,20,20]"), "multiples of 8, such as 24x24"),
        (("-shape", "[1,1,24,24]"), "[1,1,24,24]"),
        (("-shape", "64x64"), "'64x64' is none"),
        (("-shape", "[1,3,24,24"), "'[1,3,24,24' is none"),
        (("-shape", "1,3,24,24]"), "'1,3,24,24]' is none"),
        (("-shape", "nosuchinput[1,3,24,24]"), "has no input 'nosuchinput': use image"),
        (("-data_shape", "nosuchinput[1,3,24,24]"), "has no input 'nosuchinput'"),
        (("-infer_precision", "u4"), "'u4' is not known"),
        (("-niter", "many"), "niter"),
        (("--out", "nowhere/report.json"), "cannot write nowhere/report.json"),
        (("--out", "/"), "cannot write /"),
        (("--out", "/proc/report.json", "-t", 1e9), "cannot write to /proc"),
    ],
)
def test_settings_that_cannot_be(condiquant, folder, options, message):
    assert message in condiquant("benchmark", folder / "windows", *options, code=2)


def _truncate(xml):
    content = xml.with_suffix(".bin").read_bytes()
    xml.with_suffix(".bin").write_bytes(content[: len(content) // 2])


def _change(xml):
    content = bytearray(xml.with_suffix(".bin").read_bytes())
    content[100] ^= 255
    xml.with_suffix(".bin").write_bytes(content)


def _swap(xml):
    shutil.copy(xml.parent.parent / "windows" / "model.bin", xml.with_suffix(".bin"))


@pytest.mark.parametrize(
    "spoil", [_truncate, _change, _swap, lambda xml: xml.write_text("no graph")]
)
@pytest.mark.parametrize("command", ["benchmark", "inspect", "evaluate", "upscale"])
def test_broken_ir(condiquant, folder, tmp_path, spoil, command):
    shutil.copytree(folder, tmp_path / "irs")
    xml = tmp_path / "irs" / "plain" / "model.xml"
    spoil(xml)
    more = {
        "evaluate": ("--data", folder),
        "upscale": (folder / "image.png", tmp_path / "big.png"),
    }.get(command, ())
    assert "export it again" in condiquant(command, xml, *more, code=2)


def test_commands_that_need_an_ir_of_ours(condiquant, folder, tmp_path):
    foreign = folder / "foreign.xml"
    for arguments in (
        ("evaluate", foreign, "--data", folder, "-q"),
        ("upscale", foreign, folder / "image.png", tmp_path / "big.png", "-q"),
    ):
        assert "was not exported by condiquant" in condiquant(*arguments, code=2)
    assert not (tmp_path / "big.png").exists()


def test_folder_without_an_ir(condiquant, tmp_path):
    assert "model.xml does not exist" in condiquant("benchmark", tmp_path, code=2)


def test_names_tell_files_apart(tmp_path):
    def names(*files):
        return distinct_names([tmp_path / file for file in files])

    assert names("a.xml", "b.xml") == ["a", "b"]
    assert names("x/model.xml", "y/model.xml", "z.xml")[:2] == ["x/model", "y/model"]
    assert names("a.xml", "a.xml", "b.xml") == ["a", "a (2)", "b"]
    assert names("x/1/m.xml", "y/1/m.xml", "x/1/m.xml") == ["x/1/m", "y/1/m", "x/1/m (2)"]


@pytest.mark.parametrize("text", ["1,3,64,48", "[1,3,64,48]", "image[1,3,64,48]", "[1, 3, 64, 48]"])
def test_shapes_as_benchmark_app_takes_them(text):
    assert parse_shape(text) == ("image" if "image" in text else "", [1, 3, 64, 48])


def test_a_shape_with_the_name_of_the_input(condiquant, folder):
    arguments = ("benchmark", folder / "plain", "-shape", "image[1,3,16,16]", *QUICK, "--json")
    assert json.loads(condiquant(*arguments))["models"]["model"]["shape"] == [1, 3, 16, 16]


def test_inspect_takes_a_run_and_no_half_of_an_ir(condiquant, folder):
    described = condiquant("inspect", folder / "plain", "--json")
    assert described == condiquant("inspect", folder / "plain" / "model.xml", "--json")
    message = condiquant("inspect", folder / "plain" / "model.bin", code=2)
    assert "model.bin is half of an IR: give model.xml" in message
    assert "model.xml does not exist" in condiquant("inspect", folder, code=2)
