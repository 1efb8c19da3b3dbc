"""Calibration crops and test images from the dataset sections of a BasicSR option file."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from basicsr.data import DATASET_REGISTRY, data_util, single_image_dataset
from basicsr.utils import scandir
from basicsr.utils.file_client import LmdbBackend
from torch import Tensor
from torch.utils.data import Dataset

from condiquant_plugin.errors import InputError
from condiquant_plugin.pictures import is_picture, pictures

_FOLDERS = ("dataroot_gt", "dataroot_lq")
_SHOWN_FILES = 3
_PAIRED = "use PairedImageDataset with dataroot_gt (HR images) and dataroot_lq (LR images)"
_LMDB = (
    "make it with BasicSR's scripts/data_preparation/create_lmdb.py, or use io_backend type: disk"
)


def training_crops(dataset_opt: Mapping[str, Any], scale: int, count: int, seed: int) -> Tensor:
    """LR crops as training sees them, shape ``(count, channels, gt_size / scale, gt_size / scale)``.

    BasicSR's own dataset object reads, crops, augments and converts them: range 0 to 1, RGB or what the
    section says. Images are drawn in shuffled order, all once, then again with other crops. The section,
    the images' names and contents, and the seed decide the result; global generators stay as they were.

    Args:
        dataset_opt: ``datasets.train`` of an option file.

    Raises:
        InputError: see :func:`check_dataset`; unusable images, images smaller than ``gt_size``, or
            another size than ``scale`` says.
    """
    check_dataset(dataset_opt)
    size = dataset_opt.get("gt_size")
    if size is not None and (not isinstance(size, int) or size < scale or size % scale):
        raise _error(dataset_opt, f"gt_size={size!r} is no multiple of scale={scale}: change it")
    order = random.Random(seed)
    crops: list[Tensor] = []
    with _opened(dataset_opt, scale, "train") as dataset, _seeded(seed):
        indices = list(range(len(dataset)))  # type: ignore[arg-type]
        while len(crops) < count:
            order.shuffle(indices)
            for index in indices[: count - len(crops)]:
                crops.append(_sample(dataset, index, dataset_opt, scale)["lq"])
                if crops[-1].shape != crops[0].shape:
                    raise _error(dataset_opt, "training images of several sizes: set gt_size")
    return torch.stack(crops)


@dataclass(frozen=True)
class ValidationPair:
    """One image of a validation set, loaded by BasicSR's own dataset object."""

    name: str
    dataset_opt: Mapping[str, Any]
    index: int
    """In the set sorted by path."""

    def load(self, scale: int) -> tuple[Tensor, Tensor]:
        """LR image ``(3, h, w)`` and HR image cropped to ``(3, h * scale, w * scale)``, 0 to 1.

        Raises:
            InputError: an unreadable image, or an HR image that is too small for its LR image.
        """
        with _opened(self.dataset_opt, scale, "val") as dataset:
            sample = _sample(dataset, self.index, self.dataset_opt, scale)
        lr, hr = sample["lq"], sample["gt"]
        if hr.shape[1:] != (lr.shape[1] * scale, lr.shape[2] * scale):
            raise _error(
                self.dataset_opt,
                f"{self.name}: {hr.shape[2]}x{hr.shape[1]} is too small for its x{scale} LR image"
                f" of {lr.shape[2]}x{lr.shape[1]}: dataroot_gt and dataroot_lq must fit",
            )
        return lr, hr


def validation_pairs(dataset_opt: Mapping[str, Any]) -> list[ValidationPair]:
    """The images of a validation set (``datasets.val*``), sorted by path.

    Raises:
        InputError: see :func:`check_dataset`; no HR images, two of one name, or images that are not RGB in
            0 to 1.
    """
    check_dataset(dataset_opt)
    if dataset_opt.get("type") == "SingleImageDataset":
        raise _error(dataset_opt, f"SingleImageDataset has no HR images: {_PAIRED}")
    for key in ("color", "mean", "std"):
        if dataset_opt.get(key) is not None:
            raise _error(
                dataset_opt, f"{key}: only RGB images in 0 to 1 can be compared; remove it"
            )
    pairs: dict[str, ValidationPair] = {}
    with _opened(dataset_opt, 1, "val") as dataset:
        for index, paths in enumerate(getattr(dataset, "paths", [])):
            if not isinstance(paths, dict) or "gt_path" not in paths:
                break
            name = Path(paths["gt_path"]).stem
            if name in pairs:
                raise _error(dataset_opt, f"two images have one name, {name}: rename one of them")
            pairs[name] = ValidationPair(name, dataset_opt, index)
    if not pairs:
        raise _error(dataset_opt, f"{dataset_opt.get('type')} has no pairs of images: {_PAIRED}")
    return list(pairs.values())


def check_dataset(dataset_opt: Mapping[str, Any]) -> None:
    """Check what can be checked of a dataset section before anything is read.

    Raises:
        InputError: a type that gives no LR images, a missing folder, LMDB or ``meta_info_file``.
    """
    if dataset_opt.get("type") == "RealESRGANDataset":
        raise _error(
            dataset_opt, f"RealESRGANDataset has no LR images, its model makes them: {_PAIRED}"
        )
    lmdb = (dataset_opt.get("io_backend") or {}).get("type") == "lmdb"
    for key in _FOLDERS:
        if key not in dataset_opt:
            continue
        value = dataset_opt[key]
        folder = Path(str(value)).expanduser()
        if not isinstance(value, str) or not folder.is_dir():
            raise _error(dataset_opt, f"{key}={value} is no folder: give the folder of the images")
        if lmdb and not (folder.suffix == ".lmdb" and (folder / "meta_info.txt").is_file()):
            raise _error(
                dataset_opt, f"{key}={value} is no .lmdb folder with meta_info.txt: {_LMDB}"
            )
    meta = None if lmdb else dataset_opt.get("meta_info_file")
    if meta is not None and not Path(meta).is_file():
        raise _error(
            dataset_opt,
            f"meta_info_file={meta} does not exist: give its path, or remove the key to use all images",
        )


@contextmanager
def only_pictures() -> Iterator[None]:
    """BasicSR's datasets leave out files of their folders that are no pictures."""
    modules = (data_util, single_image_dataset)
    before = [module.scandir for module in modules]
    for module in modules:
        module.scandir = _scan
    try:
        yield
    finally:
        for module, scan in zip(modules, before, strict=True):
            module.scandir = scan


def _scan(folder: str, *arguments: Any, full_path: bool = False, **options: Any) -> Iterator[str]:
    """BasicSR's ``scandir`` of pictures alone."""
    options["full_path"] = True
    for file in pictures(map(Path, scandir(folder, *arguments, **options))):
        yield str(file) if full_path else os.path.relpath(file, folder)


def _skipped(options: Mapping[str, Any]) -> list[Path]:
    """Some of the files that :func:`only_pictures` leaves out."""
    if (options.get("io_backend") or {}).get("type") == "lmdb":
        return []
    folders = [options[key] for key in _FOLDERS if options.get(key)]
    files = (Path(folder, name) for folder in folders for name in scandir(folder))
    return [file for file in sorted(files) if not is_picture(file)][:_SHOWN_FILES]


@contextmanager
def _opened(dataset_opt: Mapping[str, Any], scale: int, phase: str) -> Iterator[Dataset]:
    """BasicSR's dataset object with its paths sorted: ``scandir`` knows no order."""
    options = deepcopy(dict(dataset_opt)) | {"scale": scale, "phase": phase}
    for key in _FOLDERS:
        if options.get(key) is not None:
            options[key] = str(Path(options[key]).expanduser())
    kind = options.get("type")
    if kind not in DATASET_REGISTRY:
        raise _error(dataset_opt, f"unknown type {kind!r}: {_PAIRED}")
    try:
        with only_pictures():
            dataset = DATASET_REGISTRY.get(kind)(options)  # build_dataset would fix the log's file
    except KeyError as error:
        raise _error(dataset_opt, f"key {error} is missing: add it") from error
    except (AssertionError, ValueError, TypeError, OSError) as error:
        skipped = ", ".join(str(file) for file in _skipped(options))
        raise _error(
            dataset_opt,
            f"{one_line(error)} (dataroot_gt={options.get('dataroot_gt')},"
            f" dataroot_lq={options.get('dataroot_lq')}): every HR image needs the LR image that"
            " filename_tmpl names"
            + (f"; these are no pictures, repair or remove them: {skipped}" if skipped else ""),
        ) from error
    if not len(dataset):
        named = " ".join(
            f"{key}={dataset_opt[key]}"
            for key in (*_FOLDERS, "meta_info_file")
            if key in dataset_opt
        )
        raise _error(dataset_opt, f"no images in {named}: give folders of images")
    getattr(dataset, "paths", []).sort(key=str)
    try:
        yield dataset
    finally:
        client = getattr(getattr(dataset, "file_client", None), "client", None)
        if isinstance(client, LmdbBackend):  # a process, forked ones included, opens it once
            for environment in client._client.values():
                environment.close()


def _sample(
    dataset: Dataset, index: int, dataset_opt: Mapping[str, Any], scale: int
) -> dict[str, Tensor]:
    try:
        sample = dataset[index]
    except KeyError as error:
        raise _error(dataset_opt, f"key {error} is missing: add it") from error
    except Exception as error:
        text, remedy = one_line(error), "repair or remove it"
        if text.startswith("LQ") and "smaller" in text:
            remedy = f"or set gt_size={dataset_opt.get('gt_size')} smaller"
        elif text.startswith("Scale mismatches"):
            remedy = f"crop HR images to scale={scale} times the size of their LR images"
        paths = getattr(dataset, "paths", None)
        where = paths[index] if paths else f"image {index}"
        raise _error(
            dataset_opt,
            f"cannot use {where}: {type(error).__name__}: {text} - {remedy}",
        ) from error
    lq = sample.get("lq")
    if not isinstance(lq, Tensor) or lq.ndim != 3:
        raise _error(dataset_opt, f"{dataset_opt.get('type')} gives no single LR images: {_PAIRED}")
    return sample


@contextmanager
def same_chance() -> Iterator[None]:
    """Global generators are as before afterwards."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Global generators seeded, and as before afterwards."""
    with same_chance():
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        torch.default_generator.manual_seed(seed)  # torch.manual_seed seeds GPUs, too
        yield


def _error(dataset_opt: Mapping[str, Any], text: str) -> InputError:
    return InputError(f"dataset {dataset_opt.get('name', 'without a name')}: {text}")


def one_line(error: Exception) -> str:
    """What an exception says, without the quotes of KeyError."""
    text = str(error) if isinstance(error, OSError) else " ".join(map(str, error.args))
    return " ".join(text.split())
