import json
import subprocess
import sys

import pytest
import torch
from rich.console import Console

from condiquant_basicsr import read_image, write_image
from condiquant_openvino import Upscaler, read_metadata
from condiquant_plugin import InputError
from condiquant_plugin.uniform.bits import FLOAT_BITS
from condiquant_recipes import exporting, ir, run
from condiquant_recipes.progress import Progress
from condiquant_recipes.recipe import load_recipe
from condiquant_recipes.recipe_files import recipe_path
from condiquant_recipes.run import run as run_recipe


def without_times(metrics):
    ir = {k: v for k, v in metrics["ir"].items() if k not in ("latency_ratio", "notes")}
    return {k: v for k, v in metrics.items() if k != "seconds"} | {"ir": ir}


@pytest.mark.lower_sets
@pytest.mark.parametrize(("name", "bits"), [("swinir", 4), ("dat", 2), ("edsr", 2), ("compact", 4)])
def test_a_run_ends_with_metrics_and_an_ir_that_follows_the_simulation(make_job, name, bits):
    job = make_job(name)
    overrides = [f"condiquant.weight_bits={bits}", f"condiquant.activation_bits={bits}"]
    recipe = load_recipe(job.write(), [*overrides, "condiquant.transform=auto"])
    metrics = run_recipe(recipe, job.data, job.out)
    assert json.loads((job.out / "metrics.json").read_text()) == metrics
    assert set(metrics["float"]) == set(metrics["quantized"]) == {"Tiny"}
    assert metrics["quantized"]["Tiny"]["psnr"] != metrics["float"]["Tiny"]["psnr"]
    assert metrics["ir"]["parity_stretch_mean_abs"] <= 1e-6
    assert (
        metrics["ir"]["parity_mean_abs"] <= 5e-3
    )  # one tie that goes the other way moves many codes
    assert metrics["ir"]["parity_layer_max"] <= 1e-5
    executions = metrics["ir"]["layer_executions"]
    assert all(e["runs_as"] == "int8" or e["reason"] for e in executions)
    assert metrics["ir"]["int8_share"] > 0.3
    assert set(metrics["seconds"]) == {"gram", "recondition", "bounds", "distillation", "export"}
    assert read_metadata(job.out / "model.xml")["weight_bits"] == bits
    assert not list(job.out.rglob(".*"))

    scores = ir.evaluate(job.out / "model.xml", job.data, ["Tiny"], "CPU", Progress())
    assert scores["Tiny"]["psnr"] == pytest.approx(metrics["quantized"]["Tiny"]["psnr"], abs=0.1)


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_the_same_run_twice_gives_identical_metrics(finished_job):
    job = finished_job()
    second = run_recipe(load_recipe(job.write()), job.data, job.folder / "two")
    assert without_times(metrics_of(job.out)) == without_times(second)
    for file in ("model.bin", "model.xml"):
        assert (job.out / file).read_bytes() == (job.folder / "two" / file).read_bytes()


def test_a_run_killed_in_distillation_resumes_to_the_end_of_an_unbroken_one(
    finished_job, monkeypatch
):
    job = finished_job()
    recipe = load_recipe(job.write())
    unbroken, out = metrics_of(job.out), job.folder / "killed"

    class Killed(BaseException):
        pass

    original = run.distill

    def dying(*args, **kwargs):
        def die(iteration: int, _loss: float) -> None:
            if iteration == 5:
                raise Killed

        kwargs["progress"] = die
        return original(*args, **kwargs)

    monkeypatch.setattr(run, "distill", dying)
    with pytest.raises(Killed):
        run_recipe(recipe, job.data, out)
    monkeypatch.setattr(run, "distill", original)
    assert not (out / "metrics.json").exists()
    calibrations = []
    monkeypatch.setattr(
        run.nncf_host, "quantize_network", lambda *a, **k: calibrations.append(1) or 1 / 0
    )
    resumed = run_recipe(recipe, job.data, out, resume=True)
    assert without_times(resumed) == without_times(unbroken)
    assert not calibrations


def test_resuming_another_recipe_is_refused(finished_job):
    job = finished_job()
    other = load_recipe(job.write(), ["condiquant.weight_bits=3"])
    with pytest.raises(InputError, match="other recipe"):
        run_recipe(other, job.data, job.out, resume=True)


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ("condiquant.weight_bits=3", r"other recipe, condiquant\.weight_bits=4, not 3"),
        ("seed=1", r"other recipe, seed=0, not 1"),
        ("export.tile=40", r"export\.tile=32, not 40"),
    ],
)
def test_a_finished_run_is_not_overwritten_by_another(finished_job, change, shown):
    job = finished_job()
    files = {path: path.read_bytes() for path in job.out.rglob("*") if path.is_file()}
    other = load_recipe(job.write(), [change])
    with pytest.raises(
        InputError,
        match=rf"holds another run \({shown}\): give another --out, or --overwrite to drop it",
    ):
        run_recipe(other, job.data, job.out)
    assert {p: p.read_bytes() for p in job.out.rglob("*") if p.is_file()} == files


def test_a_finished_run_is_overwritten_if_asked_to(finished_job):
    job = finished_job()
    other = load_recipe(job.write(), ["condiquant.weight_bits=3"])
    anew = run_recipe(other, job.data, job.out, overwrite=True)
    assert read_metadata(job.out / "model.xml")["weight_bits"] == 3
    assert metrics_of(job.out) == anew


def test_a_trained_network_is_not_lost_either_where_its_export_failed(finished_job):
    job = finished_job()
    for name in ("metrics.json", "model.xml", "model.bin", "quantized.safetensors"):
        (job.out / name).unlink()
    with pytest.raises(InputError, match="seed=0, not 1"):
        run_recipe(load_recipe(job.write(), ["seed=1"]), job.data, job.out)
    for path in (job.out / "stages").glob("distilled*"):
        path.unlink()
    run_recipe(load_recipe(job.write(), ["seed=1"]), job.data, job.out)


def test_results_of_nobody_knows_what_are_not_overwritten(make_job):
    job = make_job("compact")
    job.out.mkdir()
    (job.out / "model.xml").write_text("<net/>")
    with pytest.raises(
        InputError, match=r"another run \(of unknown settings\): give another --out"
    ):
        run_recipe(load_recipe(job.write()), job.data, job.out)
    assert (job.out / "model.xml").read_text() == "<net/>"


def test_the_same_finished_run_is_not_computed_again(finished_job, monkeypatch, capsys):
    job = finished_job()
    recipe, first = load_recipe(job.write()), metrics_of(job.out)
    monkeypatch.setattr(run.nncf_host, "quantize_network", None)
    monkeypatch.setattr(run, "distill", None)
    again = run_recipe(recipe, job.data, job.out, progress=Progress(Console(stderr=True)))
    assert without_times(again) == without_times(first)
    assert "keeping the stages" in capsys.readouterr().err


def test_without_a_console_nothing_is_shown(make_job, capfd):
    job = make_job("compact")
    run_recipe(load_recipe(job.write()), job.data, job.folder / "quiet")
    assert capfd.readouterr().out == ""
    run_recipe(
        load_recipe(job.write()), job.data, job.folder / "loud", progress=Progress(Console())
    )
    assert "reconditioning and rounding weights" in capfd.readouterr().out


def test_a_new_run_drops_what_an_older_one_left(finished_job):
    job = finished_job()
    broken = load_recipe(job.write(), ["condiquant.ignored_scope.names=[nothing]"])
    with pytest.raises(InputError, match="ignored_scope"):
        run_recipe(broken, job.data, job.out, overwrite=True)
    for name in ("metrics.json", "model.xml", "model.bin", "quantized.safetensors"):
        assert not (job.out / name).exists()
    with pytest.raises(InputError, match="no finished run"):
        ir.export_again(job.out, job.out, {}, Progress())


def test_half_precision_leftovers_make_the_file_smaller_and_say_what_they_cost(finished_job):
    job = finished_job()
    small = ir.export_again(job.out, job.folder / "fp16", {"compress_to_fp16": True}, Progress())
    full = metrics_of(job.out)["ir"]
    assert small["bin_bytes"] < full["bin_bytes"]
    assert small["parity_mean_abs"] > full["parity_mean_abs"]


@pytest.mark.parametrize("name", ["swinir", "dat"])
def test_masks_do_not_become_constants(make_job, monkeypatch, name):
    """The network is traced once, at another size than its own."""
    job, converted = make_job(name), []
    once = exporting.openvino_host.convert_beside_float
    monkeypatch.setattr(
        exporting.openvino_host,
        "convert_beside_float",
        lambda *a, **k: converted.append(a[1].shape) or once(*a, **k),
    )
    size = job.recipe["network_g"]["img_size"]  # traced at it, the IR is wrong at other sizes
    job.recipe["export"] = {"static": False, "tile": size}
    job.recipe["condiquant"]["distillation"]["iterations"] = 0
    metrics = run_recipe(load_recipe(job.write()), job.data, job.out)
    ((_, _, height, width),) = converted
    assert height != width
    assert not [note for note in metrics["ir"]["notes"] if "float network is faster" not in note]
    assert read_metadata(job.out / "model.xml")["static"] is False
    scores = ir.evaluate(job.out / "model.xml", job.data, ["Tiny"], "CPU", Progress())
    assert scores["Tiny"]["psnr"] == pytest.approx(metrics["quantized"]["Tiny"]["psnr"], abs=0.1)


def test_fidelity_to_the_float_output_is_scored_where_the_recipe_asks(make_job):
    job = make_job("compact")
    path = job.write()
    overrides = ["condiquant.distillation.iterations=0"]
    against_hr = run_recipe(load_recipe(path, overrides), job.data, job.folder / "hr")
    overrides.append("datasets.reference=float")
    against_float = run_recipe(load_recipe(path, overrides), job.data, job.folder / "float")
    assert against_hr["float"] == against_float["float"]
    assert against_float["quantized"]["Tiny"]["psnr"] != against_hr["quantized"]["Tiny"]["psnr"]


def test_layers_with_float_inputs_are_exported_and_exported_again(make_job):
    job = make_job("edsr")
    rule = {"weight_bits": 3, "activation_bits": "float"}
    job.recipe["condiquant"] |= {"layers": {"body.0.*": rule}, "equalize": True}
    metrics = run_recipe(load_recipe(job.write()), job.data, job.out)
    rows = {row["name"]: (row["bits"], row["activation_bits"]) for row in metrics["layers"]}
    assert rows["body.0.conv1"] == rows["body.0.conv2"] == (3, FLOAT_BITS)
    assert metrics["other_bits"] == {"w3a32": 2}
    assert metrics["ir"]["parity_layer_max"] <= 1e-5
    ir.export_again(job.out, job.folder / "npu", {"device": "NPU"}, Progress())


def test_a_finished_run_is_exported_again_with_another_shape(finished_job):
    job = finished_job("edsr")
    target = job.folder / "static"
    ir.export_again(job.out, target, {"static": True, "tile": 40}, Progress())
    image = torch.rand(3, 40, 40)
    dynamic, static = (Upscaler(f / "model.xml") for f in (job.out, target))
    assert (dynamic(image) - static(image)).abs().mean() < 1e-3  # codes on ties differ
    wide = torch.rand(3, 40, 70)
    assert static(wide).shape == dynamic(wide).shape == (3, 80, 140)


@pytest.mark.parametrize("offset", [50, 1])
@pytest.mark.parametrize("wrong_when", [{}, {"static": True}])
def test_a_failed_parity_check_leaves_no_ir(make_job, monkeypatch, offset, wrong_when):
    job = make_job("edsr")
    convert = exporting.openvino_host.convert_beside_float
    job.recipe["export"]["static"] = wrong_when.get("static")

    def off_by_an_offset(model, image, **options):
        with torch.no_grad():
            bias = model.get_parameter("conv_last.bias")
            is_wrong = {k: v for k, v in options.items() if k != "isa"} == wrong_when
            bias += offset * is_wrong
            converted = convert(model, image, **options)
            bias -= offset * is_wrong
        return converted

    monkeypatch.setattr(exporting.openvino_host, "convert_beside_float", off_by_an_offset)
    with pytest.raises(RuntimeError, match=r"differs from the simulation .* first layer"):
        run_recipe(load_recipe(job.write()), job.data, job.out)
    assert not (job.out / "model.xml").exists()
    assert not (job.out / "metrics.json").exists()


def test_an_error_of_the_conversion_itself_is_shown(make_job, monkeypatch):
    job = make_job("edsr")
    job.recipe["export"]["static"] = None

    def failing(*_arguments, **_options):
        raise RuntimeError("no such layout")

    monkeypatch.setattr(exporting.openvino_host, "convert", failing)
    with pytest.raises(RuntimeError, match="no such layout"):
        run_recipe(load_recipe(job.write()), job.data, job.out)


def test_what_cannot_be_converted_fails_before_distillation(make_job, monkeypatch):
    job = make_job("compact")
    monkeypatch.setattr(run, "distill", None)

    def failing(*_arguments, **_options):
        raise InputError("no such operator")

    monkeypatch.setattr(exporting.openvino_host, "convert", failing)
    with pytest.raises(InputError, match=r"^no such operator \(before any distillation, as"):
        run_recipe(load_recipe(job.write()), job.data, job.out)
    assert not (job.out / "stages" / "distilled.json").exists()


@pytest.mark.parametrize("kind", [InputError, RuntimeError])
def test_a_failed_export_says_where_the_trained_network_is(make_job, monkeypatch, kind):
    job = make_job("compact")

    def failing(*_arguments):
        raise kind("no parity")

    with monkeypatch.context() as patched:
        patched.setattr(exporting, "check_parities", failing)
        with pytest.raises(kind, match=rf"no parity \(.* kept in {job.out}: .*condiquant export"):
            run_recipe(load_recipe(job.write()), job.data, job.out)
    ir.export_again(job.out, job.out, {}, Progress())
    assert (job.out / "model.xml").exists()


@pytest.mark.parametrize(
    "recipe",
    [f"{n}/x{s}.yml" for n in ("dat_light", "swinir_light") for s in (2, 3, 4)]
    + ["realesrgan/x4.yml"],
)
def test_ready_recipes_are_valid_and_build_their_network(recipe):
    loaded = load_recipe(recipe_path(recipe))
    assert loaded.condiquant.weight_bits == loaded.condiquant.activation_bits == 4
    assert run.basicsr_host.build_network(loaded.network_g)


def test_the_command_line_runs_inspects_evaluates_and_upscales(make_job, condiquant):
    job = make_job("compact")
    recipe = job.write()
    command = [sys.executable, "-m", "condiquant_recipes", "run", str(recipe)]
    command += ["--data", str(job.data), "--out", str(job.out), "--quiet"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=job.folder)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    assert "Statistics collection" not in ran.stdout
    assert "W4A4" in ran.stdout
    inspected = condiquant("inspect", job.out / "model.xml", "--json")
    assert json.loads(inspected)["metadata"]["network"] == "tiny"
    layers = json.loads(condiquant("inspect", job.folder / "net.pth", "--json"))["layers"]
    assert all(layer["condition"] >= 1 for layer in layers)
    write_image(job.folder / "low.png", torch.rand(3, 20, 30))
    condiquant("upscale", job.out, "low.png", "high.png", "--quiet")
    assert read_image(job.folder / "high.png").shape == (3, 40, 60)
    scores = condiquant("evaluate", job.out, "--data", job.data, "--sets", "Tiny", "--json", "-q")
    metrics = json.loads((job.out / "metrics.json").read_text())
    assert json.loads(scores)["Tiny"]["psnr"] == pytest.approx(
        metrics["quantized"]["Tiny"]["psnr"], abs=0.5
    )
