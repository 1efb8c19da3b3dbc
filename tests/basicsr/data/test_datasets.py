import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from condiquant_basicsr import matlab_downscale, read_image, write_image
from condiquant_basicsr.data import datasets
from condiquant_basicsr.data.images import to_tensor, to_uint8
from condiquant_plugin.errors import InputError


def test_crops_are_seeded_and_do_not_depend_on_the_place(photographs, tmp_path):
    crops = datasets.calibration_crops([photographs], 4, 16, 5, seed=0)
    assert crops.shape == (5, 3, 16, 16)
    assert 0 <= crops.min() < crops.max() <= 1
    moved = shutil.copytree(photographs, tmp_path / "moved")
    assert torch.equal(crops, datasets.calibration_crops([moved], 4, 16, 5, seed=0))
    assert torch.equal(crops[:2], datasets.calibration_crops([moved], 4, 16, 2, seed=0))
    assert not torch.equal(crops, datasets.calibration_crops([photographs], 4, 16, 5, seed=1))


def test_images_are_drawn_once_before_any_is_drawn_again(tmp_path):
    for level in range(5):
        write_image(tmp_path / f"{level}.png", torch.full((3, 20, 20), level / 255))
    crops = datasets.calibration_crops([tmp_path], 2, 8, 12, seed=3)
    levels = crops[:, 0, 0, 0].mul(255).round().int().tolist()
    assert sorted(levels[:5]) == sorted(levels[5:10]) == [0, 1, 2, 3, 4]
    assert len(set(levels[10:])) == 2


def test_crop_of_a_whole_image_is_its_reduction(tmp_path, photograph):
    write_image(tmp_path / "image.png", to_tensor(photograph[:48, :48]))
    crop = datasets.calibration_crops([tmp_path], 3, 16, 1, seed=0)[0]
    assert torch.equal(crop, to_tensor(matlab_downscale(photograph[:48, :48], 3)))


def test_unusable_calibration_folders(tmp_path, photographs):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.txt").write_text("no image")
    with pytest.raises(InputError, match="no calibration images"):
        datasets.calibration_crops([empty], 2, 8, 1, seed=0)
    with pytest.raises(InputError, match="no such folder"):
        datasets.calibration_crops([tmp_path / "absent"], 2, 8, 1, seed=0)
    with pytest.raises(InputError, match=r"coffee\.png: 220x150 .* 160x160"):
        datasets.calibration_crops([photographs], 4, 40, 3, seed=0)


NO_PICTURES = {
    "._a.png": b"\0\5\x16\7\0\2\0\0Mac OS X",
    ".DS_Store": b"\0\0\0\1Bud1",
    "page.jpg": b"<!DOCTYPE html><html>",
    "download.png": b"",
    "._b.TIFF": b"\0\5\x16\7",
}


def test_files_that_are_no_pictures_are_skipped_with_one_line(photographs, caplog):
    expected = datasets.calibration_crops([photographs], 2, 16, 4, seed=0)
    for name, content in NO_PICTURES.items():
        (photographs / name).write_bytes(content)
    assert torch.equal(datasets.calibration_crops([photographs], 2, 16, 4, seed=0), expected)
    assert len(caplog.messages) == 1
    assert "no pictures (4): ._a.png, ._b.TIFF, download.png, ..." in caplog.messages[0]
    assert str(photographs) in caplog.messages[0]
    for file in photographs.glob("[a-c]*.png"):
        file.unlink()
    with pytest.raises(InputError, match=r"no calibration images in .*: give a folder of images"):
        datasets.calibration_crops([photographs], 2, 16, 4, seed=0)


def test_a_broken_picture_is_named_not_skipped(photographs):
    whole = (photographs / "coffee.png").read_bytes()
    (photographs / "coffee.png").write_bytes(whole[:20])
    with pytest.raises(InputError, match=r"coffee\.png is no readable image"):
        datasets.calibration_crops([photographs], 2, 16, 3, seed=0)


def test_a_photograph_held_upright_gives_upright_crops(tmp_path, photograph):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "Two" / "HR").mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "Two" / "HR"):
        turned = Image.fromarray(np.rot90(photograph[:32, :48]).copy())
        turned.save(folder / "a.png", exif=exif)
    (pair,) = datasets.test_pairs(tmp_path, "Two", 2)
    lr, hr = pair.load(2)
    assert torch.equal(hr, to_tensor(photograph[:32, :48]))
    assert lr.shape == (3, 16, 24)
    crop = datasets.calibration_crops([tmp_path], 1, 32, 1, seed=0)[0]
    assert any(torch.equal(crop, hr[:, :, left : left + 32]) for left in range(17))


@pytest.fixture
def test_set(tmp_path, photograph):
    folder = tmp_path / "data" / "Two" / "HR"
    folder.mkdir(parents=True)
    for name, image in (("b", photograph[:41, :50]), ("a", photograph[100:130, :33])):
        write_image(folder / f"{name}.png", to_tensor(image))
    return folder.parent


def test_missing_lr_images_are_made(test_set):
    pairs = datasets.test_pairs(test_set.parent, "Two", 4)
    assert [(pair.name, pair.lr) for pair in pairs] == [("a", None), ("b", None)]
    lr, hr = pairs[1].load(4)
    assert lr.shape == (3, 10, 12)
    assert hr.shape == (3, 40, 48)
    full = read_image(test_set / "HR" / "b.png")
    assert torch.equal(hr, full[:, :40, :48])
    assert np.array_equal(to_uint8(lr), matlab_downscale(to_uint8(full), 4))


def test_a_test_set_has_its_pictures_alone(test_set):
    for name, content in NO_PICTURES.items():
        (test_set / "HR" / name).write_bytes(content)
    assert [pair.name for pair in datasets.test_pairs(test_set.parent, "Two", 4)] == ["a", "b"]
    for file in (test_set / "HR").glob("[ab].png"):
        file.unlink()
    with pytest.raises(InputError, match=r"no images in .*HR"):
        datasets.test_pairs(test_set.parent, "Two", 4)


def test_lr_images_at_hand_are_used(test_set):
    folder = test_set / "LR_bicubic" / "X2"
    folder.mkdir(parents=True)
    write_image(folder / "ax2.png", torch.full((3, 15, 16), 0.2))
    with pytest.raises(InputError, match=r"bx2\.png"):
        datasets.test_pairs(test_set.parent, "Two", 2)
    write_image(folder / "bx2.png", torch.full((3, 30, 25), 0.2))
    first, second = datasets.test_pairs(test_set.parent, "Two", 2)
    lr, hr = first.load(2)
    assert lr.mul(255).unique().item() == 51
    assert hr.shape == (3, 30, 32)
    with pytest.raises(InputError, match="50x41 is too small"):
        second.load(2)


def test_names_differ_in_more_than_the_suffix(test_set):
    write_image(test_set / "HR" / "a.k.png", torch.zeros(3, 8, 8))
    (first,) = (test_set / "HR").glob("a.png")
    (test_set / "HR" / "a.jpg").write_bytes(first.read_bytes())
    with pytest.raises(InputError, match=r"a\.jpg and a\.png have one name: rename one"):
        datasets.test_pairs(test_set.parent, "Two", 4)


def test_unknown_set_names_those_at_hand(test_set, tmp_path):
    with pytest.raises(InputError, match=r"'Set5' in .*; there are: Two"):
        datasets.test_pairs(test_set.parent, "Set5", 4)
    with pytest.raises(InputError, match="there are: none"):
        datasets.test_pairs(tmp_path / "absent", "Set5", 4)


def test_real_set(data):
    pairs = datasets.test_pairs(data, "Set5", 3)
    assert [pair.name for pair in pairs] == ["baby", "bird", "butterfly", "head", "woman"]
    lr, hr = pairs[1].load(3)
    assert (lr.shape, hr.shape) == ((3, 96, 96), (3, 288, 288))
