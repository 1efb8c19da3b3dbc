"""``condiquant demo``: the main job on photographs that ship with scikit-image."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import condiquant_basicsr as basicsr_host
import condiquant_openvino as openvino_host
from condiquant_plugin.errors import InputError
from condiquant_recipes.progress import Progress
from condiquant_recipes.recipe import load_recipe
from condiquant_recipes.recipe_files import recipe_path
from condiquant_recipes.reporting import condition_medians, side_by_side
from condiquant_recipes.run import run
from condiquant_recipes.source import load_network
from condiquant_recipes.workspace import OtherRunError

_CALIBRATION = ("coffee", "rocket", "retina", "motorcycle_left")
_TEST = {"astronaut": (0, 384, 128, 384), "chelsea": (0, 256, 64, 320)}
"""Name to the part that is scored: top, bottom, left, right."""
_SHOWN = "chelsea"
_SETTINGS = (
    "datasets.calibration.folders=[calibration]",
    "datasets.calibration.count=64",
    "datasets.calibration.held_out=8",
    "datasets.test=[photographs]",
    "condiquant.bounds.crops=16",
)
_VARIANTS = {
    "plain": (
        "quantized without reconditioning",
        ("condiquant.recondition.enabled=false", "condiquant.distillation.iterations=0"),
    ),
    "condiquant": ("CondiQuant", ("condiquant.distillation.iterations=0",)),
    "distilled": (
        "CondiQuant, distilled",
        ("condiquant.distillation.iterations=120", "condiquant.distillation.validate_every=40"),
    ),
}


def run_demo(out: Path, progress: Progress, console: Console) -> None:
    """Quantize DAT-light x4 three ways, print a table, write a picture.

    Args:
        out: one folder per variant, ``data`` and ``side_by_side.png`` appear in it.

    Raises:
        InputError: scikit-image is missing, or ``out`` is not writable.
    """
    data = out / "data"
    write_photographs(data)
    path = recipe_path("dat_light/x4.yml")
    results: dict[str, dict[str, Any]] = {}
    for variant, (title, overrides) in _VARIANTS.items():
        if progress.console is not None:
            progress.console.rule(title)
        recipe = load_recipe(path, [*_SETTINGS, *overrides])
        job = partial(run, recipe, data, out / variant, progress=progress)
        try:
            results[variant] = job(resume=True)
        except OtherRunError:
            results[variant] = job(overwrite=True)
    final = out / "distilled"
    picture = out / "side_by_side.png"
    _draw(final / "model.xml", data, picture, progress)
    console.print(_table(results))
    for label, file in (
        ("IR", final / "model.xml"),
        ("metrics", final / "metrics.json"),
        ("picture", picture),
    ):
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
        for folder in (data / "calibration", data / "photographs" / "HR"):
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
        basicsr_host.write_image(data / "photographs" / "HR" / f"{name}.png", part)


def _draw(model: Path, data: Path, picture: Path, progress: Progress) -> None:
    recipe = load_recipe(recipe_path("dat_light/x4.yml"))
    network = load_network(recipe)
    multiple = basicsr_host.pad_multiple(network, recipe.pad_multiple)
    pairs = basicsr_host.test_pairs(data, "photographs", recipe.scale)
    low, high = next(p for p in pairs if p.name == _SHOWN).load(recipe.scale)
    with progress.status("drawing the side-by-side picture"):
        enlarged = torch.nn.functional.interpolate(
            low[None], scale_factor=float(recipe.scale), mode="bicubic"
        )[0]
        float_output = basicsr_host.upscale(network, low[None], recipe.scale, multiple)[0]
        quantized = torch.as_tensor(openvino_host.Upscaler(model)(low))
        side_by_side(
            [
                ("LR, bicubic", enlarged),
                ("float", float_output),
                ("CondiQuant W4A4, OpenVINO", quantized),
                ("HR", high),
            ],
            picture,
        )


def _table(results: dict[str, dict[str, Any]]) -> Table:
    table = Table(
        "DAT-light x4",
        "PSNR",
        "SSIM",
        "condition number (median)",
        "IR .bin + .xml",
        caption="trained on nothing here but the calibration photographs; scored on others",
    )

    def scores(values: dict[str, Any]) -> tuple[str, str]:
        return f"{values['photographs']['psnr']:.2f} dB", f"{values['photographs']['ssim']:.4f}"

    first = results["plain"]
    before, _ = condition_medians(first)
    table.add_row("float", *scores(first["float"]), f"{before:.0f}", "")
    for variant, (title, _) in _VARIANTS.items():
        metrics = results[variant]
        before, after = condition_medians(metrics)
        sizes = (
            f"{metrics['ir']['bin_bytes'] / 1024:.0f} + {metrics['ir']['xml_bytes'] / 1024:.0f} KiB"
        )
        table.add_row(title, *scores(metrics["quantized"]), f"{before:.0f} -> {after:.0f}", sizes)
    return table
