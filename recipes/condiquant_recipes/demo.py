"""``condiquant demo``: a comparison on photographs that ship with scikit-image."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from rich.console import Console

import condiquant_basicsr as basicsr_host
from condiquant_plugin.errors import InputError
from condiquant_recipes.comparison.comparing import compare
from condiquant_recipes.comparison.crops import output_file
from condiquant_recipes.comparison.page import write_page
from condiquant_recipes.comparison.table import remarks, table
from condiquant_recipes.progress import Progress
from condiquant_recipes.recipe import load_recipe
from condiquant_recipes.recipe_files import recipe_path
from condiquant_recipes.reporting import with_error_maps
from condiquant_recipes.workspace import OtherRunError

_CALIBRATION = ("coffee", "rocket", "retina", "motorcycle_left")
_TEST = {"astronaut": (0, 384, 128, 384), "chelsea": (0, 256, 64, 320)}
"""Name to the part that is scored: top, bottom, left, right."""
_SET, _SHOWN, _PART = "photographs", "chelsea", (slice(64, 192), slice(40, 232))
_SETTINGS = (
    "datasets.calibration.folders=[calibration]",
    "datasets.calibration.count=32",
    "datasets.calibration.held_out=4",
    f"datasets.test=[{_SET}]",
    "condiquant.bounds.crops=16",
    "condiquant.weight_bits=2",
    "condiquant.activation_bits=2",
    "condiquant.distillation.iterations=40",
    "condiquant.distillation.validate_every=10",
    "export.tile=32",  # parity is checked on a tile
)
_DRAWN = {
    "float": "float",
    "2dquant-dobi-w2a2": "2 bits, weights as trained",
    "condiquant-w2a2": "2 bits, CondiQuant",
}
METHODS = (
    "nncf-int8-performance",
    "condiquant-no-dqc-w8a8",
    "2dquant-dobi-w2a2",
    "condiquant-w2a2",
)
"""Of ``condiquant compare``."""


def run_demo(out: Path, progress: Progress, console: Console) -> None:
    """Quantize DAT-light x4 four ways, print a table, write a page and a picture.

    Args:
        out: what :func:`compare` writes, ``data`` and ``side_by_side.png`` appear in it.

    Raises:
        InputError: scikit-image is missing, or ``out`` is not writable.
    """
    data = out / "data"
    write_photographs(data)
    recipe = load_recipe(recipe_path("dat_light/x4.yml"), _SETTINGS)
    job = partial(compare, recipe, data, out, methods=METHODS, progress=progress)
    try:
        report = job(resume=True)
    except OtherRunError:
        report = job(overwrite=True)
    page, picture = write_page(report, out), out / "side_by_side.png"
    _draw(out, data, recipe.scale, picture)
    console.print(table(report))
    for line in remarks(report):
        console.print(line, highlight=False, soft_wrap=True)
    model = out / "methods" / METHODS[-1] / "model.xml"
    for label, file in (("IR", model), ("page", page), ("picture", picture)):
        console.print(f"{label}: {file}", highlight=False, soft_wrap=True)


def write_photographs(data: Path) -> None:
    """Fill ``data`` with calibration and test photographs, disjoint.

    Raises:
        InputError: scikit-image is missing, or the folder is not writable.
    """
    try:
        import skimage.data
    except ImportError as error:
        raise InputError("the demo needs photographs: pip install scikit-image") from error
    try:
        for folder in (data / "calibration", data / _SET / "HR"):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {data}: {error.strerror}; give another --out") from error

    def photograph(name: str) -> torch.Tensor:
        image = (
            skimage.data.stereo_motorcycle()[0]
            if name == "motorcycle_left"
            else getattr(skimage.data, name)()
        )
        return torch.from_numpy(image[..., :3].copy()).permute(2, 0, 1).float() / 255

    for name in _CALIBRATION:
        basicsr_host.write_image(data / "calibration" / f"{name}.png", photograph(name))
    for name, (top, bottom, left, right) in _TEST.items():
        part = photograph(name)[:, top:bottom, left:right]
        basicsr_host.write_image(data / _SET / "HR" / f"{name}.png", part)


def _draw(out: Path, data: Path, scale: int, picture: Path) -> None:
    """A part of one photograph by three networks, and how far each is from the photograph."""
    pair = next(p for p in basicsr_host.test_pairs(data, _SET, scale) if p.name == _SHOWN)
    _, original = pair.load(scale)
    drawn = {}
    for method, title in _DRAWN.items():
        image = basicsr_host.read_image(output_file(out / "methods" / method, _SET, _SHOWN))
        psnr = basicsr_host.psnr(image, original, scale)
        drawn[f"{title}, {psnr:.2f} dB"] = image[:, *_PART]
    with_error_maps(drawn, original[:, *_PART], picture)
