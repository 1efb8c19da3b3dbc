"""A tiny real job: a BasicSR network with saved weights, photographs, a recipe."""

import logging
import shutil
import sys
from copy import copy, deepcopy
from pathlib import Path

import pytest
import skimage.data
import torch
import yaml
from filelock import FileLock

from condiquant_basicsr import write_image
from condiquant_openvino.parity import check
from condiquant_recipes import cli
from condiquant_recipes.recipe import load_recipe
from condiquant_recipes.run import run
from networks import SECTIONS, build


class Job:
    """Folder with weights, data and a recipe; ``write`` changes the recipe."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.data, self.out = folder, folder / "data", folder / "out"
        torch.save({"params": build(name).state_dict()}, folder / "net.pth")
        photograph = torch.from_numpy(skimage.data.chelsea().copy()).permute(2, 0, 1) / 255
        write_image_to(self.data / "calibration" / "a.png", photograph[:, :128, :160])
        write_image_to(self.data / "calibration" / "b.png", photograph[:, 100:250, 100:300])
        write_image_to(self.data / "Tiny" / "HR" / "cat.png", photograph[:, 100:180, 150:230])
        size = 32 if name == "dat" else 16
        self.recipe: dict = {
            "name": "tiny",
            "scale": 2,
            "network_g": SECTIONS[name],
            "path": {"pretrain_network_g": str(folder / "net.pth")},
            "datasets": {
                "calibration": {
                    "folders": ["calibration"], "count": 6, "drawn": 1, "held_out": 2,
                    "crop": size,
                },
                "test": ["Tiny"],
            },
            "condiquant": {
                "scope": "transformer" if name in ("swinir", "dat") else "all",
                "bounds": {"crops": 4},
                "distillation": {"iterations": 6, "validate_every": 2},
            },
            "export": {"tile": 24 if name == "swinir" else 32, "static": name == "dat", "isa": "vnni"},
        }  # fmt: skip

    def write(self) -> Path:
        path = self.folder / "recipe.yml"
        path.write_text(yaml.safe_dump(self.recipe))
        return path

    def copied_to(self, folder: Path) -> "Job":
        """The same job with results of its own; weights and photographs stay where they are."""
        job = copy(self)
        job.recipe, job.folder, job.out = deepcopy(self.recipe), folder, folder / "out"
        shutil.copytree(self.out, job.out)
        return job


def write_image_to(path: Path, image: torch.Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, image)


@pytest.fixture(autouse=True)
def _own_instruction_set_alone(request, monkeypatch):
    """Lower sets are checked where ``lower_sets`` asks for it, and in tests/openvino/parity."""
    if request.node.get_closest_marker("lower_sets") is None:
        monkeypatch.setattr(check, "lower_instruction_sets", list)


@pytest.fixture(autouse=True)
def _log_of_nncf():
    """As it was: the application makes it quiet."""
    logger = logging.getLogger("nncf")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture
def make_job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def make(name: str = "swinir") -> Job:
        return Job(tmp_path, name)

    return make


@pytest.fixture(scope="session")
def _finished_jobs(tmp_path_factory, worker_id):
    """Each job runs once for all workers."""
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent

    def find(name, export):
        key = "-".join([name, *(f"{key}={value}" for key, value in export.items())])
        folder = shared / f"finished-{key}"
        with FileLock(f"{folder}.lock"):
            ran = (folder / "out" / "metrics.json").exists()
            folder.mkdir(exist_ok=True)
            job = Job(folder, name)
            job.recipe["export"] = export or job.recipe["export"]
            if not ran:
                run(load_recipe(job.write()), job.data, job.out)
        return job

    return find


@pytest.fixture
def finished_job(tmp_path, monkeypatch, _finished_jobs):
    """``finished_job(NAME, KEY=VALUE)``: copy of a job that ran; any keys are all of its export section."""
    monkeypatch.chdir(tmp_path)

    def copied(name: str = "compact", **export) -> Job:
        return _finished_jobs(name, export).copied_to(tmp_path)

    return copied


@pytest.fixture
def condiquant(monkeypatch, capsys):
    """``condiquant(ARGUMENTS)``: what it prints; with ``code=2`` its error line, alone but for a log."""

    def call(*arguments, code=0):
        monkeypatch.setattr(sys, "argv", ["condiquant", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        captured = capsys.readouterr()
        assert exit_info.value.code == code, captured.err
        if code == 0:
            return captured.out
        lines = captured.err.splitlines()
        errors = [line for line in lines if line.startswith("condiquant: error: ")]
        assert errors == lines[-1:]
        if arguments[0] not in ("train", "test"):
            assert captured.out == ""
            assert lines == errors
        return errors[0].removeprefix("condiquant: error: ")

    return call
