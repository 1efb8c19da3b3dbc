"""Calibration crops and validation images, read by BasicSR's own datasets."""

import logging
import random
import shutil

import numpy as np
import pytest
import skimage.data
import torch
from basicsr.data import build_dataset
from basicsr.utils.lmdb_util import make_lmdb_from_imgs

from condiquant_basicsr import (
    matlab_downscale,
    read_image,
    training_crops,
    validation_pairs,
    write_image,
)
from condiquant_basicsr.data.images import to_tensor
from condiquant_plugin.errors import InputError


@pytest.fixture
def train(tmp_path):
    """``datasets.train`` of three pairs x2 in folders."""
    for name, image in (
        ("b", skimage.data.astronaut()[:80, :96]),
        ("a", skimage.data.chelsea()[:64, :72]),
        ("c", skimage.data.coffee()[:70, :64]),
    ):
        for folder, pixels in (("hr", image), ("lr", matlab_downscale(image, 2))):
            (tmp_path / folder).mkdir(exist_ok=True)
            write_image(tmp_path / folder / f"{name}.png", to_tensor(pixels))
    return {
        "name": "Photographs",
        "type": "PairedImageDataset",
        "dataroot_gt": str(tmp_path / "hr"),
        "dataroot_lq": str(tmp_path / "lr"),
        "filename_tmpl": "{}",
        "io_backend": {"type": "disk"},
        "gt_size": 32,
        "use_hflip": True,
        "use_rot": True,
    }


@pytest.fixture
def lmdb(train, tmp_path):
    for folder in ("hr", "lr"):
        files = sorted(file.name for file in (tmp_path / folder).iterdir())
        make_lmdb_from_imgs(
            str(tmp_path / folder), str(tmp_path / f"{folder}.lmdb"), files, [f[:-4] for f in files]
        )
    roots = {f"dataroot_{k}": train[f"dataroot_{k}"] + ".lmdb" for k in ("gt", "lq")}
    return train | roots | {"io_backend": {"type": "lmdb"}}


def states():
    numpy = np.random.get_state()[1]  # noqa: NPY002
    return random.getstate(), numpy.tolist(), torch.get_rng_state().tolist()


def test_crops_depend_on_the_section_and_the_seed_alone(train, tmp_path):
    section = {**train, "io_backend": dict(train["io_backend"])}
    before, handlers = states(), list(logging.getLogger("basicsr").handlers)
    crops = training_crops(train, 2, 8, seed=0)
    assert states() == before
    assert train == section
    assert logging.getLogger("basicsr").handlers == handlers  # which training gives its file later
    assert crops.shape == (8, 3, 16, 16)
    assert 0 <= crops.min() < crops.max() <= 1
    random.seed(5)
    torch.manual_seed(5)
    assert torch.equal(training_crops(train, 2, 8, seed=0), crops)
    assert not torch.equal(training_crops(train, 2, 8, seed=1), crops)
    assert torch.equal(training_crops(train, 2, 3, seed=0), crops[:3])
    assert len({crop.numpy().tobytes() for crop in crops}) == 8

    moved = tmp_path / "moved"
    for folder in ("hr", "lr"):  # written in another order: scandir may list it in another
        (moved / folder).mkdir(parents=True)
        for name in ("c", "a", "b"):
            shutil.copy(tmp_path / folder / f"{name}.png", moved / folder)
    roots = {"dataroot_gt": str(moved / "hr"), "dataroot_lq": str(moved / "lr")}
    assert torch.equal(training_crops(train | roots, 2, 8, seed=0), crops)


def test_crops_are_those_of_training(train):
    """Every crop is a window of an LR image, turned or not as the section says."""
    images = {name: read_image(f"{train['dataroot_lq']}/{name}.png") for name in "abc"}
    windows = {
        image[:, y : y + 16, x : x + 16].numpy().tobytes(): name
        for name, image in images.items()
        for y in range(image.shape[1] - 15)
        for x in range(image.shape[2] - 15)
    }
    plain = training_crops(train | {"use_hflip": False, "use_rot": False}, 2, 7, seed=0)
    names = [windows[crop.numpy().tobytes()] for crop in plain]
    assert sorted(names[:3]) == sorted(names[3:6]) == ["a", "b", "c"]
    augmented = training_crops(train, 2, 7, seed=0)
    assert any(crop.numpy().tobytes() not in windows for crop in augmented)
    turned = {
        view.contiguous().numpy().tobytes()
        for crop in augmented
        for turn in range(4)
        for view in (crop.rot90(turn, (1, 2)), crop.rot90(turn, (1, 2)).flip(2))
    }
    assert len(turned & windows.keys()) >= 7


def test_a_section_in_y_gives_one_channel(train):
    crops = training_crops(train | {"color": "y"}, 2, 4, seed=0)
    assert crops.shape == (4, 1, 16, 16)
    assert 0 < crops.min() < crops.max() < 1


def test_lmdb_gives_the_crops_of_the_folders_and_is_closed(train, lmdb, tmp_path):
    crops = training_crops(train, 2, 5, seed=0)
    assert torch.equal(training_crops(lmdb, 2, 5, seed=0), crops)
    sample = build_dataset(lmdb | {"phase": "train", "scale": 2})[0]  # as training does next
    assert sample["lq"].shape == (3, 16, 16)


@pytest.mark.parametrize("folders", [("hr",), ("hr", "lr")])
def test_files_that_are_no_pictures_are_skipped(train, tmp_path, caplog, folders):
    expected = training_crops(train, 2, 4, seed=0)
    for folder in folders:
        (tmp_path / folder / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
        (tmp_path / folder / "._a.png").write_bytes(b"\0\5\x16\7")
        (tmp_path / folder / "page.png").write_bytes(b"<html>")
    assert torch.equal(training_crops(train, 2, 4, seed=0), expected)
    assert [pair.name for pair in validation_pairs(train)] == ["a", "b", "c"]
    validation_pairs(train)[0].load(2)
    assert len(caplog.messages) == len(folders)
    for folder in ("hr", "lr"):
        for file in (tmp_path / folder).glob("[abc].png"):
            file.unlink()
    with pytest.raises(InputError, match=r"no images in .*give folders of images"):
        training_crops(train, 2, 4, seed=0)


def test_meta_info_and_template_choose_the_pairs(train, tmp_path):
    for name in "abc":
        (tmp_path / "lr" / f"{name}.png").rename(tmp_path / "lr" / f"{name}x2.png")
    (tmp_path / "meta.txt").write_text("b.png (80,96,3)\nc.png (70,64,3)\n")
    section = train | {
        "meta_info_file": str(tmp_path / "meta.txt"),
        "filename_tmpl": "{}x2",
        "use_hflip": False,
        "use_rot": False,
    }
    assert training_crops(section, 2, 4, seed=0).shape == (4, 3, 16, 16)
    assert [pair.name for pair in validation_pairs(section)] == ["b", "c"]


@pytest.mark.parametrize("backend", ["train", "lmdb"])
def test_validation_pairs_are_whole_images(backend, request, train, tmp_path):
    section = request.getfixturevalue(backend)
    pairs = validation_pairs(section)
    assert [pair.name for pair in pairs] == ["a", "b", "c"]
    for pair in (pairs[2], pairs[0], pairs[0]):
        lr, hr = pair.load(2)
        assert torch.equal(lr, read_image(tmp_path / "lr" / f"{pair.name}.png"))
        assert torch.equal(hr, read_image(tmp_path / "hr" / f"{pair.name}.png"))
    write_image(tmp_path / "hr" / "a.png", torch.zeros(3, 67, 73))
    if backend == "train":
        assert pairs[0].load(2)[1].shape == (3, 64, 72)
        write_image(tmp_path / "hr" / "a.png", torch.zeros(3, 64, 71))
        with pytest.raises(InputError, match="a: 71x64 is too small for its x2 LR image of 36x32"):
            pairs[0].load(2)


def test_bad_sections_end_in_one_line(train, lmdb, tmp_path):
    def refused(match, changes, without=(), count=3):
        section = {k: v for k, v in (train | changes).items() if k not in without}
        with pytest.raises(InputError, match=match) as info:
            training_crops(section, 2, count, seed=0)
        assert str(info.value).startswith("dataset Photographs: ")
        assert "\n" not in str(info.value)

    (tmp_path / "empty").mkdir()
    empty, absent = str(tmp_path / "empty"), str(tmp_path / "absent")
    refused(f"dataroot_lq={absent} is no folder: give", {"dataroot_lq": absent})
    refused("dataroot_gt=None is no folder: give", {"dataroot_gt": None})
    refused("key 'dataroot_lq' is missing: add it", {}, without=["dataroot_lq"])
    refused("key 'gt_size' is missing: add it", {}, without=["gt_size"])
    refused("key 'use_rot' is missing: add it", {}, without=["use_rot"])
    refused("key 'io_backend' is missing: add it", {}, without=["io_backend"])
    refused(f"no images in dataroot_gt={empty}", {"dataroot_gt": empty, "dataroot_lq": empty})
    refused(f"number of images: 3, 0. .*{empty}", {"dataroot_gt": empty})
    refused(r"ax4\.png is not in lq_paths.*filename_tmpl", {"filename_tmpl": "{}x4"})
    refused("meta_info_file=absent.txt does not exist: give", {"meta_info_file": "absent.txt"})
    refused("gt_size=33 is no multiple of scale=2", {"gt_size": 33})
    refused("LQ .* smaller than patch size .*remove .* or set gt_size=80 smaller", {"gt_size": 80})
    refused(
        r"[abc]\.png.*Scale mismatches.*crop HR images to scale=2",
        {"dataroot_lq": train["dataroot_gt"]},
    )
    refused("unknown type 'PairedDataset': use Paired", {"type": "PairedDataset"})
    refused("RealESRGANDataset has no LR images", {"type": "RealESRGANDataset"})
    refused("no .lmdb folder .*create_lmdb", {"io_backend": {"type": "lmdb"}})
    refused("cannot use .*mdb.*repair", lmdb | {"dataroot_lq": broken_lmdb(lmdb)})
    (tmp_path / "meta.txt").write_text("d.png (64,64,3)\n")
    refused(r"No such file.*d\.png", {"meta_info_file": str(tmp_path / "meta.txt")})
    (tmp_path / "lr" / "a.png").write_bytes(b"no image")
    refused(r"images: 2, 3.*no pictures, repair or remove them: .*lr/a\.png$", {})
    whole = (tmp_path / "lr" / "b.png").read_bytes()
    (tmp_path / "lr" / "a.png").write_bytes(whole[:20])
    refused(r"cannot use .*a\.png.*repair", {})


def broken_lmdb(section):
    folder = section["dataroot_lq"].replace("lr.lmdb", "broken.lmdb")
    shutil.copytree(section["dataroot_lq"], folder)
    with open(f"{folder}/data.mdb", "wb") as file:
        file.write(b"no database")
    return folder


def test_sets_that_cannot_be_compared(train, tmp_path):
    single = {k: v for k, v in train.items() if k != "dataroot_gt"} | {"type": "SingleImageDataset"}
    with pytest.raises(InputError, match="SingleImageDataset has no HR images: use Paired"):
        validation_pairs(single)
    with pytest.raises(InputError, match="color: only RGB"):
        validation_pairs(train | {"color": "y"})
    (tmp_path / "meta.txt").write_text("a.png (1,1,3)\nother/a.png (1,1,3)\n")
    with pytest.raises(InputError, match="two images have one name, a"):
        validation_pairs(train | {"meta_info_file": str(tmp_path / "meta.txt")})
