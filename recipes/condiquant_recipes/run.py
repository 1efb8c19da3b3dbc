"""The main job: float network to evaluated low-bit network and OpenVINO IR."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import openvino as ov
import torch
from torch import Tensor, nn

import condiquant_basicsr as basicsr_host
import condiquant_nncf as nncf_host
import condiquant_openvino as openvino_host
from condiquant_openvino.execution import int8_share, layer_executions
from condiquant_openvino.parity import check_parities
from condiquant_openvino.upscaling import compile_ir
from condiquant_plugin import __version__
from condiquant_plugin.distillation import DistillationResult, distill
from condiquant_plugin.errors import InputError
from condiquant_plugin.reconditioning import LayerReport
from condiquant_recipes import settings
from condiquant_recipes.progress import Progress
from condiquant_recipes.recipe import Recipe, with_export
from condiquant_recipes.workspace import Workspace, save_parameters, write_metrics


@dataclass(frozen=True)
class Source:
    """The float network of a recipe and the data that a run needs."""

    network: nn.Module
    multiple: int
    crops: Tensor
    held_out: Tensor
    test_sets: dict[str, list[basicsr_host.Pair]]


@dataclass(frozen=True)
class Quantized:
    """The network after calibration."""

    model: nn.Module
    layers: list[nncf_host.Layer]
    reports: list[LayerReport]


def load_source(recipe: Recipe, data: Path, sets: Sequence[str]) -> Source:
    """Load and check everything a run reads, before it computes anything.

    Raises:
        InputError: whatever is missing or does not fit.
    """
    network = load_network(recipe)
    calibration = recipe.datasets.calibration
    crops = basicsr_host.calibration_crops(
        [data / folder for folder in calibration.folders],
        recipe.scale,
        calibration.crop,
        calibration.count + calibration.held_out,
        recipe.seed,
    )
    multiple = basicsr_host.pad_multiple(network, recipe.pad_multiple)
    if calibration.crop % multiple:
        raise InputError(
            f"datasets.calibration.crop={calibration.crop} is not a multiple of {multiple}, "
            f"which {type(network).__name__} needs: use {-(-calibration.crop // multiple) * multiple}"
        )
    test_sets = {name: basicsr_host.test_pairs(data, name, recipe.scale) for name in sets}
    return Source(
        network, multiple, crops[: calibration.count], crops[calibration.count :], test_sets
    )


def load_network(recipe: Recipe) -> nn.Module:
    """The float network, frozen."""
    network, _ = basicsr_host.load_network(
        recipe.network_g,
        recipe.path.pretrain_network_g,
        recipe.path.sha256,
        recipe.path.param_key_g,
        recipe.scale,
    )
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    return network


def run(
    recipe: Recipe,
    data: Path,
    out: Path,
    *,
    sets: Sequence[str] = (),
    resume: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run a recipe; writes ``metrics.json``, ``model.xml``/``.bin``, ``quantized.safetensors``.

    Args:
        data: folder that holds the calibration folders and the test sets.
        sets: test sets instead of the recipe's.
        resume: keep the stages that an earlier call with the same recipe and folder finished.

    Returns:
        The content of ``metrics.json``.

    Raises:
        InputError: on bad input, before anything is computed where possible.
    """
    progress = progress or Progress()
    torch.manual_seed(recipe.seed)
    names = list(sets or recipe.datasets.test)
    source = load_source(recipe, data, names)
    workspace = Workspace.create(out, recipe, source.network, data, resume=resume)

    quantized, seconds = _calibrated(workspace, source, recipe, progress)
    float_scores = _evaluated(workspace, "float", source.network, source, recipe, progress)
    distilled = _distilled(workspace, quantized, source, recipe, progress)
    seconds["distillation"] = distilled.pop("seconds")
    scores = _evaluated(workspace, "quantized", quantized.model, source, recipe, progress)
    save_parameters(quantized.model, workspace.network_path)
    started = time.perf_counter()
    ir = export(quantized.model, recipe, source.multiple, workspace.folder, progress)
    seconds["export"] = time.perf_counter() - started

    metrics = {
        "model": recipe.name,
        "scale": recipe.scale,
        "weight_bits": recipe.condiquant.weight_bits,
        "activation_bits": recipe.condiquant.activation_bits,
        "reference": recipe.datasets.reference,
        "float": float_scores,
        "quantized": scores,
        "layers": [asdict(report) for report in quantized.reports],
        "distillation": distilled,
        "seconds": seconds,
        "ir": ir,
    }
    write_metrics(out / "metrics.json", metrics)
    return metrics


def _evaluated(
    workspace: Workspace,
    stage: str,
    model: nn.Module,
    source: Source,
    recipe: Recipe,
    progress: Progress,
) -> dict[str, Any]:
    """PSNR and SSIM per test set, against HR or (``reference: float``) the float output."""
    recorded = workspace.finished(f"evaluated-{stage}") or {}
    scores: dict[str, Any] = {n: s for n, s in recorded.items() if n in source.test_sets}
    upscale = partial(basicsr_host.upscale, model, scale=recipe.scale, multiple=source.multiple)
    reference = None
    if recipe.datasets.reference == "float" and model is not source.network:
        reference = partial(
            basicsr_host.upscale, source.network, scale=recipe.scale, multiple=source.multiple
        )
    for name, pairs in source.test_sets.items():
        if name in scores:
            continue
        with progress.bar(f"{stage} on {name}", len(pairs)) as advance:
            scores[name] = basicsr_host.evaluate(
                upscale, pairs, recipe.scale, advance, reference=reference
            )
    if scores != recorded:
        workspace.finish(f"evaluated-{stage}", scores)
    return scores


def _calibrated(
    workspace: Workspace, source: Source, recipe: Recipe, progress: Progress
) -> tuple[Quantized, dict[str, float]]:
    config = settings.quantization(recipe)
    if (record := workspace.finished("calibrated")) is not None:
        model, layers = rebuild(source.network, source.crops, recipe)
        workspace.restore("calibrated", model)
        reports = [LayerReport(**report) for report in record["reports"]]
        return Quantized(model, layers, reports), record["seconds"]
    with progress.status("reconditioning weights, searching bounds"):
        result = nncf_host.quantize_network(
            source.network, source.crops, config, bounds_crops=recipe.condiquant.bounds.crops
        )
    record = {"seconds": result.seconds, "reports": [asdict(r) for r in result.reports]}
    workspace.finish("calibrated", record, result.model)
    return Quantized(result.model, result.layers, result.reports), result.seconds


def rebuild(
    network: nn.Module, example: Tensor, recipe: Recipe
) -> tuple[nn.Module, list[nncf_host.Layer]]:
    """The quantized network's structure, its bounds and weights yet to be loaded."""
    config = settings.quantization(recipe)
    wrapped = nncf_host.wrap(network, example[:1])
    layers = config.find_layers(wrapped)
    model = nncf_host.insert_quantizers(wrapped, layers, config)
    return model, layers


def _distilled(
    workspace: Workspace, quantized: Quantized, source: Source, recipe: Recipe, progress: Progress
) -> dict[str, Any]:
    config = settings.distillation(recipe)
    if (record := workspace.finished("distilled")) is not None:
        workspace.restore("distilled", quantized.model)
        return record
    started = time.perf_counter()
    result = DistillationResult(0.0, 0.0, 0, 0)
    if config.iterations:
        with progress.bar("distillation", config.iterations) as advance:
            result = distill(
                quantized.model,
                source.network,
                source.crops,
                source.held_out,
                config,
                trainable_weights=nncf_host.trainable_weights(quantized.model, quantized.layers),
                blocks=nncf_host.feature_blocks(source.network, quantized.layers),
                checkpoint=workspace.distillation_path,
                progress=lambda iteration, loss: advance(f"loss {loss:.5f}", iteration),
            )
    record = {**asdict(result), "seconds": time.perf_counter() - started}
    workspace.finish("distilled", record, quantized.model)
    return record


def export(
    model: nn.Module,
    recipe: Recipe,
    multiple: int,
    out: Path,
    progress: Progress,
    moved: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Write ``model.xml`` and check that it computes what torch simulates.

    Parity is checked in f32, with the execution mode hint ACCURACY and with the plugin's default
    properties; the latter two have figures under ``accuracy`` and ``default``. With
    ``compress_to_fp16`` all figures are those of the halved IR, which may differ by what rounding its
    float parameters costs; those without it, in f32, are under ``before_fp16``.

    Args:
        moved: what it cost to move the grids of a network calibrated for another device:
            ``zero_on_grid_mean_abs`` and ``zero_on_grid_max_abs`` of the output.

    Returns:
        Sizes, figures, what each layer runs as on the CPU plugin, and ``notes``: one-line sentences
        that the user should read.

    Raises:
        InputError: a network that must keep its traced size, with ``export.static: false``.
        RuntimeError: if parity fails; no IR is written then.
    """
    section = recipe.export
    notes = []
    with progress.status("exporting OpenVINO IR, checking parity with the simulation"):
        ir, images, parities = _convert(model, recipe, multiple)
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
    metadata = _metadata(recipe, multiple, static) | {"recipe_sha256": calibrated.digest()}
    openvino_host.set_metadata(ir, metadata | {"parity": figures})
    executions = layer_executions(ir, compile_ir(ir))
    sizes = openvino_host.save(ir, out / "model.xml")
    return {
        **sizes,
        **figures,
        "int8_share": int8_share(executions),
        "layer_executions": [asdict(layer) for layer in executions],
        "notes": notes,
    }


def _convert(
    model: nn.Module, recipe: Recipe, multiple: int
) -> tuple[ov.Model, list[Tensor], dict[str, openvino_host.Parity]]:
    """The IR, the images it was checked on (one for a static IR) and its parities."""
    size = tile_size(recipe, multiple)
    image = example_image(size)
    if not recipe.export.static and recipe.export.device != "NPU":
        # What a trace takes for a constant shows at another size, and what for a square at this one.
        images = [image, example_image(size - multiple or 3 * size, size + multiple)]
        for traced in images:  # at its img_size a network may have its masks as constants
            try:
                ir = openvino_host.convert(model, traced)
                if not all(_takes(ir, each, recipe.scale) for each in images):
                    continue
                return ir, images, _checked(model, ir, images)
            except InputError:  # static it may convert
                continue
            except RuntimeError:
                _checked(model, ir, [traced])  # raises what is wrong at any size
    ir = openvino_host.convert(model, image, static=True)
    parities = _checked(model, ir, [image])
    if recipe.export.static is False:
        raise InputError(
            f"{recipe.name} is right only at the size it is traced with: set export.static: true, "
            "or export the finished run again with --static"
        )
    return ir, [image], parities


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


def _takes(ir: ov.Model, image: Tensor, scale: int) -> bool:
    """Whether the shapes in an IR work out for the size of an image."""
    trial = ir.clone()
    try:
        trial.reshape(list(image.shape))
    except RuntimeError:
        return False
    height, width = image.shape[2:]
    return list(trial.output().get_shape()) == [1, 3, scale * height, scale * width]


def _metadata(recipe: Recipe, multiple: int, static: bool) -> dict[str, Any]:
    """What an IR says about itself; nothing about the machine it was made on."""
    section = recipe.condiquant
    folders = (Path(folder) for folder in recipe.datasets.calibration.folders)
    return {
        "network": recipe.name,
        "scale": recipe.scale,
        "weight_bits": section.weight_bits,
        "activation_bits": section.activation_bits,
        "other_bits": section.other_bits,
        "scope": section.scope,
        "compress_to_fp16": recipe.export.compress_to_fp16,
        "pad_multiple": multiple,
        "static": static,
        "preprocessing": "u8_nhwc" if recipe.export.u8_nhwc else "f32_nchw",
        "device": recipe.export.device,
        "tested_on_device": recipe.export.device == "CPU",
        "plugin_version": __version__,
        "calibration": [f.name if f.is_absolute() else f.as_posix() for f in folders],
    }


def tile_size(recipe: Recipe, multiple: int) -> int:
    """Height and width that the network is traced with."""
    return -(-recipe.export.tile // multiple) * multiple


def example_image(height: int, width: int | None = None) -> Tensor:
    """A reproducible noisy gradient, ``(1, 3, height, width)`` in [0, 1], to trace and compare on."""
    size = (height, height if width is None else width)
    down, right = torch.linspace(0, 1, size[0])[:, None], torch.linspace(0, 1, size[1])
    image = torch.stack([right.expand(size), down.expand(size), right.flip(0).expand(size)])
    noise = torch.rand(image.shape, generator=torch.Generator().manual_seed(0))
    return (0.8 * image + 0.2 * noise)[None]
