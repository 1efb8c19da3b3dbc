"""BasicSR's real pipelines behind ``import condiquant_basicsr``: a user's own train.py."""

import os
import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from basicsr.models import build_model
from basicsr.test import test_pipeline as run_tests
from basicsr.train import train_pipeline
from basicsr.utils.registry import MODEL_REGISTRY

import condiquant_basicsr
from condiquant_basicsr import quantizer
from condiquant_plugin.errors import InputError
from condiquant_recipes.training import jobs
from training_job import TrainingJob

torch.set_num_threads(1)

OWN_SCRIPT = """
import os, sys
import condiquant_basicsr
from basicsr.models import build_model
from basicsr.test import test_pipeline
from basicsr.train import train_pipeline

train_pipeline(os.getcwd())
sys.argv += ["--auto_resume", "--force_yml", "train:total_iter=5"]
train_pipeline(os.getcwd())
sys.argv[1:] = ["-opt", "test.yml"]
test_pipeline(os.getcwd())
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return TrainingJob(tmp_path)


@pytest.fixture
def refused(monkeypatch):
    """``refused(PIPELINE, FILE)``: what BasicSR's pipeline raises before folders are made."""

    def message(pipeline, file: Path) -> str:
        monkeypatch.setattr(sys, "argv", ["train.py", "-opt", str(file)])
        with pytest.raises(InputError) as info:
            pipeline(os.getcwd())
        assert "\n" not in str(info.value)
        assert not Path("experiments").exists()
        assert not Path("results").exists()
        return str(info.value)

    return message


def psnrs(folder: Path) -> list[str]:
    logs = [*sorted(folder.glob("train_*.log")), *sorted(folder.glob("test_*.log"))]
    return re.findall(r"# psnr: ([\d.]+)", "".join(log.read_text() for log in logs))


def test_one_import_line_makes_a_script_of_ones_own(job, monkeypatch):
    job.options["num_gpu"] = 1
    job.options["datasets"]["train"] |= {"prefetch_mode": "cuda", "pin_memory": True}
    for key in ("dataroot_gt", "dataroot_lq"):
        Path(job.options["datasets"]["train"][key], "Thumbs.db").write_bytes(b"\xd0\xcf")
    trained = job.write()
    weights = job.options["path"]["pretrain_network_g"]
    job.options["path"]["pretrain_network_g"] = "experiments/exp/models/net_g_latest.pth"
    tested = trained.with_name("test.yml")
    job.write().rename(tested)
    job.options["path"]["pretrain_network_g"] = weights
    job.write()

    (job.folder / "own.py").write_text(OWN_SCRIPT)
    command = [sys.executable, "own.py", "-opt", trained.name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    ours = job.folder / "ours"
    ours.mkdir()
    monkeypatch.chdir(ours)
    jobs.train(trained)
    jobs.train(trained, ["train:total_iter=5"], auto_resume=True)
    jobs.evaluate(tested)
    expected_psnrs = psnrs(ours / "experiments" / "exp") + psnrs(ours / "results" / "exp")
    assert psnrs(job.experiment) == expected_psnrs  # a process has one log
    assert len(expected_psnrs) == 4
    for name in ("net_g_3.pth", "net_g_latest.pth"):
        theirs, expected = (
            torch.load(folder / "experiments" / "exp" / "models" / name, weights_only=True)
            for folder in (job.folder, ours)
        )
        assert theirs.keys() == expected.keys() == {"params", "params_ema", "condiquant"}
        assert theirs["condiquant"] == expected["condiquant"]
        for key in ("params", "params_ema"):
            assert theirs[key].keys() == expected[key].keys()
            assert all(torch.equal(theirs[key][n], t) for n, t in expected[key].items())


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("condiquant", {"wieght_bits": 3}, "unknown key condiquant.wieght_bits: did you mean"),
        ("train", {"pixel_opt": {"type": "L3Loss"}}, "train.pixel_opt does not suit BasicSR"),
        (
            "val",
            {"metrics": {"psnr": {"type": "psnr"}}},
            "val.metrics.psnr needs a type, not psnr;",
        ),
        ("network_g", {"num_feat": 8}, "net.pth does not fit network_g EDSR"),
        ("path", {"pretrain_network_g": None}, "path.pretrain_network_g is missing: name"),
    ],
)
def test_scripts_refuse_what_our_commands_refuse(job, refused, section, changes, message):
    job.options[section] |= changes
    found = refused(train_pipeline, job.write())
    assert message in found
    with pytest.raises(InputError) as ours:
        jobs.train(job.write())
    assert str(ours.value) == found


def test_a_section_that_the_model_ignores_is_refused(job, refused):
    job.options["model_type"] = "SRModel"
    assert "ignores the condiquant section" in refused(train_pipeline, job.write())


def test_scripts_test_quantized_networks_alone(job, refused):
    assert "holds a float network: quantize it with" in refused(run_tests, job.write())
    job.options["val"] = {"metrics": {}}
    job.options["path"]["pretrain_network_g"] = None
    assert "path.pretrain_network_g is missing: give the net_g" in refused(run_tests, job.write())


def test_networks_in_the_experiment_are_not_moved_away(job, monkeypatch):
    models = job.experiment / "models"
    models.mkdir(parents=True)
    job.options["path"]["pretrain_network_g"] = str(
        (job.folder / "net.pth").rename(models / "n.pth")
    )
    monkeypatch.setattr(sys, "argv", ["train.py", "-opt", str(job.write())])
    with pytest.raises(InputError, match="which BasicSR renames to start anew"):
        train_pipeline(os.getcwd())
    assert (models / "n.pth").is_file()


def entry(value: str) -> EntryPoint:
    return EntryPoint("other", value, quantizer.GROUP)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], r"\(nothing offers one\): pip install \"condiquant-plugin\[recipes\]\"$"),
        ([entry("absent_host.jobs:make")], r"\(No module named 'absent_host'\): pip install"),
        ([entry("a:make"), entry("b:make")], r"several packages offer .* \(a:make, b:make\): unin"),
    ],
)
def test_what_places_quantizers_must_be_installed(job, refused, monkeypatch, entries, message):
    monkeypatch.setattr(quantizer, "entry_points", lambda group: entries)
    assert re.search(message, refused(train_pipeline, job.write()))


def test_pipelines_of_others_are_served_by_the_model_itself(job, monkeypatch):
    """One with a parser of its own, which the hooks in BasicSR's pipelines do not reach."""
    opt = job.options | {"is_train": True, "rank": 0, "dist": False, "num_gpu": 0}
    for phase, section in opt["datasets"].items():
        section |= {"phase": phase, "scale": job.scale}
    model = build_model(opt)
    model.feed_data({"lq": torch.rand(1, 3, 24, 24)})
    model.optimize_parameters(1)
    assert model.get_current_log().keys() == {"l_pix"}
    models = job.folder / "models"
    opt["path"] |= {"models": str(models), "resume_state": "3.state"}
    opt["path"]["pretrain_network_g"] = str(models / "net_g_3.pth")  # as check_resume does
    with pytest.raises(InputError, match=r"path\.pretrain_network_teacher is missing: resuming"):
        build_model(opt)


def test_the_model_is_registered():
    assert MODEL_REGISTRY.get(quantizer.MODEL_TYPE) is condiquant_basicsr.CondiQuantModel
