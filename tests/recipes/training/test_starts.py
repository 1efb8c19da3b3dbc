"""What a training refuses before it makes folders, and signals to all processes of a job."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from condiquant_basicsr import build_network
from condiquant_plugin.errors import InputError
from condiquant_recipes import exporting
from condiquant_recipes.training import jobs as training
from networks import SECTIONS
from programs import started, wait_for
from training_job import TrainingJob

torch.set_num_threads(1)


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return TrainingJob(tmp_path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("train:optim_g:type=Adams", r"train\.optim_g .*Adams.* correct its type and keys"),
        ("train:optim_g:momentum=0.9", r"train\.optim_g .*momentum"),
        ("train:scheduler:type=StepLR", r"train\.scheduler .*StepLR"),
        ("train:scheduler:gama=0.5", r"train\.scheduler .*gama"),
        ("train:pixel_opt:type=L3Loss", r"train\.pixel_opt .*L3Loss"),
        ("train:pixel_opt:weight=1", r"train\.pixel_opt .*weight"),
        (
            "val:metrics:psnr:type=psnr",
            r"val\.metrics\.psnr needs a type, not psnr; .*calculate_psnr",
        ),
        (
            "val:metrics:psnr=calculate_psnr",
            r"val\.metrics\.psnr needs a type, not calculate_psnr;",
        ),
        (
            "path:param_key_g=parmas",
            r"net\.pth: no entry 'parmas'; it has params: correct param_key",
        ),
        ("network_g:num_feat=8", r"net\.pth does not fit network_g EDSR"),
    ],
)
def test_refused_before_folders_are_made(job, entry, message):
    with pytest.raises(InputError, match=message):
        training.train(job.write(), [entry])
    assert not (job.folder / "experiments").exists()


def test_a_cosine_lasts_as_long_as_the_training(job):
    cosine = {"type": "CosineAnnealingRestartLR", "periods": [2, 2], "restart_weights": [1, 1]}
    job.options["train"] |= {"scheduler": cosine, "total_iter": 6}
    with pytest.raises(
        InputError,
        match=r"^train\.scheduler\.periods end after 4 it",
    ):
        training.train(job.write())


def test_crops_must_fit_the_windows(job):
    job.options["network_g"] = SECTIONS["swinir"]
    job.options["condiquant"]["scope"] = "transformer"
    job.set_weights("swinir.pth")
    with pytest.raises(InputError, match=r"gt_size=36 gives LR crops of 18x18, but SwinIR needs"):
        training.train(job.write(), ["datasets:train:gt_size=36"])


def test_crops_must_be_large_enough_for_the_network(job):
    job.options["network_g"] = {"type": "UpCunet2x"}
    torch.save({"params": build_network({"type": "UpCunet2x"}).state_dict()}, "net.pth")
    with pytest.raises(
        InputError,
        match=r"UpCunet2x cannot run on crops of 16x16 \(datasets\.train\.gt_size=32\): .*"
        r"use datasets\.train\.gt_size=64$",
    ):
        training.train(job.write(), ["datasets:train:gt_size=32"])
    assert not (job.folder / "experiments").exists()


def test_what_cannot_be_converted_is_not_trained(job, monkeypatch):
    def failing(*_arguments, **_options):
        raise InputError("no such operator")

    monkeypatch.setattr(exporting.openvino_host, "convert", failing)
    with pytest.raises(InputError, match=r"^no such operator \(before any distillation, as"):
        training.train(job.write())
    assert not list((job.folder / "experiments").rglob("*.pth"))


@pytest.mark.parametrize("key", ["val.save_img", "logger.print_freq"])
def test_keys_that_basicsr_would_miss_later(job, key):
    section, name = key.split(".")
    del job.options[section][name]
    with pytest.raises(InputError, match=rf"key {key} is missing: add it"):
        training.train(job.write())


def test_batches_larger_than_the_training_set(job):
    with pytest.raises(InputError, match="fewer images than a batch: lower batch_size_per_gpu"):
        training.train(job.write(), ["datasets:train:batch_size_per_gpu=64"])


def test_folders_that_do_not_fit_each_other(job):
    other = job.options["datasets"]["val"]["dataroot_lq"]
    with pytest.raises(InputError, match=r"images: 3, 2\.\): correct the datasets"):
        training.train(job.write(), [f"datasets:train:dataroot_lq={other}"])


def test_files_that_are_no_pictures_are_not_trained_on(job):
    for key in ("dataroot_gt", "dataroot_lq"):
        Path(job.options["datasets"]["train"][key], "Thumbs.db").write_bytes(b"\xd0\xcf")
    training.train(job.write(), ["train:total_iter=3"])
    assert (job.folder / "experiments" / job.options["name"] / "models").is_dir()


@pytest.mark.parametrize("folder", ["experiments", "tb_logger"])
def test_places_that_cannot_be_written(job, folder):
    (job.folder / folder).touch()
    with pytest.raises(InputError, match=f"cannot write to .*{folder} .*: choose another"):
        training.train(job.write())
    assert not (job.folder / "experiments").is_dir()


def test_the_training_set_of_a_training_yaml_is_not_tested(job):
    training.train(job.write())
    checkpoint = job.experiment / "models" / "net_g_latest.pth"
    training.evaluate(job.write(), [f"path:pretrain_network_g={checkpoint}"])
    (log,) = (job.folder / "results" / "exp").glob("test_*.log")
    assert len(re.findall("# psnr", log.read_text())) == 1
    for validation, message in (
        ({"metrics": {}}, r"key val\.save_img is missing: add it"),
        ({"save_img": False, "metrics": {"psnr": {"type": "psnr"}}}, "not psnr; there are: .*calc"),
    ):
        job.options["val"] = validation
        with pytest.raises(InputError, match=message):
            training.evaluate(job.write(), [f"path:pretrain_network_g={checkpoint}"])
    job.options["val"] = {"save_img": False}
    with pytest.raises(
        InputError, match=r"no entry 'emma'; it has params, params_ema, condiquant:"
    ):
        training.evaluate(
            job.write(), [f"path:pretrain_network_g={checkpoint}", "path:param_key_g=emma"]
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"val": None}, r"val=None: "),
        ({"datasets": {"test": None}}, r"datasets\.test=None is no section"),
        ({"datasets": {"test": {"dataroot_gt": "no"}}}, r"dataroot_gt=no is no folder"),
        ({"path": {}}, r"path\.pretrain_network_g is missing"),
    ],
)
def test_tests_refused_before_folders_are_made(job, change, message):
    job.options["path"]["pretrain_network_g"] = str(job.folder / "net.pth")
    del job.options["datasets"]["train"], job.options["train"]
    job.options |= change
    with pytest.raises(InputError, match=message):
        training.evaluate(job.write())
    assert not (job.folder / "results").exists()


def test_no_iterations_quantize_alone(job):
    del job.options["train"]["scheduler"]
    training.train(job.write(), ["train:total_iter=0"])
    assert len(re.findall("# psnr", job.log())) == 1
    assert job.checkpoint("latest").keys() == {"params", "params_ema", "condiquant"}


@pytest.mark.skipif(os.name == "nt", reason="process groups")
def test_a_signal_to_the_whole_job_saves_once(job):
    job.options["datasets"]["train"]["num_worker_per_gpu"] = 2
    job.options["train"]["total_iter"] = 10**6
    command = [sys.executable, "-m", "condiquant_recipes", "train", "-opt", str(job.write())]
    log, state = job.folder / "errors", job.experiment / "training_states" / "3.state"
    with started(command, log, start_new_session=True, stdout=subprocess.DEVNULL) as process:
        wait_for(state.is_file, process)
        workers = psutil.Process(process.pid).children(recursive=True)
        for worker in workers:
            worker.send_signal(signal.SIGINT)  # of which the process gets its own in test_jobs.py
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(60) == 1
    errors = log.read_text()
    assert errors.count("saving after this iteration") == 1
    assert errors.splitlines()[-1].endswith("interrupted: add --auto_resume to go on")
    last = max(int(state.stem) for state in job.experiment.glob("training_states/*"))
    assert f"net_g_{last}.pth" in {path.name for path in job.experiment.glob("models/*")}
    assert not any(worker.is_running() for worker in workers)
