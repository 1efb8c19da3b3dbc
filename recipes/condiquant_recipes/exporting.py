"""From a quantized network to its IR, checked against the simulation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import openvino as ov
import torch
from torch import Tensor, nn

import condiquant_basicsr as basicsr_host
import condiquant_openvino as openvino_host
from condiquant_openvino.parity.check import check_parities
from condiquant_openvino.running.execution import LayerExecution, int8_share
from condiquant_openvino.running.instruction_sets import sums_saturate
from condiquant_openvino.running.upscaling import next_multiple
from condiquant_openvino.writing.conversion import InstructionSet
from condiquant_plugin import __version__
from condiquant_plugin.errors import InputError
from condiquant_plugin.layerwise import precision
from condiquant_recipes.progress import Progress
from condiquant_recipes.recipe import Recipe, with_export

_TIMED = 7
"""Runs of each network in a comparison of latencies."""


def export(
    model: nn.Module,
    recipe: Recipe,
    multiple: int,
    out: Path,
    progress: Progress,
    moved: Mapping[str, float] | None = None,
    float_ir: Path | None = None,
) -> dict[str, Any]:
    """Write ``model.xml`` as :func:`write_ir`, and set it beside the float network.

    Args:
        float_ir: as :func:`compared_to_float` takes it.

    Returns:
        As :func:`write_ir`; what each layer runs as on the CPU plugin, what :func:`compared_to_float`
        gives.

    Raises:
        InputError, RuntimeError: as :func:`write_ir`.
    """
    figures, in_float, image = write_ir(model, recipe, multiple, out, progress, moved)
    notes = figures.pop("notes")
    with progress.status("running it beside the float network"):
        compared, executions = compared_to_float(in_float, out / "model.xml", image, float_ir)
    if (ratio := compared["latency_ratio"]) > 1:
        notes.append(
            f"on this CPU the float network is faster: the IR takes {ratio:.2f} of its time"
        )
    return {
        **figures,
        **compared,
        "int8_share": int8_share(executions),
        "layer_executions": [asdict(layer) for layer in executions],
        "notes": notes,
    }


def write_ir(
    model: nn.Module,
    recipe: Recipe,
    multiple: int,
    out: Path,
    progress: Progress,
    moved: Mapping[str, float] | None = None,
) -> tuple[dict[str, Any], ov.Model, Tensor]:
    """Write ``model.xml`` and check that it computes what torch simulates.

    Parity is checked in f32, with the execution mode hint ACCURACY and with the plugin's default
    properties; the latter two have figures under ``accuracy`` and ``default``. With
    ``compress_to_fp16`` all figures are those of the halved IR, which may differ by what rounding its
    float parameters costs; those without it, in f32, are under ``before_fp16``.

    Args:
        moved: what it cost to move the grids of a network calibrated for another device:
            ``zero_on_grid_mean_abs`` and ``zero_on_grid_max_abs`` of the output.

    Returns:
        Sizes, figures and ``notes``, one-line sentences that the user should read; the network without its
        quantizers, for :func:`compared_to_float`, and an image to run both on.

    Raises:
        InputError: a network that must keep its traced size, with ``export.static: false``; grids that
            this CPU cannot check.
        RuntimeError: if parity fails; no IR is written then.
    """
    check_overflow(recipe)
    section = recipe.export
    channels = basicsr_host.input_channels(recipe.network_g)
    if section.u8_nhwc and channels != 3:
        raise InputError(
            f"{recipe.name} takes {channels}-channel images, but u8_nhwc is for RGB: leave out"
            " --u8-nhwc (export.u8_nhwc)"
        )
    notes = []
    with progress.status("exporting OpenVINO IR, checking parity with the simulation"):
        ir, in_float, images, parities = _convert(model, recipe, multiple)
        static = len(images) == 1
        if static and not section.static and section.device == "CPU":
            size = "x".join(map(str, images[0].shape[2:]))
            notes.append(
                f"{recipe.name} is right only at the size it is traced with: the IR is static, {size}, "
                "and other images go through tiles"
            )
        before_fp16 = {}
        if section.compress_to_fp16:
            before_fp16 = {"before_fp16": _figures(parities["f32"])}
            openvino_host.halve(ir)
            parities = _checked(model, ir, images)
        in_f32 = parities.pop("f32")
        figures = {
            **_figures(in_f32),
            "parity_layer_max": max((layer.error for layer in in_f32.layers), default=0.0),
            "code_flip_rate": in_f32.code_flip_rate,
            **{name: _figures(parity) for name, parity in parities.items()},
            **before_fp16,
        }
        if section.u8_nhwc:
            float_ir, ir = ir, openvino_host.take_u8_nhwc(ir)
            photographs = [image.mul(255).round().byte().permute(0, 2, 3, 1) for image in images]
            levels = openvino_host.check_u8_parity(ir, float_ir, [p.numpy() for p in photographs])
            levels.raise_if_broken()
            figures |= {f"u8_{name}": value for name, value in asdict(levels).items()}
    if section.device == "NPU":
        notes.append("the NPU flavour is untested on the device: its parity is the CPU plugin's")
    if moved:
        figures |= moved
        notes.append(
            "calibrated for the CPU, then moved to grids with zero on them: the output changes by "
            f"{moved['zero_on_grid_mean_abs']:.4f} of 1 on average, at most "
            f"{moved['zero_on_grid_max_abs']:.4f}; `condiquant run` with --set export.device=NPU "
            "calibrates for them"
        )
    calibrated = with_export(recipe, {"device": "CPU"}) if moved else recipe
    metadata = _metadata(model, recipe, multiple, static) | {"recipe_sha256": calibrated.digest()}
    of_ir = {key: openvino_host.read_metadata(ir)[key] for key in ("overflow", "isa")}
    openvino_host.set_metadata(ir, metadata | of_ir | {"parity": figures})
    sizes = openvino_host.save(ir, out / "model.xml")
    return {**sizes, **figures, **of_ir, "notes": notes}, in_float, images[-1]


def check_convertible(model: nn.Module, recipe: Recipe, multiple: int) -> None:
    """Convert a quantized network for nothing, before it is trained for long.

    Raises:
        InputError, RuntimeError: OpenVINO cannot convert it.
    """
    image = example_image(
        tile_size(recipe, multiple), channels=basicsr_host.input_channels(recipe.network_g)
    )
    if next(model.parameters()).device != image.device:
        model = deepcopy(model).cpu()
    with saying("before any distillation, as this network cannot be exported"):
        openvino_host.convert(model, image, static=True)


@contextmanager
def saying(more: str) -> Iterator[None]:
    """Add to the message of an error what it means for the user."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{error} ({more})") from error
    except RuntimeError as error:
        raise RuntimeError(f"{error} ({more})") from error


def compared_to_float(
    in_float: ov.Model, ir: Path, image: Tensor, float_ir: Path | None = None
) -> tuple[dict[str, float], list[LayerExecution]]:
    """An IR beside that of the network without its quantizers.

    Args:
        in_float: of :func:`condiquant_openvino.convert_beside_float`.
        image: what both are run on, of the IR's size if it is static.
        float_ir: an IR to take for that of ``in_float``, which is written there if there is none.

    Returns:
        ``latency_ratio``, both run in turns on this CPU, and ``float_bin_bytes``; what each layer of the
        IR runs as.
    """
    with TemporaryDirectory() as folder:
        path = float_ir or Path(folder) / "float.xml"
        if not path.exists():
            in_float.reshape(list(image.shape))
            openvino_host.save(in_float, path)
        takes_u8 = openvino_host.read_ir(ir).input().get_element_type() == ov.Type.u8
        measured = openvino_host.compare_latency(
            {"float": path, "ir": ir},
            data_shape=None if takes_u8 else tuple(image.shape),
            iterations=_TIMED,
            hint="latency",
        )
        float_bytes = path.with_suffix(".bin").stat().st_size
    figures = {"latency_ratio": float(measured["ir"]["ratio"]), "float_bin_bytes": float_bytes}
    return figures, measured["ir"]["layers"]


def instruction_set(recipe: Recipe) -> InstructionSet:
    """What a recipe's IR is fast on; ``auto`` is what this CPU has."""
    if recipe.export.isa == "auto":
        return "avx2" if sums_saturate() else "vnni"
    return recipe.export.isa


def check_overflow(recipe: Recipe) -> None:
    """Raise InputError if this CPU cannot check the IR of a recipe, before anything is computed."""
    if recipe.condiquant.overflow == "vnni" and sums_saturate():
        raise InputError(
            "condiquant.overflow=vnni is for CPUs with VNNI, and this one, which would check the IR, has"
            " none: use condiquant.overflow=safe, or another machine"
        )


def _convert(
    model: nn.Module, recipe: Recipe, multiple: int
) -> tuple[ov.Model, ov.Model, list[Tensor], dict[str, openvino_host.Parity]]:
    """The IR, the float network's, the images it was checked on (one for a static IR), its parities."""
    size = tile_size(recipe, multiple)
    channels = basicsr_host.input_channels(recipe.network_g)
    isa = instruction_set(recipe)
    if not recipe.export.static and recipe.export.device != "NPU":
        images = images_of_two_sizes(size, multiple, channels)
        for traced in images:
            try:
                ir, in_float = openvino_host.convert_beside_float(model, traced, isa=isa)
            except InputError:  # static it may convert
                continue
            if not all(takes(ir, each, recipe.scale) for each in images):
                continue
            try:
                return ir, in_float, images, _checked(model, ir, images)
            except InputError:  # static it may compile
                continue
            except RuntimeError:
                _checked(model, ir, [traced])  # raises what is wrong at any size
    image = example_image(size, channels=channels)
    ir, in_float = openvino_host.convert_beside_float(model, image, static=True, isa=isa)
    parities = _checked(model, ir, [image])
    if recipe.export.static is False:
        raise InputError(
            f"{recipe.name} is right only at the size it is traced with: set export.static: true, "
            "or export the finished run again with --static"
        )
    return ir, in_float, [image], parities


def _checked(
    model: nn.Module, ir: ov.Model, images: Sequence[Tensor]
) -> dict[str, openvino_host.Parity]:
    """Parities that hold.

    Raises:
        RuntimeError: naming the first layer that differs.
    """
    parities = check_parities(model, ir, images)
    for parity in parities.values():
        parity.raise_if_broken()
    return parities


def _figures(parity: openvino_host.Parity) -> dict[str, Any]:
    return {
        "precision": parity.precision,
        "parity_mean_abs": parity.mean_abs,
        "parity_max_abs": parity.max_abs,
        "parity_stretch_mean_abs": parity.stretch_mean_abs,
        "parity_input_max": max((entry.error for entry in parity.inputs), default=0.0),
        "tie_rate": parity.tie_rate,
    }


def takes(ir: ov.Model, image: Tensor, scale: int) -> bool:
    """Whether the shapes in an IR work out for the size of an image."""
    trial = ir.clone()
    try:
        trial.reshape(list(image.shape))
    except RuntimeError:
        return False
    _, channels, height, width = image.shape
    return list(trial.output().get_shape()) == [1, channels, scale * height, scale * width]


def _metadata(model: nn.Module, recipe: Recipe, multiple: int, static: bool) -> dict[str, Any]:
    """What an IR says about itself; nothing about the machine it was made on."""
    bits = precision.layer_bits(model)
    usual = precision.usual(bits)
    return {
        "network": recipe.name,
        "scale": recipe.scale,
        "weight_bits": usual.weight,
        "activation_bits": usual.activation,
        "other_bits": precision.others(bits),
        "scope": recipe.condiquant.scope,
        "compress_to_fp16": recipe.export.compress_to_fp16,
        "pad_multiple": multiple,
        "static": static,
        "preprocessing": "u8_nhwc" if recipe.export.u8_nhwc else "f32_nchw",
        "device": recipe.export.device,
        "tested_on_device": recipe.export.device == "CPU",
        "plugin_version": __version__,
        "calibration": recipe.datasets.calibration_names,
    }


def tile_size(recipe: Recipe, multiple: int) -> int:
    """Height and width that the network is traced with."""
    return next_multiple(recipe.export.tile, multiple)


def images_of_two_sizes(size: int, multiple: int, channels: int = 3) -> list[Tensor]:
    """Images to trace a dynamic IR with, one after the other, and to check it on.

    What a trace takes for a constant shows at another size, and what for a square at this one. The square
    comes last: at its ``img_size`` a network may have its masks as constants.
    """
    sizes = ((size - multiple or 3 * size, size + multiple), (size, size))
    return [example_image(*each, channels=channels) for each in sizes]


def example_image(height: int, width: int | None = None, *, channels: int = 3) -> Tensor:
    """A reproducible noisy gradient, ``(1, channels, height, width)`` in [0, 1], to trace and compare on.

    Args:
        channels: 3, or 1 for a grey one.
    """
    size = (height, height if width is None else width)
    down, right = torch.linspace(0, 1, size[0])[:, None], torch.linspace(0, 1, size[1])
    image = torch.stack([right.expand(size), down.expand(size), right.flip(0).expand(size)])
    noise = torch.rand(image.shape, generator=torch.Generator().manual_seed(0))
    return (0.8 * image + 0.2 * noise)[None, :channels]
