"""Calibration crops and test sets, read from folders of images."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from condiquant_basicsr.data.images import matlab_downscale, read_image, to_tensor, to_uint8
from condiquant_plugin.errors import InputError
from condiquant_plugin.pictures import pictures

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}


class TestImage(Protocol):
    """One image of a test set, whatever it is read from."""

    @property
    def name(self) -> str: ...

    def load(self, scale: int) -> tuple[Tensor, Tensor]:
        """LR image ``(3, h, w)`` and HR image cropped to ``(3, h * scale, w * scale)``, 0 to 1."""


@dataclass(frozen=True)
class Pair:
    """One image of a test set in files."""

    name: str
    lr: Path | None
    """None: the LR image is made from the HR image by MATLAB's bicubic."""
    hr: Path

    def load(self, scale: int) -> tuple[Tensor, Tensor]:
        """LR image ``(3, h, w)`` and HR image cropped to ``(3, h * scale, w * scale)``, 0 to 1."""
        hr = read_image(self.hr)
        if self.lr is None:
            lr = to_tensor(matlab_downscale(to_uint8(hr), scale))
        else:
            lr = read_image(self.lr)
        height, width = lr.shape[1] * scale, lr.shape[2] * scale
        if 0 in lr.shape or hr.shape[1] < height or hr.shape[2] < width:
            raise InputError(
                f"{self.hr}: {hr.shape[2]}x{hr.shape[1]} is too small for its x{scale} LR image of"
                f" {lr.shape[2]}x{lr.shape[1]}"
            )
        return lr, hr[:, :height, :width]


def calibration_crops(
    folders: Sequence[Path], scale: int, size: int, count: int, seed: int
) -> Tensor:
    """LR crops for calibration, shape ``(count, 3, size, size)``; see :func:`calibration_pairs`."""
    return torch.stack([lr for lr, _ in calibration_pairs(folders, scale, size, count, seed)])


def calibration_pairs(
    folders: Sequence[Path], scale: int, size: int, count: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """LR crops, shape ``(3, size, size)``, range 0 to 1, and the HR crops that they were made from.

    HR crops of ``size * scale`` are taken at random places from the images in shuffled order (all
    once, then again) and reduced by MATLAB's bicubic. Arguments and contents decide the result.

    Raises:
        InputError: a missing folder, no images, or an image smaller than the crop.
    """
    files = [file for folder in folders for file in _images(Path(folder))]
    if not files:
        names = ", ".join(str(folder) for folder in folders)
        raise InputError(
            f"no calibration images in {names or 'no folder'}: give a folder of images"
        )
    generator = random.Random(seed)
    side = size * scale
    while count > 0:
        generator.shuffle(files)
        for file in files[:count]:
            image = to_uint8(read_image(file))
            height, width = image.shape[:2]
            if min(height, width) < side:
                raise InputError(
                    f"{file}: {width}x{height} is smaller than the calibration crop of"
                    f" {side}x{side}; use larger images or a smaller crop"
                )
            top, left = generator.randint(0, height - side), generator.randint(0, width - side)
            crop = image[top : top + side, left : left + side]
            yield to_tensor(matlab_downscale(crop, scale)), to_tensor(crop)
        count -= len(files[:count])


def test_pairs(data: Path, set_name: str, scale: int) -> list[Pair]:
    """Pairs of ``<data>/<set>/HR/<name>.*`` and ``<data>/<set>/LR_bicubic/X<s>/<name>x<s>.png``.

    Where the LR folder is missing, the LR images are made from the HR images.

    Raises:
        InputError: no such set (names those there are), no images, two of one name, or a missing LR image.
    """
    root = Path(data) / set_name
    if not (root / "HR").is_dir():
        sets = sorted(folder.parent.name for folder in Path(data).glob("*/HR"))
        raise InputError(
            f"no test set {set_name!r} in {data}; there are: {', '.join(sets) or 'none'}"
        )
    reduced = root / "LR_bicubic" / f"X{scale}"
    pairs: dict[str, Pair] = {}
    for hr in _images(root / "HR"):
        if hr.stem in pairs:
            raise InputError(f"{pairs[hr.stem].hr} and {hr.name} have one name: rename one of them")
        lr = reduced / f"{hr.stem}x{scale}.png" if reduced.is_dir() else None
        if lr is not None and not lr.is_file():
            raise InputError(f"{hr} has no LR image {lr}: add it or remove the folder {reduced}")
        pairs[hr.stem] = Pair(hr.stem, lr, hr)
    if not pairs:
        raise InputError(f"no images in {root / 'HR'}")
    return list(pairs.values())


def _images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"no such folder: {folder}")
    return pictures(file for file in folder.iterdir() if file.suffix.lower() in _SUFFIXES)
