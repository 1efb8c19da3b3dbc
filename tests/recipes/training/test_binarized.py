"""BiDRNSR from an untouched YAML of BasicSR to an IR and a row of a comparison."""

import json
import shutil
from copy import deepcopy

import pytest
import torch
import yaml

from condiquant_basicsr import build_network
from condiquant_openvino import inspect
from condiquant_recipes.recipe_files import ready_recipes, ready_trainings, training_path
from training_job import OPTIONS, TrainingJob

NETWORK = {"type": "BiDRNSR", "num_feat": 8, "num_block": 1, "upscale": 2, "tail_bits": 8}


def options(**network) -> dict:
    found = deepcopy(OPTIONS) | {"model_type": "SRModel", "network_g": NETWORK | network}
    del found["condiquant"]
    found["train"]["optim_g"]["lr"], found["train"]["ema_decay"] = 2e-3, 0
    return found


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = TrainingJob(tmp_path, options())
    job.options["path"] = {"pretrain_network_g": None, "strict_load_g": True, "resume_state": None}
    return job


def test_an_untouched_yaml_trains_resumes_exports_and_is_compared(job, condiquant, monkeypatch):
    monkeypatch.setenv("CI", "true")
    condiquant("train", "-opt", job.write())
    first = job.checkpoint(3)["params"]
    job.forget_log()
    condiquant("train", "-opt", job.write(), "--auto_resume", "--force_yml", "train:total_iter=5")
    assert "Resuming training from epoch" in job.log()
    assert "iter:       5" in job.log()
    key = "body.0.steps.0.convolutions.0.weight"
    assert not torch.equal(first[key], job.checkpoint("latest")["params"][key])

    report = json.loads(condiquant("export", job.experiment, "--json", "--tile", 16))
    assert report["parity_mean_abs"] < 1e-5
    assert report["parity_layer_max"] < 1e-5
    assert report["default"]["parity_mean_abs"] < 0.01
    runs_as = [layer["runs_as"] for layer in report["layer_executions"]]
    assert runs_as.count("int8") == 3  # two of one bit, the tail of eight
    metadata = inspect(job.experiment / "model.xml")["metadata"]
    assert (metadata["weight_bits"], metadata["activation_bits"]) == (1, 1)
    assert report["bin_bytes"] < report["float_bin_bytes"]

    experiment = job.experiment
    condiquant("export", experiment, "--float", code=2)

    torch.manual_seed(0)
    compared = options(block="float", tail_bits=32) | {"model_type": "CondiQuantModel"}
    other = TrainingJob(job.folder, compared)
    condiquant(
        "compare", other.write(), "--methods", "float", "--also", experiment, "--out", "out",
        "-q", "--set", "export.tile=16",
    )  # fmt: skip
    rows = {
        row["id"]: row for row in json.loads((job.folder / "out/compare.json").read_text())["rows"]
    }
    row = rows[f"trained-{job.options['name']}"]
    assert row["reason"] is None
    assert (row["weight_bits"], row["activation_bits"]) == (1, 1)
    assert row["bin_bytes"] < rows["float"]["bin_bytes"]
    assert 10 < row["psnr"]["Tiny"] < 60


def taught(job, weight):
    job.options["model_type"] = "DistilledSRModel"
    teacher = build_network(NETWORK | {"block": "float", "tail_bits": 32})
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.5)
    torch.save({"params": teacher.state_dict()}, job.folder / "teacher.pth")
    job.options["teacher"] = {
        "network_g": NETWORK | {"block": "float", "tail_bits": 32},
        "pretrain_network_g": str(job.folder / "teacher.pth"),
    }
    job.options["train"]["distillation_opt"] = {"type": "L1Loss", "loss_weight": weight}
    return teacher


def test_a_float_network_teaches_and_training_resumes(job, condiquant):
    taught(job, 0.0)
    condiquant("train", "-opt", job.write())
    alone = job.checkpoint("latest")["params"]
    shutil.rmtree(job.experiment)
    taught(job, 10.0)
    condiquant("train", "-opt", job.write())
    assert "l_distillation: " in job.log()
    assert "l_images: " in job.log()
    key = "body.0.steps.0.convolutions.0.weight"
    assert not torch.equal(alone[key], job.checkpoint("latest")["params"][key])
    assert not any("teacher" in name for name in job.checkpoint("latest")["params"])
    job.forget_log()
    condiquant("train", "-opt", job.write(), "--auto_resume", "--force_yml", "train:total_iter=5")
    assert "iter:       5" in job.log()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda o: o.pop("teacher"), ["teacher is missing", "teacher.pretrain_network_g"]),
        (lambda o: o["train"].pop("distillation_opt"), ["train.distillation_opt is missing"]),
        (lambda o: o["teacher"].update(pretrain_network_g="no.pth"), ["no.pth"]),
    ],
)
def test_a_teacher_that_cannot_be_used_takes_one_line(job, condiquant, change, words):
    taught(job, 1.0)
    change(job.options)
    message = condiquant("train", "-opt", job.write(), code=2)
    assert all(word in message for word in words), message
    assert not (job.folder / "experiments").exists()


@pytest.mark.parametrize(
    ("network", "top", "words"),
    [
        ({"block": "bidbr"}, {}, ["block='bidbr'", "'bidrb'"]),
        ({"blok": "bidrb"}, {}, ["no argument 'blok'", "block"]),
        ({"type": "BiDRNS"}, {}, ["unknown type 'BiDRNS'", "BiDRNSR"]),
        ({"upscale": 5}, {}, ["upscale=5", "2 or 3 or 4"]),
        ({"upscale": 4}, {}, ["scale=2", "network_g.upscale=4"]),
        ({"num_feat": 7, "forms": ["fusion_down", "fusion_up"]}, {}, ["7", "even"]),
        ({}, {"train": OPTIONS["train"] | {"ema_decay": 0.9}}, ["train.ema_decay=0.9", "set 0"]),
        ({}, {"model_type": "SRModell"}, ["SRModell"]),
    ],
)
def test_mistakes_in_a_yaml_take_one_line_before_anything_is_made(
    job, condiquant, network, top, words
):
    job.options["network_g"] |= network
    job.options |= top
    code = 1 if "model_type" in top else 2
    message = condiquant("train", "-opt", job.write(), code=code)
    assert all(word in message for word in words), message
    if code == 2:
        assert not (job.folder / "experiments").exists()


def test_what_is_no_experiment_is_no_row(job, condiquant):
    job.set_weights("float.pth")
    data = ("--data", job.folder)
    message = condiquant("compare", "dat_light/x4.yml", *data, "--also", job.folder, code=2)
    assert "no experiment" in message


def test_the_ready_training_is_basicsrs_and_no_recipe():
    assert ready_trainings() == ["bidrn/x4.yml"]
    assert not set(ready_trainings()) & set(ready_recipes())
    content = yaml.safe_load(training_path("bidrn/x4.yml").read_text())
    assert content["model_type"] == "SRModel"
    assert content["scale"] == content["network_g"]["upscale"]
    assert content["train"]["scheduler"]["periods"] == [content["train"]["total_iter"]]
