import gc
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import pytest
import torch

from condiquant_basicsr.condiquant_model import CondiQuantModel
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
        options["condiquant"] |= {"autocast": True, "distillation": {"feature_weight": 0.1}}
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
