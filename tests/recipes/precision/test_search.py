"""Runs whose bits a target decides."""

import json

import pytest

from condiquant_plugin import InputError
from condiquant_recipes.precision.front import run_front
from condiquant_recipes.precision.target import Target
from condiquant_recipes.recipe import load_recipe
from condiquant_recipes.run import run


def small(make_job, name="edsr", **keys):
    job = make_job(name)
    job.recipe["condiquant"] |= {
        "weight_granularity": "channel", "distillation": {"iterations": 0}, **keys,
    }  # fmt: skip
    job.recipe["datasets"]["reference"] = "float"
    return job


@pytest.mark.parametrize(
    "text", ["fidelity", "speed=3", "fidelity=x", "size=-1", "drop=0", "size=inf"]
)
def test_targets_that_cannot_be_read(text):
    with pytest.raises(InputError, match=r"--target '"):
        Target.parse(text)


def test_a_target_is_kept_with_the_cheapest_bits(make_job):
    job = small(make_job)
    recipe = load_recipe(job.write())
    results = {
        aim: run(recipe, job.data, job.out / aim, target=Target.parse(aim))
        for aim in ("fidelity=30", "fidelity=40", "size=0.22")
    }
    sizes = {aim: metrics["ir"]["bin_bytes"] for aim, metrics in results.items()}
    assert sizes["fidelity=30"] < sizes["fidelity=40"]
    assert results["fidelity=30"]["precision"]["held_out"]["fidelity"] >= 30
    assert results["fidelity=40"]["precision"]["held_out"]["fidelity"] >= 40
    assert results["fidelity=40"]["quantized"]["Tiny"]["psnr"] > 37  # two crops know little of it
    of_size = results["size=0.22"]
    ratio = of_size["ir"]["bin_bytes"] / of_size["ir"]["float_bin_bytes"]
    assert 0.18 < ratio <= 0.22
    assert of_size["precision"]["held_out"]["size"] == pytest.approx(ratio, abs=0.01)
    bits = {row["name"]: (row["bits"], row["activation_bits"]) for row in of_size["layers"]}
    assert bits == {n: tuple(b) for n, b in of_size["precision"]["bits"].items() if n in bits}
    # The same again is a finished run; another target is not it.
    again = run(
        recipe, job.data, job.out / "size=0.22", resume=True, target=Target.parse("size=0.22")
    )
    assert again["precision"] == of_size["precision"]
    with pytest.raises(InputError, match="holds another run"):
        run(recipe, job.data, job.out / "size=0.22", target=Target.parse("fidelity=30"))


def test_a_drop_is_judged_on_photographs(make_job):
    job = small(make_job)
    recipe = load_recipe(job.write())
    metrics = run(recipe, job.data, job.out, target=Target.parse("drop=0.5"))
    assert metrics["precision"]["held_out"]["drop"] <= 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fidelity=99", r"no bits reach it .* the closest is fidelity=\d\d"),
        ("size=0.01", r"2-bit weights everywhere come to size=0\.\d+"),
        ("latency=0.001", r"takes latency=\d\.\d\d of the float one's with any bits"),
    ],
)
def test_targets_out_of_reach_name_the_closest(make_job, text, message):
    job = small(make_job)
    with pytest.raises(InputError, match=message):
        run(load_recipe(job.write()), job.data, job.out, target=Target.parse(text))
    assert not job.out.exists()


def test_rules_and_a_target_exclude_one_another(make_job):
    job = small(make_job, layers={"*": {"weight_bits": 8}})
    with pytest.raises(InputError, match=r"leave out condiquant\.layers"):
        run(load_recipe(job.write()), job.data, job.out, target=Target.parse("size=0.22"))


def test_a_front_is_an_ir_for_each_size(make_job):
    job = small(make_job)
    recipe = load_recipe(job.write())
    points = run_front(recipe, job.data, job.out, 3)
    sizes = [point.bin_bytes for point in points]
    assert sizes == sorted(set(sizes))
    assert points[0].fidelity < points[1].fidelity
    assert [point.name for point in points][::2] == ["w2a8", "w8a8"]
    for point in points:
        assert (job.out / point.name / "model.xml").exists()
    written = json.loads((job.out / "front.json").read_text())
    assert [entry["name"] for entry in written] == [point.name for point in points]
    assert (job.out / "front.svg").read_text().startswith("<?xml")
    with pytest.raises(InputError, match="at least 2 points"):
        run_front(recipe, job.data, job.out, 1)
