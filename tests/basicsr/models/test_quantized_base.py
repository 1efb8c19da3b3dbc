"""A model of its own, without a teacher, in BasicSR's real pipeline: a binarized network."""

import os
import re
import sys

import pytest
import torch
from basicsr.models import build_model
from basicsr.test import test_pipeline as run_tests
from basicsr.train import train_pipeline
from basicsr.utils.registry import MODEL_REGISTRY
from torch import nn
from torch.nn.utils import parametrize

from condiquant_basicsr import QuantizedModel
from condiquant_basicsr.training import _close_log
from training_job import TrainingJob

torch.set_num_threads(1)


class Sign(nn.Module):
    """Two levels per output channel, trained straight through (XNOR-Net's weights)."""

    def forward(self, weight):
        level = weight.abs().mean(dim=(1, 2, 3), keepdim=True)
        return weight + (level * weight.sign() - weight).detach()


class BinarizedModel(QuantizedModel):
    """Trains ``network_g`` with binary weights in its body, against HR images."""

    def with_quantizers(self, network):
        for layer in network.body.modules():
            if isinstance(layer, nn.Conv2d):
                parametrize.register_parametrization(layer, "weight", Sign())
        return network

    def checkpoint_entries(self):
        return {"binarized": {"bits": 1}}


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(MODEL_REGISTRY._obj_map, "BinarizedModel", BinarizedModel)
    job = TrainingJob(tmp_path)
    del job.options["condiquant"]
    job.options["model_type"] = "BinarizedModel"
    yield job
    _close_log()


def train(monkeypatch, job: TrainingJob, *more: str) -> None:
    _close_log()
    monkeypatch.setattr(sys, "argv", ["train.py", "-opt", str(job.write()), *more])
    train_pipeline(os.getcwd())


def test_a_binarized_network_trains_validates_and_saves_without_a_teacher(job, monkeypatch):
    job.options["path"]["pretrain_network_g"] = None
    train(monkeypatch, job)
    log = job.log()
    assert re.findall(r"(l_\w+): \d\.\d+e", log) == ["l_pix"] * 3
    validated = re.findall(r"# psnr: ([\d.]+)", log)
    assert len(validated) == 2
    saved = job.checkpoint("latest")
    assert saved.keys() == {"params", "params_ema", "binarized"}
    assert saved["binarized"] == {"bits": 1}
    name = "body.0.conv1.parametrizations.weight.original"
    assert not torch.equal(saved["params"][name], saved["params_ema"][name])
    assert not list(job.experiment.rglob(".*"))

    train(monkeypatch, job, "--auto_resume")
    resumed = job.checkpoint("latest")
    for key in ("params", "params_ema"):
        assert all(torch.equal(resumed[key][n], t) for n, t in saved[key].items())
    train(monkeypatch, job, "--auto_resume", "--force_yml", "train:total_iter=5")
    assert "iter:       5" in job.log()
    assert not torch.equal(job.checkpoint("latest")["params"][name], saved["params"][name])

    job.options["datasets"] = {"test": job.options["datasets"]["val"]}
    job.options["path"]["pretrain_network_g"] = str(job.experiment / "models" / "net_g_3.pth")
    _close_log()
    monkeypatch.setattr(sys, "argv", ["test.py", "-opt", str(job.write())])
    run_tests(os.getcwd())
    (tested,) = (job.folder / "results" / "exp").glob("test_*.log")
    assert re.findall(r"# psnr: ([\d.]+)", tested.read_text()) == validated[:1]


def test_weights_are_loaded_and_levels_are_two(job, monkeypatch):
    opt = job.options | {"is_train": True, "rank": 0, "dist": False, "num_gpu": 0}
    model = build_model(opt)
    trained = torch.load(job.folder / "net.pth", weights_only=True)["params"]
    loaded = model.net_g.body[0].conv1.parametrizations.weight.original
    assert torch.equal(loaded, trained["body.0.conv1.weight"])
    for row, before in zip(model.net_g.body[0].conv1.weight, loaded, strict=True):
        torch.testing.assert_close(row, before.abs().mean() * before.sign())
    image = torch.rand(1, 3, 17, 23)
    model.feed_data({"lq": image})
    model.net_g.train()
    model.test()
    assert model.output.shape == (1, 3, 34, 46)
    assert model.net_g.training
