import json
import sys

import pytest
import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn

from condiquant_basicsr import read_image, write_image
from condiquant_openvino import Upscaler, read_ir, read_metadata
from condiquant_openvino.running.instruction_sets import sums_saturate
from condiquant_plugin import fake_quantizers
from condiquant_recipes import cli
from condiquant_recipes.float_export import export_float
from condiquant_recipes.progress import Progress
from condiquant_recipes.recipe import load_recipe, with_export
from condiquant_recipes.run import rebuild
from condiquant_recipes.source import load_network
from condiquant_recipes.workspace import load_parameters


class TracedAtOneSize(nn.Module):
    """Writes a size into its trace: a shape, which fails at others, or a factor, which is wrong there."""

    def __init__(self, upscale, constant):
        super().__init__()
        self.upscale, self.constant = upscale, constant
        self.first, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 3 * upscale**2, 3, padding=1)

    def forward(self, x):
        height, width = int(x.shape[2]), int(x.shape[3])
        features = self.body(self.first(x))
        if self.constant == "shape":
            features = features.reshape(-1, 8, height * width).reshape(-1, 8, height, width)
        else:
            features = features * (height / 32)
        return nn.functional.pixel_shuffle(self.last(features), self.upscale)


@pytest.fixture
def condiquant(capsys, monkeypatch):
    """``condiquant(...)``: exit code and what was printed."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["condiquant", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        printed = capsys.readouterr()
        return exit_info.value.code, printed.out, printed.err

    return call


def same(first, second, image, atol):
    found, expected = (Upscaler(folder / "model.xml")(image) for folder in (first, second))
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def test_every_export_says_what_it_is(finished_job):
    job = finished_job(tile=24)
    recipe = load_recipe(job.out / "recipe.yml")
    metadata = read_metadata(job.out / "model.xml")
    parity = metadata.pop("parity")
    assert metadata.pop("recipe_sha256") == recipe.digest()
    assert with_export(recipe, {"compress_to_fp16": True}).digest() == recipe.digest()
    assert with_export(recipe, {"device": "NPU", "static": None}).digest() != recipe.digest()
    assert metadata.pop("plugin_version")
    assert metadata == {
        "network": "tiny", "scale": 2, "weight_bits": 4, "activation_bits": 4, "other_bits": {},
        "scope": "all", "compress_to_fp16": False, "pad_multiple": 1, "static": False,
        "preprocessing": "f32_nchw", "device": "CPU", "tested_on_device": True,
        "calibration": ["calibration"], "overflow": "safe",
        "isa": "avx2" if sums_saturate() else "vnni",
    }  # fmt: skip
    assert parity["parity_layer_max"] <= 1e-5


def test_metadata_names_no_folder_of_the_machine(finished_job, condiquant):
    job = finished_job(tile=24)
    text = (job.out / "recipe.yml").read_text()
    folder = job.data / "calibration"
    (job.out / "recipe.yml").write_text(text.replace("- calibration", f"- {folder}"))
    assert condiquant("export", job.out, "-q")[0] == 0
    assert read_metadata(job.out / "model.xml")["calibration"] == ["calibration"]
    assert str(job.folder) not in (job.out / "model.xml").read_text()


def test_a_run_for_the_cpu_exported_for_an_npu(finished_job, condiquant):
    job = finished_job(tile=24)
    parameters = (job.out / "quantized.safetensors").read_bytes()
    npu, cpu = job.folder / "npu", job.out
    code, out, err = condiquant("export", job.out, "--device", "NPU", "--out", npu, "-q")
    assert code == 0, err
    notes = [line for line in out.splitlines() if line.startswith("note: ")]
    assert any("untested on the device" in note for note in notes)
    assert any("--set export.device=NPU calibrates" in note for note in notes)
    metadata = read_metadata(npu / "model.xml")
    assert (metadata["device"], metadata["tested_on_device"], metadata["static"]) == (
        "NPU", False, True,
    )  # fmt: skip
    assert metadata["recipe_sha256"] == load_recipe(job.out / "recipe.yml").digest()
    cost = metadata["parity"]
    assert 0 < cost["zero_on_grid_mean_abs"] < cost["zero_on_grid_max_abs"]
    assert list(read_ir(npu / "model.xml").input().get_shape()) == [1, 3, 24, 24]
    image = torch.rand(3, 24, 24)
    found, expected = (Upscaler(folder / "model.xml")(image) for folder in (npu, cpu))
    assert 0 < (found - expected).abs().mean() < 5 * cost["zero_on_grid_mean_abs"]
    assert (job.out / "quantized.safetensors").read_bytes() == parameters


def test_a_run_for_an_npu_calibrates_on_its_grids(finished_job, condiquant):
    job = finished_job(tile=24, device="NPU")
    notes = json.loads((job.out / "metrics.json").read_text())["ir"]["notes"]
    assert any("untested on the device" in note for note in notes)
    assert not any("calibrates for" in note for note in notes)
    metadata = read_metadata(job.out / "model.xml")
    assert (metadata["device"], metadata["static"]) == ("NPU", True)
    assert "zero_on_grid_mean_abs" not in metadata["parity"]
    recipe = load_recipe(job.out / "recipe.yml")
    model, _ = rebuild(load_network(recipe), torch.rand(1, 3, 24, 24), recipe)
    load_parameters(model, job.out / "quantized.safetensors")
    for quantizer in fake_quantizers(model).values():
        snapped = quantizer.snapped()
        zero = -snapped.lower / snapped.step
        torch.testing.assert_close(zero, zero.round(), atol=1e-4, rtol=0)
        assert quantizer.kind != "weight" or (zero.round() == 8).all()

    cpu = job.folder / "cpu"
    code, out, err = condiquant("export", job.out, "--device", "CPU", "--out", cpu, "-q")
    assert code == 0, err
    assert "note: calibrated" not in out
    assert read_metadata(cpu / "model.xml")["device"] == "CPU"
    assert read_ir(cpu / "model.xml").input().get_partial_shape().is_dynamic
    same(cpu, job.out, torch.rand(3, 24, 24), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device", "GPU"), "export.device='GPU': Input should be 'CPU' or 'NPU'"),
        (("--device", "NPU", "--dynamic"), "export.device=NPU needs static shapes"),
        (("--tile", "4"), "export.tile=4"),
    ],
)
def test_exports_that_cannot_be(finished_job, condiquant, options, message):
    job = finished_job(tile=24)
    target = job.folder / "other"
    code, _, err = condiquant("export", job.out, "--out", target, "-q", *options)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert message in err
    assert not target.exists()


def test_exports_as_json_and_into_folders_that_cannot_be_written(finished_job, condiquant):
    job = finished_job(tile=24)
    target = job.folder / "npu"
    arguments = ("export", job.out, "--device", "NPU", "-q", "--out")
    code, out, err = condiquant(*arguments, target, "--json")
    assert code == 0, err
    figures = json.loads(out)
    assert figures["file"] == str(target / "model.xml")
    assert figures["bin_bytes"] == (target / "model.bin").stat().st_size
    assert any("untested on the device" in note for note in figures["notes"])
    job.write()
    (job.out / "quantized.safetensors").unlink()  # would be found out next
    for unwritable in (
        "/proc/export",
        job.folder / "recipe.yml",
        job.folder / "recipe.yml" / "out",
    ):
        code, _, err = condiquant(*arguments, unwritable)
        assert code == 2
        assert f"cannot write to {unwritable} (" in err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("export.device=GPU",), "'CPU' or 'NPU'"),
        (("export.device=NPU", "export.static=false"), "needs static shapes"),
    ],
)
def test_recipes_that_cannot_be(make_job, condiquant, settings, message):
    job = make_job("compact")
    overrides = [part for setting in settings for part in ("--set", setting)]
    code, _, err = condiquant("run", job.write(), "--data", job.data, *overrides, "-q")
    assert code == 2
    assert len(err.splitlines()) == 1
    assert message in err


@pytest.mark.parametrize("fp16", [False, True])
def test_u8_images_in_and_out(finished_job, condiquant, fp16):
    job = finished_job("edsr")
    target, options = job.folder / "u8", ("--fp16", "-q") if fp16 else ("-q",)
    if fp16:
        assert condiquant("export", job.out, *options)[0] == 0
    code, out, err = condiquant("export", job.out, "--u8-nhwc", "--out", target, *options)
    assert code == 0, err
    assert "u8_max_levels" in out
    metadata = read_metadata(target / "model.xml")
    assert metadata["preprocessing"] == "u8_nhwc"
    assert metadata["parity"]["u8_max_levels"] <= 1
    assert str(read_ir(target / "model.xml").input().get_partial_shape()) == "[1,?,?,3]"
    write_image(job.folder / "low.png", torch.rand(3, 20, 30))
    pictures = []
    for folder in (job.out, target):
        picture = job.folder / f"{folder.name}.png"
        assert condiquant("upscale", folder, job.folder / "low.png", picture, "-q")[0] == 0
        pictures.append(read_image(picture) * 255)
    difference = (pictures[0] - pictures[1]).abs().round()
    assert difference.max() <= 1
    assert difference.mean() < 0.01


def test_u8_images_for_an_npu_from_the_recipe(finished_job):
    job = finished_job(tile=24, device="NPU", u8_nhwc=True)
    assert list(read_ir(job.out / "model.xml").input().get_shape()) == [1, 24, 24, 3]


@pytest.fixture(params=["shape", "factor"])
def fixed_size(request, make_job):
    """A job of a network that is right at one size only."""
    if "TracedAtOneSize" not in ARCH_REGISTRY:
        ARCH_REGISTRY.register(TracedAtOneSize)
    job = make_job("compact")
    section = {"type": "TracedAtOneSize", "upscale": 2, "constant": request.param}
    torch.manual_seed(0)
    torch.save({"params": TracedAtOneSize(2, "shape").state_dict()}, job.folder / "net.pth")
    job.recipe["network_g"] = section
    job.recipe["export"] = {"tile": 32}
    return job


def test_a_network_for_one_size_becomes_static_and_says_so(fixed_size, condiquant):
    job = fixed_size
    code, out, err = condiquant("run", job.write(), "--data", job.data, "--out", job.out, "-q")
    assert code == 0, err
    assert "note: tiny is right only at the size it is traced with: the IR is static, 32x32" in out
    assert read_metadata(job.out / "model.xml")["static"] is True
    assert Upscaler(job.out / "model.xml")(torch.rand(3, 40, 50)).shape == (3, 80, 100)


def test_a_network_for_one_size_asked_for_any(fixed_size, condiquant):
    job = fixed_size
    job.recipe["export"]["static"] = False
    code, _, err = condiquant("run", job.write(), "--data", job.data, "--out", job.out, "-q")
    assert code == 2
    assert "set export.static: true" in err.splitlines()[-1]
    assert not (job.out / "model.xml").exists()
    code, _, err = condiquant("export", job.out, "--static", "-q")  # calibration is not lost
    assert code == 0, err
    assert (job.out / "model.xml").exists()


def test_the_float_network_beside_an_ir(finished_job, condiquant):
    job = finished_job(tile=24)
    target = job.folder / "with_float"
    code, _, err = condiquant("export", job.out, "--out", target, "--float", "-q")
    assert code == 0, err
    assert (target / "model.xml").exists()
    image = torch.rand(3, 20, 30)
    with torch.no_grad():
        expected = load_network(load_recipe(job.out / "recipe.yml"))(image[None])[0]
    found = Upscaler(target / "float.xml")(image)
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=0, atol=1e-4)
    metadata = read_metadata(target / "float.xml")
    assert metadata["static"] is False
    assert metadata["scale"] == 2
    assert not list(job.out.glob("float.*"))


def test_the_float_network_for_one_size_is_static(fixed_size, tmp_path):
    recipe = load_recipe(fixed_size.write())
    network = load_network(recipe)
    export_float(network, recipe, tmp_path / "float.xml", Progress())
    assert read_metadata(tmp_path / "float.xml")["static"] is True
    assert list(read_ir(tmp_path / "float.xml").input().get_shape()) == [1, 3, 32, 32]
