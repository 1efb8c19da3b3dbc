import gc
import json
import re
import shutil
import signal
import sys
from math import cos, pi
from pathlib import Path
from statistics import median

import cv2
import psutil
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from condiquant_basicsr.models.condiquant import CondiQuantModel
from condiquant_plugin import __version__
from condiquant_recipes.training.experiment import trained_network
from programs import started, wait_for
from training_job import TrainingJob, real_options

torch.set_num_threads(1)

CONFIGS = {
    "SwinIR/train_SwinIR_SRx4_scratch.yml": {
        "img_size": 16, "depths": [2], "num_heads": [2], "embed_dim": 24,
    },
    "EDSR/train_EDSR_Mx4.yml": {"num_feat": 8, "num_block": 2},
    "RCAN/train_RCAN_x2.yml": {
        "num_feat": 8, "num_group": 1, "num_block": 2, "squeeze_factor": 4,
    },
    "SRResNet_SRGAN/train_MSRResNet_x4.yml": {"num_feat": 8, "num_block": 2},
    "ESRGAN/train_RRDBNet_PSNR_x4.yml": {"num_feat": 8, "num_block": 1, "num_grow_ch": 4},
    "ECBSR/train_ECBSR_x4_m4c16_prelu.yml": {},
    "ECBSR/train_ECBSR_x4_m4c16_prelu_RGB.yml": {},
}  # fmt: skip


@pytest.fixture
def make_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda options=None: TrainingJob(tmp_path, options)


def psnrs(log: str) -> list[float]:
    return [float(value) for value in re.findall(r"# psnr: ([\d.]+)", log)]


@pytest.mark.parametrize("file", CONFIGS)
def test_a_real_config_trains_resumes_and_exports(file, make_training, condiquant, capsys):
    options = real_options(file)
    options["model_type"] = "CondiQuantModel"
    options["network_g"] |= CONFIGS[file]
    options["datasets"]["train"] |= {"gt_size": 16 * options["scale"], "batch_size_per_gpu": 2}
    options["train"]["total_iter"] = 3
    options["val"]["val_freq"] = options["logger"]["save_checkpoint_freq"] = 3
    options["logger"]["print_freq"] = 1
    options["condiquant"] = {"calibration_images": 4, "bounds": {"crops": 2}}
    if "SwinIR" in file:
        options["condiquant"] |= {
            "autocast": True,
            "transform": "auto",
            "distillation": {"feature_weight": 0.1},
        }
    else:
        options["condiquant"] |= {"scope": "all"}
    job = make_training(options)
    condiquant("train", "-opt", job.write())
    assert (job.experiment / "training_states" / "3.state").is_file()
    assert len(psnrs(job.log())) >= len(options["datasets"]) - 1

    gc.collect()  # a process opens an LMDB once
    condiquant("train", "-opt", job.write(), "--auto_resume", "--force_yml", "train:total_iter=4")
    assert "Resuming training from epoch" in job.log()
    assert "iter:       4" in job.log()

    report = json.loads(condiquant("export", job.experiment, "--tile", 16, "--static", "--json"))
    assert report["parity_mean_abs"] < 1e-5
    assert Path(report["file"]) == job.experiment / "model.xml"
    if options["network_g"].get("num_in_ch") == 1:
        what_one_channel_is_for(job, condiquant)


def test_a_gan_config_trains_its_generator(make_training, condiquant):
    options = real_options("SRResNet_SRGAN/train_MSRGAN_x4.yml")
    options["model_type"] = "CondiQuantModel"
    options["network_g"] |= {"num_feat": 8, "num_block": 1}
    options["datasets"]["train"] |= {"gt_size": 64, "batch_size_per_gpu": 1}
    options["train"]["total_iter"] = 2
    options["logger"]["print_freq"] = 1
    options["val"]["metrics"]["ssim"] = {"type": "calculate_ssim", "crop_border": 4}
    options["condiquant"] = {"scope": "all", "calibration_images": 4, "bounds": {"crops": 2}}
    job = make_training(options)
    out = condiquant("train", "-opt", job.write())
    assert "note: the generator alone is distilled: network_d, train.gan_opt, train.optim_d" in out
    assert len(re.findall(r"iter: +[12],.*l_pix: [\d.]+e", job.log())) == 2
    assert re.search(r"# psnr: [\d.]+.*\n.*# ssim: 0\.\d+", job.log())
    assert [file.stem for file in job.experiment.glob("models/*")] == ["net_g_latest"]
    (events,) = (job.folder / "tb_logger" / job.options["name"]).iterdir()
    scalars = EventAccumulator(str(events)).Reload().Tags()["scalars"]
    assert {"losses/l_pix", "metrics/Set14/psnr", "metrics/Set14/ssim"} <= set(scalars)


def what_one_channel_is_for(job, condiquant):
    described = json.loads(condiquant("inspect", job.write(), "--json"))
    assert described["architecture"] == "ECBSR"
    assert all(row["condition"] >= 1 for row in described["layers"])
    (image, *_), ir = (job.folder / "val" / "LR").iterdir(), job.experiment / "model.xml"
    alone = "takes 1-channel images, "
    for command, remedy in (
        (("compare", job.write(), "--out", "compared", "-q"), "use `condiquant train`, `test` and"),
        (("run", job.write(), "--out", "run", "-q"), "use `condiquant train`, `test` and `export`"),
        (("export", job.experiment, "--u8-nhwc", "--tile", 16), "leave out --u8-nhwc"),
        (("upscale", ir, image, "up.png"), "call condiquant_openvino.Upscaler on the channel"),
        (("evaluate", ir, "--data", ".", "--sets", ""), "call condiquant_openvino.Upscaler on the"),
    ):
        error = condiquant(*command, code=2)
        assert alone in error
        assert remedy in error


def test_training_needs_no_optimizer_scheduler_nor_validation(make_training, condiquant):
    job = make_training()
    for section, key in (("train", "optim_g"), ("train", "scheduler"), ("datasets", "val")):
        del job.options[section][key]
    del job.options["val"]
    job.options["condiquant"] |= {
        "autocast": True,
        "transform": "auto",
        "distillation": {"feature_weight": 0.5},
    }
    job.options["train"]["gan_opt"] = {"type": "GANLoss"}
    out = condiquant("train", "-opt", job.write(), "--debug")
    job.options["name"] = "debug_exp"
    log = job.log()
    assert "note: the generator alone is distilled: train.gan_opt" in out
    rates = [float(rate) for rate in re.findall(r"lr:\((.*?),\)", log)]
    network = job.checkpoint("latest")["params"]
    uppers = [v for n, v in network.items() if "weight" in n and n.endswith(".upper")]
    step = median(float(2 * upper.mean()) for upper in uppers) / 15
    assert rates == pytest.approx([0.01 * step * part for part in (1, 0.75, 0.25)], rel=0.02)
    assert len(re.findall("l_feat: [0-9]", log)) == 3


@pytest.mark.parametrize("scheduler", [None, "CosineAnnealingRestartLR"])
def test_a_finished_run_is_extended(make_training, condiquant, scheduler):
    job = make_training()
    job.options["train"]["scheduler"] = None
    del job.options["val"], job.options["datasets"]["val"]
    rates = []
    for iterations, resume in ((3, ()), (6, ("--auto_resume",))):
        if scheduler:
            periods = {"periods": [iterations], "restart_weights": [1]}
            job.options["train"]["scheduler"] = {"type": scheduler, **periods}
        job.options["train"]["total_iter"] = iterations
        condiquant("train", "-opt", job.write(), *resume)
        rates += [float(rate) for rate in re.findall(r"lr:\((.*?),\)", job.log())]
        job.forget_log()
    of_three, of_six = ([(1 + cos(pi * k / n)) / 2000 for k in range(n)] for n in (3, 6))
    assert rates == pytest.approx(of_three + of_six[3:], rel=1e-3)


def test_other_models_are_basicsrs_own(make_training, condiquant):
    job = make_training()
    job.options["model_type"] = "SRModel"
    del job.options["condiquant"]
    job.options["num_gpu"] = 1
    condiquant("train", "-opt", job.write())
    assert job.checkpoint("latest").keys() == {"params", "params_ema"}
    del job.options["path"]["pretrain_network_g"]
    job.options["path"]["ignore_resume_networks"] = ["network_g"]
    condiquant("train", "-opt", job.write(), "--auto_resume")
    assert "iter: 3." in job.log()


def test_a_launcher_is_needed_for_several_processes(make_training, condiquant):
    error = condiquant("train", "-opt", make_training().write(), "--launcher", "pytorch", code=2)
    assert "start with torchrun --nproc_per_node=2" in error


def test_resuming_continues_bit_for_bit(make_training, condiquant):
    job = make_training()
    without_chance(job)
    for kind in ("HR", "LR"):  # whatever the sampler draws is the same
        (job.folder / "train" / kind / "b.png").unlink()
    condiquant("train", "-opt", job.write(), "--force_yml", "train:total_iter=6", "name=whole")
    condiquant("train", "-opt", job.write())
    first = job.checkpoint(3)
    condiquant("train", "-opt", job.write(), "--auto_resume", "--force_yml", "train:total_iter=6")
    job.options["name"] = "whole"
    whole = job.checkpoint("latest")
    job.options["name"] = "exp"
    resumed = job.checkpoint("latest")
    assert whole.keys() == resumed.keys() == {"params", "params_ema", "condiquant"}
    for key in ("params", "params_ema"):
        assert all(torch.equal(resumed[key][n], t) for n, t in whole[key].items())
    assert any(not torch.equal(first["params"][n], t) for n, t in whole["params"].items())
    moved = [n for n, t in first["params"].items() if not torch.equal(t, whole["params"][n])]
    assert any(name.endswith(".lower") for name in moved)
    assert "body.0.conv1.weight" in moved
    assert "conv_first.weight" not in moved


def without_chance(job: TrainingJob) -> None:
    """Training images of the crops' size, as they are."""
    section = job.options["datasets"]["train"]
    section |= {"use_hflip": False, "use_rot": False, "dataset_enlarge_ratio": 2}
    for path in (job.folder / "train").glob("*/*.png"):
        size = section["gt_size"] // (job.scale if path.parent.name == "LR" else 1)
        cv2.imwrite(str(path), cv2.imread(str(path))[:size, :size])


def test_a_checkpoint_is_evaluated_as_it_was_validated(make_training, condiquant):
    job = make_training()
    condiquant("train", "-opt", job.write())
    latest = job.experiment / "models" / "net_g_latest.pth"
    for ema, key in ((None, "params_ema"), (False, "params")):
        state = trained_network(job.experiment, 3, ema)[1].state_dict()
        assert all(torch.equal(t, state[n]) for n, t in job.checkpoint(3)[key].items())
    write_test_options(job, latest)
    condiquant("test", "-opt", job.write())
    assert psnrs(evaluation_log(job)) == psnrs(job.log())[-1:]

    assert "condiquant.weight_bits=4, the options have 3" in condiquant(
        "test", "-opt", job.write(), "--force_yml", "condiquant:weight_bits=3", "num_gpu=0", code=2
    )
    content = job.checkpoint("latest")
    assert str(job.folder) not in repr(content["condiquant"])
    content["condiquant"]["version"] = "9.9"
    content["condiquant"]["recipe"]["condiquant"]["dithering"] = "up"
    torch.save(content, latest)
    for command in (("export", job.experiment), ("test", "-opt", job.write())):
        error = condiquant(*command, code=2)
        assert f"{latest} was saved by version 9.9 and this is {__version__}, which does" in error
        assert "(unknown key condiquant.dithering: " in error
    write_test_options(job, job.folder / "net.pth")
    error = condiquant("test", "-opt", job.write(), code=2)
    assert "holds a float network: quantize it with `condiquant train`" in error


def write_test_options(job: TrainingJob, checkpoint: Path) -> None:
    validation = job.options["datasets"].get("val") or job.options["datasets"]["test_1"]
    job.options["datasets"] = {"test_1": validation}
    job.options["path"]["pretrain_network_g"] = str(checkpoint)
    job.options.pop("condiquant", None)
    job.options.pop("train", None)


def evaluation_log(job: TrainingJob) -> str:
    (log,) = (job.folder / "results" / job.options["name"]).glob("test_*.log")
    return log.read_text()


def test_states_and_checkpoints_of_something_else_are_refused(make_training, condiquant):
    job = make_training()
    condiquant("train", "-opt", job.write())
    resume = ("train", "-opt", job.write(), "--auto_resume", "--force_yml")
    assert "has condiquant.activation_bits=4, the options have 2: change them" in condiquant(
        *resume, "condiquant:activation_bits=2", code=2
    )
    assert "does not fit this network and its train section" in condiquant(
        *resume, "condiquant:distillation:weights=false", code=2
    )
    other = torch.load(job.folder / "net.pth", weights_only=True)["params"]
    torch.save({name: 1.01 * tensor for name, tensor in other.items()}, job.folder / "other.pth")
    assert "net_g_3.pth follows another float network than" in condiquant(
        *resume, f"path:pretrain_network_g={job.folder / 'other.pth'}", code=2
    )
    job.options["network_g"]["num_block"] = 1
    job.set_weights("other.pth")
    assert "has network_g.num_block=2, the options have 1" in condiquant(
        "train", "-opt", job.write(), "--auto_resume", code=2
    )
    state = job.experiment / "training_states" / "3.state"
    assert "resume with the name of its experiment" in condiquant(
        "train",
        "-opt",
        job.write(),
        "--force_yml",
        f"path:resume_state={state}",
        "name=new",
        code=2,
    )
    quantized = job.experiment / "models" / "net_g_3.pth"
    assert "net_g_3.pth is no training state: give a .state file" in condiquant(
        "train", "-opt", job.write(), "--force_yml", f"path:resume_state={quantized}", code=2
    )
    job.options["path"]["pretrain_network_g"] = str(quantized)
    anew = ("train", "-opt", job.write(), "--force_yml")
    assert "is quantized already" in condiquant(*anew, "name=new", code=2)
    in_the_way = shutil.copy(job.folder / "other.pth", job.experiment / "models")
    assert "which BasicSR renames to start anew" in condiquant(
        *anew, "name=exp", f"path:pretrain_network_g={in_the_way}", code=2
    )
    assert "no net_g_7.pth; iterations: 3" in condiquant(
        "export", job.experiment, "--iteration", 7, code=2
    )


def test_an_interrupt_leaves_a_state_to_resume_from(make_training, condiquant, monkeypatch):
    job = make_training()
    steps = []

    def interrupted(model):
        steps.append(None)
        if len(steps) == 1:
            signal.raise_signal(signal.SIGINT)
        return type(model).__bases__[0].get_current_log(model)

    with monkeypatch.context() as patch:
        patch.setattr(CondiQuantModel, "get_current_log", interrupted)
        before = signal.getsignal(signal.SIGINT)
        error = condiquant("train", "-opt", job.write(), code=1)
        assert signal.getsignal(signal.SIGINT) is before
    assert error == "interrupted: add --auto_resume to go on"
    assert [state.name for state in job.experiment.glob("training_states/*")] == ["2.state"]
    condiquant("train", "-opt", job.write(), "--auto_resume")
    assert "iter: 2." in job.log()
    assert job.checkpoint("latest")


def test_two_processes_train_as_one_and_survive_the_end_of_one(make_training, condiquant):
    job = make_training()
    without_chance(job)
    section = job.options["datasets"]["train"] | {"dataset_enlarge_ratio": 100}
    job.options["datasets"]["train"] = section | {"batch_size_per_gpu": 2}
    job.options["val"] |= {"val_freq": 2, "save_img": True}
    job.options["logger"]["save_checkpoint_freq"] = 2
    condiquant("train", "-opt", job.write(), "--force_yml", "train:total_iter=2", "name=alone")
    alone = torch.load(
        job.folder / "experiments" / "alone" / "models" / "net_g_2.pth", weights_only=True
    )
    (log_alone,) = (job.folder / "experiments" / "alone").glob("train_*.log")

    job.options["train"]["total_iter"] = 10**6
    job.options["datasets"]["train"] = section | {"num_worker_per_gpu": 1}
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "condiquant_recipes", "train", "-opt", job.write(), "--launcher", "pytorch"]
    log = job.folder / "errors"
    with started([sys.executable, *command], log) as launched:
        states = job.experiment / "training_states"
        wait_for(lambda: (states / "4.state").is_file(), launched)
        ranks = {c.environ().get("RANK"): c for c in psutil.Process(launched.pid).children()}
        (server,) = (c for c in ranks["1"].children() if "forkserver" in " ".join(c.cmdline()))
        orphans = [server, *server.children()]
        ranks["1"].kill()
        assert launched.wait(60) != 0
    assert len(orphans) >= 2  # those of a validation may be on their way out
    assert not psutil.wait_procs(orphans, timeout=20)[1]
    (line,) = [line for line in log.read_text().splitlines() if "condiquant: error" in line]
    assert line.endswith(
        "another process ended training: look at its log, then run again with --auto_resume"
    )

    validated = psnrs(job.log())[0]
    assert validated == pytest.approx(psnrs(log_alone.read_text())[0], abs=1e-3)
    together = job.checkpoint(2)
    for key in ("params", "params_ema"):
        for name, tensor in alone[key].items():
            torch.testing.assert_close(together[key][name], tensor, atol=1e-5, rtol=1e-4, msg=name)
    shown = {name: cv2.imread(str(path)) for name, path in images(job, "visualization", 2).items()}
    last = max(int(state.stem) for state in states.glob("*.state"))
    overrides = (f"train:total_iter={last + 1}", "val:val_freq=1000")
    condiquant("train", "-opt", job.write(), "--auto_resume", "--force_yml", *overrides)
    assert f"iter: {last}." in job.log()

    write_test_options(job, job.experiment / "models" / "net_g_2.pth")
    condiquant("test", "-opt", job.write())
    assert psnrs(evaluation_log(job)) == [validated]
    assert shown.keys() == {"c", "d", "e"}
    for name, image in shown.items():  # of both processes' networks
        path = job.folder / "results" / "exp" / "visualization" / "Tiny" / f"{name}_exp.png"
        assert (cv2.imread(str(path)) == image).all()


def images(job: TrainingJob, folder: str, iteration: int) -> dict[str, Path]:
    found = (job.experiment / folder).glob(f"*/*_{iteration}.png")
    return {path.parent.name: path for path in found}
