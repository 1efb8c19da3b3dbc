"""Places where a quantized network differs most from the float one, cut from every method's output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.functional import avg_pool2d

import condiquant_basicsr as basicsr_host

_SIDE, _COUNT, _PER_IMAGE = 96, 6, 2
CROPS = "methods/crops"
"""Folder of the crops in that of the comparison."""


@dataclass(frozen=True)
class Place:
    """A window of an upscaled image; all in its pixels."""

    set: str
    image: str
    x: int
    y: int
    width: int
    height: int

    def cut(self, image: Tensor) -> Tensor:
        """The window of an image ``(3, H, W)``."""
        return image[:, self.y : self.y + self.height, self.x : self.x + self.width]


def output_file(folder: Path, test_set: str, image: str) -> Path:
    """Where a method with this folder keeps its output for an image."""
    return folder / "images" / test_set / f"{image}.png"


def worst_places(
    subject: Path, reference: Path, test_sets: Mapping[str, Sequence[basicsr_host.TestImage]]
) -> list[Place]:
    """Where the outputs in two methods' folders differ most in squares, worst first, no two overlapping."""
    found: list[tuple[float, Place]] = []
    for name, pairs in test_sets.items():
        for pair in pairs:
            images = (output_file(folder, name, pair.name) for folder in (subject, reference))
            first, second = (basicsr_host.read_image(file) for file in images)
            error = (first - second).square().mean(0)
            found += ((value, Place(name, pair.name, *box)) for value, box in _windows(error))
    found.sort(key=lambda entry: -entry[0])
    return [place for _, place in found[:_COUNT]]


def _windows(error: Tensor) -> Iterator[tuple[float, tuple[int, int, int, int]]]:
    """Mean and ``(x, y, width, height)`` of the windows with the largest mean, shape ``(H, W)``."""
    height, width = (min(_SIDE, size) for size in error.shape)
    columns = avg_pool2d(error[None, None], (height, 1), stride=1)
    means = avg_pool2d(columns, (1, width), stride=1)[0, 0]
    for _ in range(_PER_IMAGE):
        value = float(means.max())
        if value <= 0:
            return
        y, x = divmod(int(means.argmax()), means.shape[1])
        yield value, (x, y, width, height)
        means[max(y - height + 1, 0) : y + height, max(x - width + 1, 0) : x + width] = 0


def write_crops(
    places: Sequence[Place],
    folders: Mapping[str, Path],
    test_sets: Mapping[str, Sequence[basicsr_host.TestImage]],
    scale: int,
    out: Path,
    reference: str | None = None,
) -> list[dict[str, Any]]:
    """Cut the places from all outputs and write them below ``out``.

    Args:
        folders: of the methods, by id.
        reference: the id of the method whose output stands for HR.

    Returns:
        For every place its fields, ``psnr`` by id (None: identical to the reference) and ``files`` by
        id and for ``reference``, relative to ``out``.
    """
    crops = []
    for number, place in enumerate(places):
        if reference is None:
            pairs = {pair.name: pair for pair in test_sets[place.set]}
            _, whole = pairs[place.image].load(scale)
        else:
            whole = basicsr_host.read_image(output_file(folders[reference], place.set, place.image))
        target = place.cut(whole)
        cuts = {"reference": target}
        for method, folder in folders.items():
            cuts[method] = place.cut(
                basicsr_host.read_image(output_file(folder, place.set, place.image))
            )
        files = {name: f"{CROPS}/{number:03d}/{name}.png" for name in cuts}
        (out / files["reference"]).parent.mkdir(parents=True, exist_ok=True)
        for name, image in cuts.items():
            basicsr_host.write_image(out / files[name], image)
        scores = {n: basicsr_host.evaluate_pair(cuts[n], target, 0)["psnr"] for n in folders}
        psnr = {name: score if isfinite(score) else None for name, score in scores.items()}
        crops.append(asdict(place) | {"psnr": psnr, "files": files})
    return crops
