"""Fronts that are stopped and gone on with."""

import json

import pytest

from condiquant_openvino import read_metadata
from condiquant_plugin import InputError, fake_quantizers
from condiquant_recipes import finished, front, run
from condiquant_recipes.front import run_front
from condiquant_recipes.precision import costs
from condiquant_recipes.recipe import load_recipe

POINTS = ["w2a8", "w8a8"]


class Killed(BaseException):
    pass


@pytest.fixture
def job(make_job):
    made = make_job("compact")
    made.recipe["condiquant"] |= {
        "weight_granularity": "channel", "distillation": {"iterations": 0},
    }  # fmt: skip
    made.recipe["datasets"]["reference"] = "float"
    return made


@pytest.fixture
def done(monkeypatch):
    """What is calibrated, exported and scored from now on, in order; the export in ``stop`` is killed."""

    class Done(list):
        stop = None

    seen, calibrate, export = Done(), run.nncf_host.quantize_network, finished.export
    evaluate = run.basicsr_host.evaluate

    def calibrated(*args, **kwargs):
        seen.append("calibrate")
        return calibrate(*args, **kwargs)

    def exported(model, recipe, multiple, out, *args, **kwargs):
        if out.name == seen.stop:
            raise Killed
        seen.append(f"export {out.name}")
        return export(model, recipe, multiple, out, *args, **kwargs)

    def evaluated(upscale, *args, **kwargs):
        seen.append("score" if fake_quantizers(upscale.args[0]) else "score float")
        return evaluate(upscale, *args, **kwargs)

    monkeypatch.setattr(run.nncf_host, "quantize_network", calibrated)
    monkeypatch.setattr(finished, "export", exported)
    monkeypatch.setattr(run.basicsr_host, "evaluate", evaluated)
    return seen


@pytest.fixture
def searches(monkeypatch):
    """Measurements of what bits cost, and the targets that bits are chosen for, in order."""
    seen, find, measure = [], run.search.find_precision, costs.LayerCosts

    def found(measured, hr, target, progress):
        seen.append(target.label)
        return find(measured, hr, target, progress)

    def measured(*args):
        seen.append("measured")
        return measure(*args)

    monkeypatch.setattr(run.search, "find_precision", found)
    monkeypatch.setattr(costs, "LayerCosts", measured)
    return seen


def identities(folder):
    """Which files there are: one that is written again is another."""
    files = [p for p in folder.rglob("model.*") if p.is_file()] + [*folder.rglob("float.*")]
    return {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in files if p.is_file()}


def run_all(job, *overrides, **options):
    return run_front(load_recipe(job.write(), overrides), job.data, job.out, 2, **options)


def test_a_front_that_was_killed_goes_on_behind_its_last_point(job, done):
    done.stop = "w8a8"
    with pytest.raises(Killed):
        run_all(job)
    assert done == ["calibrate", "score float", "score", "export w2a8", "calibrate", "score"]
    before = identities(job.out)
    assert {p.relative_to(job.out).as_posix() for p in before} == {
        "w2a8/model.xml", "w2a8/model.bin", "float/stages/float.xml", "float/stages/float.bin",
    }  # fmt: skip
    done.stop = None
    done.clear()
    points = run_all(job, resume=True)
    assert done == ["export w8a8"]
    after = identities(job.out)
    assert {p: after[p] for p in before} == before
    first = json.loads((job.out / "w2a8" / "metrics.json").read_text())
    written = {entry["name"]: entry for entry in json.loads((job.out / "front.json").read_text())}
    assert list(written) == [point.name for point in points] == POINTS
    assert written["w2a8"]["fidelity"] == first["fidelity"]
    assert written["w2a8"]["psnr"] == {"Tiny": first["quantized"]["Tiny"]["psnr"]}
    assert written["w2a8"]["bin_bytes"] == (job.out / "w2a8" / "model.bin").stat().st_size
    metrics = [json.loads((job.out / p / "metrics.json").read_text()) for p in POINTS]
    assert metrics[0]["float"] == metrics[1]["float"]
    assert {m["ir"]["float_bin_bytes"] for m in metrics} == {
        (job.out / "float" / "stages" / "float.bin").stat().st_size
    }


def test_a_finished_front_computes_nothing_again(job, done, monkeypatch):
    points = run_all(job)
    kept = ["model.xml", "model.bin", "quantized.safetensors", "metrics.json"]
    files = [job.out / point / name for point in POINTS for name in kept]
    times = [file.stat().st_mtime_ns for file in files]
    done.clear()
    monkeypatch.setattr(run, "rebuild", None)
    monkeypatch.setattr(run, "_fidelity", None)
    assert run_all(job, resume=True) == points
    assert done == []
    assert [file.stat().st_mtime_ns for file in files] == times


def test_points_are_scored_on_further_sets_alone(job, done):
    run_all(job)
    (job.data / "More").symlink_to(job.data / "Tiny")
    before = identities(job.out)
    done.clear()
    points = run_all(job, sets=["Tiny", "More"], resume=True)
    assert done == ["score float", "score", "score"]
    assert all(p.psnr["Tiny"] == p.psnr["More"] for p in points)
    assert identities(job.out) == before


@pytest.mark.parametrize(
    ("change", "left"),
    [
        (lambda job: (job.out / "w2a8" / "model.xml").unlink(), ["export w2a8"]),
        (lambda job: (job.out / "w8a8" / "model.bin").write_bytes(b"half"), ["export w8a8"]),
        (lambda job: (job.out / "w2a8" / "stages" / "exported.json").unlink(), ["export w2a8"]),
    ],
)
def test_an_ir_that_is_not_as_recorded_is_written_again(job, done, change, left):
    points = run_all(job)
    change(job)
    done.clear()
    again = run_all(job, resume=True)
    assert done == left
    assert [p.bin_bytes for p in again] == [p.bin_bytes for p in points]


def test_other_settings_of_the_export_write_all_irs_again(job, done):
    run_all(job)
    before = identities(job.out)
    done.clear()
    run_all(job, "export.tile=40", "export.static=true", resume=True)
    assert done == [f"export {name}" for name in POINTS]
    after = identities(job.out)
    assert before.keys() == after.keys()
    assert not any(after[p] == before[p] for p in before)
    assert read_metadata(job.out / "w2a8" / "model.xml")["static"] is True


def brighter(job):
    for file in (job.data / "calibration").iterdir():
        image = run.basicsr_host.read_image(file)
        run.basicsr_host.write_image(file, image.mul(1.25).clamp(0, 1))


@pytest.mark.parametrize(
    ("change", "overrides", "named"),
    [
        (brighter, [], "other crops"),
        (lambda _: None, ["condiquant.weight_granularity=tensor"], "weight_granularity=channel"),
        (lambda _: None, ["seed=1"], "seed=0, not 1"),
    ],
)
def test_points_of_other_crops_or_settings_are_not_kept(job, done, change, overrides, named):
    earlier = run_all(job)
    change(job)
    before = identities(job.out)
    done.clear()
    with pytest.raises(InputError, match=f"w2a8 holds another run .*{named}.*--overwrite"):
        run_all(job, *overrides, resume=True)
    assert done == []
    assert identities(job.out) == before
    changed = run_all(job, *overrides, resume=True, overwrite=True)
    assert [d for d in done if d != "score float"] == [
        each for name in POINTS for each in ("calibrate", "score", f"export {name}")
    ]
    assert all(a.fidelity != b.fidelity for a, b in zip(earlier, changed, strict=True))


def test_a_front_is_begun_anew_if_asked_to(job, done):
    run_all(job)
    done.clear()
    run_all(job, overwrite=True)
    assert done == [
        "calibrate", "score float", "score", "export w2a8", "calibrate", "score", "export w8a8",
    ]  # fmt: skip


def test_costs_of_bits_are_measured_once_for_all_points_of_the_same_crops(job, searches):
    recipe = load_recipe(job.write())
    points = front.run_front(recipe, job.data, job.out, 4)
    between = [p.name for p in points if p.name not in POINTS]
    assert searches == ["measured", *between]
    assert front.run_front(recipe, job.data, job.out, 4, resume=True) == points
    assert searches == ["measured", *between]
    brighter(job)
    front.run_front(recipe, job.data, job.out, 3, resume=True, overwrite=True)
    assert searches[3:4] == ["measured"]
    assert len(searches) == 5
