"""``condiquant compare`` on a BasicSR training YAML: its datasets instead of a data folder."""

import json

import pytest
import skimage.data
import torch
from basicsr.utils.lmdb_util import make_lmdb_from_imgs

from condiquant_basicsr import matlab_downscale, read_image, training_crops, write_image
from condiquant_basicsr.data.images import to_tensor
from condiquant_recipes.recipe_files import find_recipe
from condiquant_recipes.source import load_source

METHOD = "condiquant-no-dqc-w4a4"


@pytest.fixture
def job(make_job, monkeypatch):
    """A job whose YAML is a training YAML: the training set in LMDBs, one validation set in folders."""
    monkeypatch.setenv("CI", "true")
    monkeypatch.delenv("CONDIQUANT_DATA", raising=False)
    job = make_job("compact")
    folders = [job.folder / "hr", job.folder / "lr"]
    for name, image in (
        ("cat", skimage.data.chelsea()[100:164, 150:230]),
        ("cup", skimage.data.coffee()[100:180, 200:264]),
    ):
        for folder, pixels in zip(folders, (image, matlab_downscale(image, 2)), strict=True):
            folder.mkdir(exist_ok=True)
            suffix = "x2" if folder.name == "lr" else ""
            write_image(folder / f"{name}{suffix}.png", to_tensor(pixels))
    for folder in folders:
        files = sorted(file.name for file in folder.iterdir())
        keys = [file.removesuffix(".png").removesuffix("x2") for file in files]
        make_lmdb_from_imgs(str(folder), f"{folder}.lmdb", files, keys)
    paired = {"type": "PairedImageDataset", "dataroot_gt": "hr", "dataroot_lq": "lr"}
    lmdb = paired | {"dataroot_gt": "hr.lmdb", "dataroot_lq": "lr.lmdb"}
    job.recipe = {
        "name": "train_compact_x2",
        "model_type": "CondiQuantModel",
        "scale": 2,
        "manual_seed": 0,
        "datasets": {
            "train": lmdb
            | {"name": "Photographs", "io_backend": {"type": "lmdb"}, "gt_size": 32}
            | {"use_hflip": True, "use_rot": True, "batch_size_per_gpu": 2},
            "val": paired
            | {"name": "Own", "filename_tmpl": "{}x2", "io_backend": {"type": "disk"}},
            "val_2": lmdb | {"name": "Packed", "io_backend": {"type": "lmdb"}},
        },
        "network_g": job.recipe["network_g"],
        "path": job.recipe["path"],
        "train": {"optim_g": {"type": "Adam", "lr": 1e-4}, "total_iter": 4},
        "condiquant": {"scope": "all", "calibration_images": 6, "bounds": {"crops": 4}},
    }
    return job


def test_datasets_of_the_yaml_are_calibrated_and_measured_on(job, condiquant):
    arguments = ("--out", job.out, "-q", "--methods", METHOD, "--set", "export.tile=32")
    printed = condiquant("compare", job.write(), *arguments)
    report = json.loads((job.out / "compare.json").read_text())
    assert report["recipe"] == "train_compact_x2"
    assert report["sets"] == ["Own", "Packed"]
    assert report["calibration"] == {"name": "Photographs", "count": 6, "crop": 16}
    assert report["distillation_iterations"] == 4
    for row in report["rows"]:
        assert row["reason"] is None
        assert row["psnr"]["Own"] == pytest.approx(row["psnr"]["Packed"])
    assert [row["id"] for row in report["rows"]] == ["float", METHOD]
    assert "Packed" in printed
    assert report["crops"]
    for crop in report["crops"]:  # the HR images of the section
        whole = read_image(job.folder / "hr" / f"{crop['image']}.png")
        window = whole[:, crop["y"] :, crop["x"] :][:, : crop["height"], : crop["width"]]
        assert torch.equal(read_image(job.out / crop["files"]["reference"]), window)


def test_crops_are_those_of_training_at_the_size_asked_for(job):
    recipe = find_recipe(job.write())
    source = load_source(recipe, job.data, ["Packed"])
    train, held_out = job.recipe["datasets"]["train"], recipe.datasets.calibration.held_out
    crops = training_crops(train, 2, 4 * 6 + held_out, seed=0)
    assert torch.equal(source.held_out, crops[-held_out:])
    drawn = crops[:-held_out]
    detail = drawn.diff(dim=2).abs().mean((1, 2, 3)) + drawn.diff(dim=3).abs().mean((1, 2, 3))
    assert torch.equal(source.crops, drawn[detail >= detail.sort().values[-6]])
    as_they_come = find_recipe(job.write(), ["datasets.calibration.drawn=1"])
    source = load_source(as_they_come, job.data, [])
    expected = training_crops(train, 2, 6 + held_out, seed=0)
    assert torch.equal(torch.cat([source.crops, source.held_out]), expected)
    larger = find_recipe(job.write(), ["datasets.calibration.crop=24"])
    assert load_source(larger, job.data, []).crops.shape == (6, 3, 24, 24)


def test_inspect_takes_the_yaml(job, condiquant):
    described = json.loads(condiquant("inspect", job.write(), "--json"))
    assert described["recipe"]["datasets"]["train"]["name"] == "Photographs"


@pytest.mark.parametrize(
    ("change", "arguments", "expected"),
    [
        ({}, ["--sets", "Set5"], "no validation set is named 'Set5'; there are: Own, Packed"),
        ({"model_type": "SRModel"}, [], "ignores the condiquant section"),
    ],
)
def test_bad_input(job, condiquant, change, arguments, expected):
    job.recipe |= change
    call = ("compare", job.write(), "--out", job.out, "-q", "--methods", METHOD, *arguments)
    assert expected in condiquant(*call, code=2)


def test_sets_without_hr_images_are_refused(job, condiquant):
    section = job.recipe["datasets"]["val"]
    del section["dataroot_gt"]
    section["type"] = "SingleImageDataset"
    message = condiquant("compare", job.write(), "--out", job.out, "-q", code=2)
    assert message.startswith("dataset Own: SingleImageDataset has no HR images: use Paired")
    del job.recipe["datasets"]["val"], job.recipe["datasets"]["val_2"]
    message = condiquant("compare", job.write(), "--out", job.out, "-q", code=2)
    assert message.endswith("or add datasets.val")
