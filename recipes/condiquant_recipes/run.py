"""The main job: float network to evaluated low-bit network and OpenVINO IR."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

import condiquant_basicsr as basicsr_host
import condiquant_nncf as nncf_host
from condiquant_plugin.calibration import Calibration
from condiquant_plugin.distillation import DistillationResult, distill
from condiquant_plugin.layerwise import precision
from condiquant_plugin.layerwise.problem import LayerReport
from condiquant_plugin.methods.condiquant.reconditioning import ReconditioningReport
from condiquant_plugin.methods.gptq.rounding import RoundingReport
from condiquant_recipes import settings
from condiquant_recipes.expected_time import expected_time
from condiquant_recipes.exporting import check_convertible, saying
from condiquant_recipes.finished import complete, exported
from condiquant_recipes.plausibility import range_warning
from condiquant_recipes.precision import search
from condiquant_recipes.precision.costs import SharedCosts
from condiquant_recipes.precision.picture import draw_sensitivity
from condiquant_recipes.precision.target import Target
from condiquant_recipes.progress import Progress
from condiquant_recipes.recipe import CondiQuantSection, Recipe
from condiquant_recipes.source import Source, code_digest, load_source
from condiquant_recipes.workspace import CROPS, SENSITIVITY, Workspace, digest_of, write_metrics

_PRECISION = "precision"
"""The stage that finds bits for a target."""


@dataclass(frozen=True)
class CalibratedNetwork:
    """The network after calibration."""

    model: nn.Module
    layers: list[nncf_host.Layer]
    calibration: Calibration


def run(
    recipe: Recipe,
    data: Path,
    out: Path,
    *,
    sets: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    target: Target | None = None,
    float_folder: Path | None = None,
    costs: SharedCosts | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run a recipe; writes ``metrics.json``, ``model.xml``/``.bin``, ``quantized.safetensors``.

    With a target ``sensitivity.svg``, too.

    Args:
        data: folder that holds the calibration folders and the test sets.
        sets: test sets instead of the recipe's.
        resume: keep the stages that an earlier call with the same recipe, crops and folder finished; those
            of a finished run are kept anyway, all of them with nothing computed again.
        overwrite: drop what another run left in ``out``, or without ``resume`` the same one.
        target: find the bits of every layer that keep this promise, instead of the recipe's.
        float_folder: where the float network's scores and IR are kept for several runs.
        costs: what layers' bits cost, kept for several targets of one recipe.

    Returns:
        The content of ``metrics.json``.

    Raises:
        InputError: on bad input, or another run in ``out``, before anything is computed where possible.
    """
    progress = progress or Progress()
    torch.manual_seed(recipe.seed)
    names = list(sets or recipe.datasets.test)
    source = load_source(recipe, data, names, progress)
    warning = range_warning(source.network, recipe, source.held_out)
    if warning is not None:
        progress.note(warning)
    crops = digest_of({"crops": source.crops, "held_out": source.held_out})
    also = {**code_digest(recipe), CROPS: crops}
    found: dict[str, Any] | None = None
    if target is not None:
        known = None
        if resume:
            known = Workspace(out).finished_with(_PRECISION, source.network, data, also)
        recipe, found = search.targeted(recipe, source, data, target, known, progress, costs)
    workspace = Workspace.create(
        out,
        recipe,
        source.network,
        data,
        resume=resume,
        overwrite=overwrite,
        also=also,
    )
    if found is not None:
        workspace.finish(_PRECISION, found)
    if workspace.reused:
        with progress.status(f"keeping the stages that {out} has of this run (not: --overwrite)"):
            done = complete(workspace, recipe, names, found)
        if done is not None:
            return done
    elif target is None:
        expected = expected_time(source.network, recipe, source.held_out)
        iterations = recipe.condiquant.distillation.iterations
        more = f", and what {', '.join(names)} take" if names else ""
        progress.note(f"this is expected to take {expected.text(iterations)}{more}")

    float_workspace = None
    if float_folder is not None:
        float_workspace = _of_float_network(float_folder, source, recipe, data)
    quantized = _calibrated(workspace, source, recipe, progress)
    calibration = quantized.calibration
    seconds = dict(calibration.seconds)
    if recipe.condiquant.distillation.iterations and workspace.finished("distilled") is None:
        with progress.status("converting the network, to see that it can be exported"):
            check_convertible(quantized.model, recipe, source.multiple)
    keeping = float_workspace or workspace
    float_scores = _evaluated(keeping, "float", source.network, source, recipe, progress)
    distilled = _distilled(workspace, quantized, source, recipe, progress)
    seconds["distillation"] = distilled.pop("seconds")
    scores = _evaluated(workspace, "quantized", quantized.model, source, recipe, progress)
    kept = f"the trained network is kept in {out}: once this is mended, run condiquant export {out}"
    with saying(kept):
        ir = exported(
            workspace, quantized.model, recipe, source.multiple, progress, float_workspace
        )
    seconds["export"] = ir.seconds
    missed = None if target is None else target.missed(ir.figures)

    bits = precision.layer_bits(quantized.model)
    usual = precision.usual(bits)
    metrics = {
        "model": recipe.name,
        "scale": recipe.scale,
        "weight_bits": usual.weight,
        "activation_bits": usual.activation,
        "other_bits": precision.others(bits),
        "reference": recipe.datasets.reference,
        "warnings": [each for each in (warning, missed) if each is not None],
        "float": float_scores,
        "quantized": scores,
        "fidelity": _fidelity(quantized.model, source, recipe.scale),
        "weights": {
            "chosen": calibration.chosen,
            "fidelity_db": calibration.fidelity,
            "equalized": calibration.equalized,
        },
        "layers": _layer_rows(calibration, bits),
        "distillation": distilled,
        "seconds": seconds,
        "ir": ir.figures,
    }
    if found is not None:
        metrics["precision"] = found
        draw_sensitivity(found, out / SENSITIVITY)
    write_metrics(out / "metrics.json", metrics)
    return metrics


def _of_float_network(folder: Path, source: Source, recipe: Recipe, data: Path) -> Workspace:
    """What the float network alone decides, whatever is made of it."""
    plain = recipe.model_copy(update={"condiquant": CondiQuantSection()})
    also = code_digest(recipe)
    return Workspace.create(
        folder, plain, source.network, data, resume=True, overwrite=True, also=also
    )


@torch.no_grad()
def _fidelity(model: nn.Module, source: Source, scale: int) -> float:
    """PSNR to the float output on the held-out crops, as test sets are scored, in dB."""
    outputs = [[net(x)[0] for x in source.held_out.split(1)] for net in (model, source.network)]
    pairs = zip(*outputs, strict=True)
    return mean(basicsr_host.psnr(ours, theirs, scale) for ours, theirs in pairs)


def _layer_rows(
    calibration: Calibration, bits: Mapping[str, precision.LayerBits]
) -> list[dict[str, Any]]:
    rounding = {report.name: asdict(report) for report in calibration.rounding}
    return [
        asdict(report)
        | rounding.get(report.name, {})
        | {
            "bits": bits[report.name].weight,
            "activation_bits": bits[report.name].activation,
        }
        for report in calibration.reports
    ]


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
) -> CalibratedNetwork:
    if (record := workspace.finished("calibrated")) is not None:
        model, layers = rebuild(source.network, source.crops, recipe)
        workspace.restore("calibrated", model)
        return CalibratedNetwork(model, layers, _calibration(record))
    with progress.status("searching bounds, reconditioning and rounding weights"):
        result = calibrate_network(source, recipe)
    workspace.finish("calibrated", asdict(result.calibration), result.model)
    return CalibratedNetwork(result.model, result.layers, result.calibration)


def calibrate_network(source: Source, recipe: Recipe) -> nncf_host.QuantizedNetwork:
    """The network as a recipe has it before distillation."""
    return nncf_host.quantize_network(
        source.network,
        source.crops,
        settings.quantization(recipe),
        bounds_crops=recipe.condiquant.bounds.crops,
        held_out=source.held_out,
    )


def _calibration(record: Mapping[str, Any]) -> Calibration:
    reports: list[LayerReport] = [ReconditioningReport(**report) for report in record["reports"]]
    rounding: list[LayerReport] = [RoundingReport(**report) for report in record["rounding"]]
    return Calibration(**{**record, "reports": reports, "rounding": rounding})


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
    workspace: Workspace,
    quantized: CalibratedNetwork,
    source: Source,
    recipe: Recipe,
    progress: Progress,
) -> dict[str, Any]:
    if (record := workspace.finished("distilled")) is not None:
        workspace.restore("distilled", quantized.model)
        return record
    started = time.perf_counter()
    result = distill_network(
        quantized.model, quantized.layers, source, recipe, progress, workspace.distillation_path
    )
    record = {**asdict(result), "seconds": time.perf_counter() - started}
    workspace.finish("distilled", record, quantized.model)
    return record


def distill_network(
    model: nn.Module,
    layers: Sequence[nncf_host.Layer],
    source: Source,
    recipe: Recipe,
    progress: Progress,
    checkpoint: Path | None = None,
) -> DistillationResult:
    """Train a quantized network in place to follow the float one, with a progress bar."""
    config = recipe.condiquant.distillation
    if not config.iterations:
        return DistillationResult(0.0, 0.0, 0, 0)
    with progress.bar("distillation", config.iterations) as advance:
        return distill(
            model,
            source.network,
            source.crops,
            source.held_out,
            config,
            trainable_weights=nncf_host.trainable_weights(model, layers),
            blocks=nncf_host.feature_blocks(source.network, layers),
            seed=recipe.seed,
            checkpoint=checkpoint,
            progress=lambda iteration, loss: advance(f"loss {loss:.5f}", iteration),
        )
