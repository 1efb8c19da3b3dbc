"""``condiquant compare`` from the recipe to the files it leaves."""

import json
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from condiquant_basicsr import read_image
from condiquant_openvino import read_metadata
from condiquant_plugin.errors import InputError
from condiquant_recipes import ir
from condiquant_recipes.comparison import comparing
from condiquant_recipes.comparison.comparing import compare
from condiquant_recipes.comparison.page import write_page
from condiquant_recipes.progress import Progress
from condiquant_recipes.recipe import load_recipe

QUICK = ("float", "nncf-int8-mixed", "condiquant-no-dqc-w4a4")
REFUSED = "nncf-weights-nf4-gptq"  # works on matrix products only, and the network has none


@pytest.fixture
def job(make_job, monkeypatch):
    # Else OpenVINO reports every conversion to its makers, which takes a second offline.
    monkeypatch.setenv("CI", "true")
    return make_job("compact")


def by_id(report):
    return {row["id"]: row for row in report["rows"]}


def test_command_leaves_figures_irs_crops_and_a_page(job, condiquant, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    chosen = ["nncf-int8-mixed", REFUSED, "nncf-minmax-w2a2", "condiquant-w4a4"]
    arguments = ("compare", job.write(), "--data", job.data, "--out", job.out, "-q")
    printed = condiquant(*arguments, "--methods", ",".join(chosen))
    report = json.loads((job.out / "compare.json").read_text())
    rows = by_id(report)
    assert list(rows) == ["float", *chosen]
    assert report["command"].startswith("condiquant compare ")
    assert report["calibration"] == {"name": "calibration", "count": 6, "crop": 16}
    assert report["image_shape"] == [1, 3, 32, 32]
    assert not list(job.out.rglob(".*"))

    refused = rows.pop(REFUSED)
    assert "gptq" in refused["reason"]
    assert refused["psnr"] == {}
    assert refused["latency_ratio"] is None
    lines = printed.splitlines()
    assert f"{REFUSED}: no result: {refused['reason']}" in lines
    table = lines[: next(i for i, line in enumerate(lines) if REFUSED in line)]
    assert max(map(len, table)) <= 100
    (shown,) = (line for line in table if line.strip().startswith("NNCF weights NF4,"))
    assert set(shown.split()[4:]) == {"–"}
    for row in rows.values():
        assert any(line.strip().startswith(row["label"]) for line in table)
        xml = job.out / "methods" / row["id"] / "model.xml"
        assert row["xml_bytes"] == xml.stat().st_size
        assert row["bin_bytes"] == xml.with_suffix(".bin").stat().st_size
        assert row["drop"]["Tiny"] == rows["float"]["psnr"]["Tiny"] - row["psnr"]["Tiny"]
        scores = ir.evaluate(xml, job.data, ["Tiny"], "CPU", Progress())
        assert row["psnr"]["Tiny"] == pytest.approx(scores["Tiny"]["psnr"])
        assert row["ssim"]["Tiny"] == pytest.approx(scores["Tiny"]["ssim"])
        assert row["latency_ratio"] > 0
        assert row["calibration_seconds"] >= 0
    assert rows["float"]["fidelity"] == {"Tiny": None}
    assert rows["float"]["compression"] == 1
    assert rows["float"]["int8_share"] == 0
    assert rows["nncf-int8-mixed"]["int8_share"] == 1
    fidelities = [rows[name]["fidelity"]["Tiny"] for name in ("nncf-int8-mixed", "condiquant-w4a4")]
    assert fidelities[0] > fidelities[1] > rows["nncf-minmax-w2a2"]["fidelity"]["Tiny"]

    assert [layer["bits"] for layer in report["layers"]] == [4, 4, 4]
    assert all(0 < layer["quantized_output_error_after"] < 1 for layer in report["layers"])
    assert report["crops"]
    for crop in report["crops"]:
        assert set(crop["files"]) == {*rows, "reference"}
        for file in crop["files"].values():
            assert read_image(job.out / file).shape == (3, crop["height"], crop["width"])
    assert (job.out / "compare.html").stat().st_size > 10_000


def test_an_interrupted_comparison_keeps_its_finished_methods(job, monkeypatch):
    recipe = load_recipe(job.write())
    original, calls = comparing.measured, []

    def interrupting(function):
        calls.append(function)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(function)

    monkeypatch.setattr(comparing, "measured", interrupting)
    with pytest.raises(KeyboardInterrupt):
        compare(recipe, job.data, job.out, methods=QUICK)
    assert not (job.out / "compare.json").exists()
    finished = {
        name: json.loads((job.out / "methods" / name / "row.json").read_text())
        for name in QUICK[:2]
    }
    assert not (job.out / "methods" / QUICK[2] / "row.json").exists()

    report = compare(recipe, job.data, job.out, methods=QUICK, resume=True)
    assert len(calls) == 4
    rows = by_id(report)
    assert all(row["reason"] is None for row in rows.values())
    for name, before in finished.items():
        for key in ("psnr", "ssim", "fidelity", "calibration_seconds", "bin_bytes"):
            assert rows[name][key] == before[key]

    compare(recipe, job.data, job.out, methods=QUICK[:2])
    assert len(calls) == 4
    with pytest.raises(
        InputError, match=r"another run \(other recipe, seed=0, not 1\): .*--overwrite"
    ):
        compare(load_recipe(job.write(), ["seed=1"]), job.data, job.out, methods=["float"])
    compare(recipe, job.data, job.out, methods=["float"], overwrite=True)
    assert len(calls) == 5
    assert not (job.out / "methods" / QUICK[2]).exists()
    for change, key in (("seed=1", "recipe"), ("export.compress_to_fp16=true", "export")):
        other = load_recipe(job.write(), [change])
        with pytest.raises(InputError, match=f"other {key}"):
            compare(other, job.data, job.out, methods=["float"], resume=True)
    monkeypatch.setattr(comparing.ov, "get_version", lambda: "2030.0")
    with pytest.raises(InputError, match="other versions"):
        compare(recipe, job.data, job.out, methods=["float"], resume=True)
    assert len(calls) == 5


def test_rows_of_nobody_knows_what_are_not_taken(job, tmp_path):
    recipe = load_recipe(job.write())
    planted = job.out / "methods/float/row.json"
    planted.parent.mkdir(parents=True)
    planted.write_text('{"id": "float", "reason": null}')
    (job.out / "crops").mkdir()
    report = compare(recipe, job.data, job.out, methods=["float"], resume=True)
    assert report["rows"][0]["psnr"]["Tiny"] > 0
    assert (job.out / "crops").is_dir()  # of the user

    elsewhere = job.out / "methods/float-simplified"
    elsewhere.symlink_to(tmp_path)
    with pytest.raises(InputError, match=f"cannot remove {elsewhere}: .*; give another --out"):
        compare(recipe, job.data, job.out, methods=["float"], overwrite=True)


def test_a_method_that_breaks_keeps_its_row_and_is_tried_again(job, monkeypatch):
    recipe = load_recipe(job.write(), ["export.static=null"])
    original, static = comparing.all_contenders, []

    def breaking(recipe):
        def fail(job):
            static.append(job.recipe.export.static)
            raise RuntimeError("first line\nsecond line")

        float_method, *others = original(recipe)
        return [float_method, *(replace(m, calibrate=fail) for m in others)]

    monkeypatch.setattr(comparing, "all_contenders", breaking)
    row = by_id(compare(recipe, job.data, job.out, methods=QUICK[:2]))["nncf-int8-mixed"]
    assert row["reason"] == "RuntimeError: first line second line"
    assert row["pareto_size"] is False
    assert static == [False]  # all or none: the float IR is dynamic
    monkeypatch.setattr(comparing, "all_contenders", original)
    resumed = by_id(compare(recipe, job.data, job.out, methods=QUICK[:2], resume=True))
    assert resumed["nncf-int8-mixed"]["reason"] is None


def test_a_static_network_is_calibrated_on_crops_of_its_size(job):
    job.recipe["export"] = {"static": True, "tile": 32}
    report = compare(load_recipe(job.write()), job.data, job.out, methods=QUICK[2:])
    assert [row["reason"] for row in report["rows"]] == [None] * 2
    assert report["calibration"] == {"name": "calibration", "count": 2, "crop": 32}


def test_the_float_output_as_reference(job):
    recipe = load_recipe(job.write(), ["datasets.reference=float"])
    report = compare(recipe, job.data, job.out, methods=QUICK[:2])
    rows = by_id(report)
    assert rows["float"]["psnr"] == rows["float"]["drop"] == {"Tiny": None}
    assert rows["float"]["ssim"]["Tiny"] == pytest.approx(1)
    assert rows["float"]["pareto_size"] or rows["float"]["pareto_latency"]
    int8 = rows["nncf-int8-mixed"]
    assert int8["psnr"] == int8["fidelity"]
    assert math.isfinite(int8["psnr"]["Tiny"])
    crop = report["crops"][0]
    assert crop["psnr"]["float"] is None
    images = [(job.out / crop["files"][name]).read_bytes() for name in ("float", "reference")]
    assert images[0] == images[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--methods", "nncf-int9"),
            "no method 'nncf-int9'; there are: float, float-simplified, nncf-",
        ),
        (("--methods", ","), "',' names nothing"),
        (("--set", "datasets.test=[]"), "there is no test set"),
        (("--sets", "Tiny,Nowhere"), "no test set 'Nowhere'"),
        (("--set", "export.device=NPU"), "export.device=NPU"),
        (("--set", "export.u8_nhwc=true"), "export.u8_nhwc"),
        (("--data", "nowhere"), "data folder nowhere does not exist"),
    ],
)
def test_what_cannot_be_compared(job, condiquant, options, message):
    arguments = ("compare", job.write(), "--data", job.data, "--out", job.out, "-q")
    assert message in condiquant(*arguments, *options, code=2)
    assert not job.out.exists()


def test_methods_can_be_listed(job, condiquant):
    printed = condiquant("compare", job.write(), "--methods", "help")
    for name in (*QUICK, REFUSED, "2dquant-w3a3", "condiquant-int8"):
        assert f" {name} " in printed


def test_rows_of_bits_by_measurement_are_as_large_as_uniform_ones_and_closer(make_job, monkeypatch):
    monkeypatch.setenv("CI", "true")
    job = make_job("edsr")
    weights = torch.load(job.folder / "net.pth")["params"]
    for name in ("body.1.conv1.weight", "body.1.conv2.weight"):  # a block that adds little
        weights[name] *= 0.1
    torch.save({"params": weights}, job.folder / "net.pth")
    recipe = load_recipe(job.write(), ["condiquant.distillation.iterations=0"])
    methods = ["condiquant-mixed-w4", "condiquant-w4a8"]
    report = compare(recipe, job.data, job.out, methods=methods)
    rows = by_id(report)
    mixed, uniform = (rows[name] for name in methods)
    assert mixed["reason"] is None
    record = report["precision"][mixed["label"]]
    bits = [record["bits"][name][0] for name in record["sensitivity"]["weights"]]
    assert len(set(bits)) > 1
    # Tables and scales of 2 to 8 bits differ by some bytes from one layer to the next.
    assert mixed["bin_bytes"] <= 1.01 * uniform["bin_bytes"]
    metadata = read_metadata(job.out / "methods" / methods[0] / "model.xml")
    others = {f"w{b}a8": n for b, n in Counter(bits).items() if b != metadata["weight_bits"]}
    assert metadata["other_bits"] == others
    page = write_page(report, job.out).read_text()
    assert f"<summary>{mixed['label']}</summary>" in page
    assert page.count('alt="Sensitivity of each layer') == 1
    assert mixed["fidelity"]["Tiny"] > uniform["fidelity"]["Tiny"]
