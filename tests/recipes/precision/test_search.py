"""Runs whose bits a target decides."""

import json
import sys
from types import SimpleNamespace

import pytest

from condiquant_plugin import InputError
from condiquant_plugin.layerwise.precision import LayerBits, LayerRule
from condiquant_recipes import cli
from condiquant_recipes.front import run_front
from condiquant_recipes.inspection import sensitivity_table
from condiquant_recipes.precision.rules import with_bits
from condiquant_recipes.precision.search import _Search, targeted
from condiquant_recipes.precision.target import Target
from condiquant_recipes.progress import Progress
from condiquant_recipes.recipe import load_recipe
from condiquant_recipes.run import run
from condiquant_recipes.source import load_source


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


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("size=0.25", None), ("size=0.2", "--target size=0.2: the IR has size=0.25"), ("fidelity=50", None),
        ("latency=0.5", None), ("latency=0.4", "--target latency=0.4: the IR has latency=0.5"),
    ],
)  # fmt: skip
def test_an_ir_that_breaks_its_promise_is_named(text, words):
    figures = {"bin_bytes": 250_000, "float_bin_bytes": 1_000_000, "latency_ratio": 0.5}
    assert Target.parse(text).missed(figures) == words


@pytest.mark.parametrize(
    ("text", "promised"), [("fidelity=40", 1.5), ("drop=0.1", 8.5), ("size=0.2", 8.5)]
)
def test_a_promise_of_fidelity_is_about_the_worst_crops(text, promised):
    assert Target.parse(text).promised(reversed(range(1, 17))) == promised
    assert Target.parse(text).promised([3.0]) == 3.0


def found_for(job, text):
    """Recipe and record of a search alone."""
    recipe = load_recipe(job.write())
    source = load_source(recipe, job.data, [])
    return targeted(recipe, source, job.data, Target.parse(text), None, Progress())


def test_a_higher_target_takes_more_bits(make_job):
    job = small(make_job)
    bits = {}
    for aim in ("fidelity=30", "fidelity=38"):
        recipe, record = found_for(job, aim)
        assert record["held_out"]["fidelity"] >= float(aim.split("=")[1])
        assert recipe.bits.activation == 8
        bits[aim] = sum(weight for weight, _ in record["bits"].values())
    assert bits["fidelity=30"] < bits["fidelity=38"]


def test_calibrations_keep_away_from_one_that_missed(monkeypatch):
    """What calibration gains varies by a little; of bits that miss by nothing the next ones have more."""
    gains, asked = iter([4.4, 3.95, 3.9]), []

    def cheapest(self, gained):
        asked.append(gained)
        return {"layer": gained}

    monkeypatch.setattr(_Search, "_cheapest", cheapest)
    monkeypatch.setattr(_Search, "_figure", lambda _, bits: 40 - bits["layer"])
    monkeypatch.setattr(_Search, "_calibrated", lambda _, bits: 40 - bits["layer"] + next(gains))
    monkeypatch.setattr(_Search, "_cost", lambda _, bits: -bits["layer"])
    unasked = SimpleNamespace(best=None)
    _, reached = _Search(unasked, None, Target.parse("fidelity=40")).choose()
    assert asked == pytest.approx([0, 3.96, 3.71])
    assert reached["fidelity"] == pytest.approx(40.19)


def test_what_calibration_gains_is_known_from_8_bits_that_missed(monkeypatch):
    asked = []

    def cheapest(self, gained):
        asked.append(gained)
        return {"layer": gained} if gained else None

    monkeypatch.setattr(_Search, "_cheapest", cheapest)
    monkeypatch.setattr(_Search, "_figure", lambda _, bits: 40 - bits["layer"])
    monkeypatch.setattr(_Search, "_calibrated", lambda _, bits: 42.6 - bits["layer"])
    monkeypatch.setattr(_Search, "_cost", lambda *_: 0)
    costs = SimpleNamespace(best=lambda: {"layer": 3.05})
    bits, reached = _Search(costs, None, Target.parse("fidelity=40")).choose()
    assert asked == pytest.approx([0, 2.55])
    assert bits == {"layer": asked[1]}
    assert reached["fidelity"] == pytest.approx(40.05)


def test_half_of_the_layers_in_float_are_tried_before_a_target_is_given_up(monkeypatch):
    figures = iter([39.5, 38.7, 40.2])
    monkeypatch.setattr(_Search, "_cheapest", lambda _, gained: {"layer": gained})
    monkeypatch.setattr(_Search, "_half_float", lambda _: {"layer": "half"})
    monkeypatch.setattr(_Search, "_figure", lambda *_: 38.0)
    monkeypatch.setattr(_Search, "_calibrated", lambda *_: next(figures))
    monkeypatch.setattr(_Search, "_cost", lambda *_: 0)
    unasked = SimpleNamespace(best=None)
    bits, reached = _Search(unasked, None, Target.parse("fidelity=40")).choose()
    assert (bits, reached) == ({"layer": "half"}, {"fidelity": 40.2})


def test_a_drop_is_judged_on_photographs(make_job):
    _, record = found_for(small(make_job), "drop=0.5")
    assert record["held_out"]["drop"] <= 0.5


def test_a_run_keeps_its_target_and_goes_on_from_it(make_job, capsys, monkeypatch):
    job = small(make_job)
    recipe, target = load_recipe(job.write()), Target.parse("fidelity=30")
    monkeypatch.setattr(Target, "missed", lambda self, ir: f"{self} of {sorted(ir)[0]}")
    metrics = run(recipe, job.data, job.out, target=target)
    assert metrics["warnings"][-1] == "fidelity=30 of accuracy"
    assert metrics["precision"]["held_out"]["fidelity"] >= 30
    assert metrics["quantized"]["Tiny"]["psnr"] > 28
    bits = {row["name"]: (row["bits"], row["activation_bits"]) for row in metrics["layers"]}
    assert bits == {n: tuple(b) for n, b in metrics["precision"]["bits"].items() if n in bits}
    picture = (job.out / "sensitivity.svg").read_text()
    monkeypatch.setattr(sys, "argv", ["condiquant", "inspect", str(job.out), "--sensitivity"])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert not exit_info.value.code
    listed = capsys.readouterr().out
    for name, (weight, activation) in metrics["precision"]["bits"].items():
        assert name in picture
        (row,) = (line for line in listed.splitlines() if f" {name} " in line)
        assert f"w{weight}a{activation}" in row
    with pytest.raises(InputError, match="holds no run with a target"):
        sensitivity_table(job.data)
    again = run(recipe, job.data, job.out, resume=True, target=target)
    assert again["precision"] == metrics["precision"]
    with pytest.raises(InputError, match="holds another run"):
        run(recipe, job.data, job.out, target=Target.parse("size=0.22"))


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


def test_what_is_named_as_the_closest_can_be_had(make_job):
    """With layers in float, of which calibration makes more than was to be seen before it."""
    job = small(make_job)
    with pytest.raises(InputError, match="no bits reach it") as missed:
        found_for(job, "fidelity=99")
    closest = float(str(missed.value).rpartition("=")[2])
    recipe, record = found_for(job, f"fidelity={closest - 0.1:.1f}")
    assert record["held_out"]["fidelity"] == pytest.approx(closest, abs=0.2)
    widths = [record["bits"][name][0] for name in record["sensitivity"]["weights"]]
    assert 0 < 2 * widths.count(32) <= len(widths)
    assert recipe.condiquant.layers


def test_rules_and_a_target_exclude_one_another(make_job):
    job = small(make_job, layers={"*": {"weight_bits": 8}})
    with pytest.raises(InputError, match=r"leave out condiquant\.layers"):
        run(load_recipe(job.write()), job.data, job.out, target=Target.parse("size=0.22"))


def test_a_front_is_an_ir_for_each_size(make_job, monkeypatch):
    job = small(make_job, other_bits=8)
    recipe, said = load_recipe(job.write()), []
    monkeypatch.setattr(Target, "missed", lambda self, _: f"beyond {self}")
    monkeypatch.setattr(Progress, "note", lambda _, text: said.append(text))
    points = run_front(recipe, job.data, job.out, 3)
    assert f"beyond size={points[1].name.removeprefix('size')}" in said
    sizes = [point.bin_bytes for point in points]
    assert sizes == sorted(set(sizes))
    assert points[0].fidelity < points[1].fidelity
    assert [point.name for point in points][::2] == ["w2a8", "w8a8"]
    for point in points:
        assert (job.out / point.name / "model.xml").exists()
    asked = float(points[1].name.removeprefix("size"))
    assert 0.9 * asked < points[1].size_ratio <= 1.001 * asked
    written = json.loads((job.out / "front.json").read_text())
    assert [entry["name"] for entry in written] == [point.name for point in points]
    assert (job.out / "front.svg").read_text().startswith("<?xml")
    with pytest.raises(InputError, match="at least 2 points"):
        run_front(recipe, job.data, job.out, 1)


def test_rules_name_only_what_differs(make_job):
    recipe = load_recipe(make_job("swinir").write())
    bits = {
        "a.qkv": LayerBits(6, 8), "a/matmul/0": LayerBits(8, 8), "a/matmul/1": LayerBits(32, 32),
        "a.proj": LayerBits(6, 8), "a.fc1": LayerBits(3, 32), "a.fc2": LayerBits(32, 32),
        "b/matmul/0": LayerBits(8, 8), "b/matmul/1": LayerBits(8, 8),
    }  # fmt: skip
    changed = with_bits(recipe, bits, {name for name in bits if "/" in name}).condiquant
    assert (changed.weight_bits, changed.activation_bits) == (6, 8)
    in_float = LayerRule("float", "float")
    assert changed.layers == {
        "a/matmul/1": in_float,
        "a.fc1": LayerRule(3, "float"),
        "a.fc2": in_float,
    }
