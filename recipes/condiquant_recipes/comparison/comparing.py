"""``condiquant compare``: every method on one float network, side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import nncf
import openvino as ov
import torch
from torch import nn

import condiquant_openvino as openvino_host
from condiquant_plugin import __version__
from condiquant_plugin.errors import InputError
from condiquant_plugin.layerwise import precision
from condiquant_plugin.layerwise.precision import LayerBits
from condiquant_recipes.comparison.contenders import (
    all_contenders,
    choose,
    condiquant_id,
    trained_contender,
)
from condiquant_recipes.comparison.crops import CROPS, worst_places, write_crops
from condiquant_recipes.comparison.job import Calibrated, Contender, Job
from condiquant_recipes.comparison.measuring import measured
from condiquant_recipes.comparison.scoring import (
    SCORES,
    Row,
    derive,
    keeping_reason,
    measure_latency,
    score_set,
)
from condiquant_recipes.exporting import example_image, tile_size, write_ir
from condiquant_recipes.float_export import float_ir
from condiquant_recipes.progress import Progress
from condiquant_recipes.recipe import Recipe, with_export
from condiquant_recipes.source import code_digest, load_source
from condiquant_recipes.workspace import Workspace, remove, write_metrics

_FLOAT, _REPORT, _PAGE = "float", "compare.json", "compare.html"


def compare(
    recipe: Recipe,
    data: Path,
    out: Path,
    *,
    sets: Sequence[str] = (),
    methods: Sequence[str] = (),
    also: Sequence[Path] = (),
    resume: bool = False,
    overwrite: bool = False,
    command: str = "",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Calibrate, export and measure all methods; writes ``compare.json`` and ``methods/``: IRs, crops.

    All start from the same float network and see the same calibration crops; all accuracies are those of
    IRs on the CPU plugin with float operators in f32. A network whose IR must be static is calibrated on
    crops of that size, of which there are fewer, with as many pixels in all; else all IRs are dynamic.

    Args:
        data: folder that holds the calibration folders and the test sets, where the recipe names no
            training set.
        sets: test sets instead of the recipe's.
        methods: ids of :func:`condiquant_recipes.comparison.contenders.all_contenders`; by default all.
        also: experiments of ``condiquant train``, whose networks become rows as they are.
        resume: keep the methods that an earlier call with the same recipe, folder and versions finished;
            those of a finished comparison are kept anyway.
        overwrite: drop what another comparison left in ``out``, or the same one.
        command: what the report should say it was made with.

    Returns:
        The content of ``compare.json``. A method that failed has its row with a ``reason``.

    Raises:
        InputError: on bad input, before anything is computed where possible.
    """
    progress = progress or Progress()
    trained = [trained_contender(experiment) for experiment in also]
    chosen = [*choose(all_contenders(recipe), methods), *trained]
    _check_export(recipe)
    names = list(dict.fromkeys(sets or recipe.datasets.test))
    if not names:
        raise InputError(
            "there is no test set: name one in datasets.test or with --sets, or add datasets.val"
        )
    source = load_source(recipe, data, names, progress)
    known = [*all_contenders(recipe), *trained]
    folders = {method.id: out / "methods" / method.id for method in known}
    versions = {
        "openvino": ov.get_version(),
        "nncf": nncf.__version__,
        "torch": torch.__version__,
        "condiquant_plugin": __version__,
    }
    old = (out / CROPS, out / _REPORT, out / _PAGE)
    Workspace.create(
        out / "methods",
        recipe,
        source.network,
        data,
        resume=resume,
        overwrite=overwrite,
        also={
            "export": recipe.export.model_dump(),
            "versions": versions,
            "also": [str(experiment.resolve()) for experiment in also],
            **code_digest(recipe),
        },
        stale=(*folders.values(), *old),
        report=out / _REPORT,
    )

    with progress.status("converting the float network"):
        in_float = float_ir(source.network, recipe, source.multiple)
    image = example_image(tile_size(recipe, source.multiple))
    if in_float.is_dynamic():
        used = with_export(recipe, {"static": False})
    else:
        used = _static(recipe, image.shape[2])
    if used.datasets != recipe.datasets:
        source = load_source(used, data, names)
    job = Job(used, source, in_float, progress)
    rows = []
    for number, method in enumerate(chosen, 1):
        label = f"{number}/{len(chosen)} {method.label}"
        row = _calibrated(method, job, folders[method.id], label)
        _score(row, job, folders, label)
        if method.id == _FLOAT and row["reason"]:
            raise InputError(f"the float network: {row['reason']}")
        rows.append(row)

    with progress.status("measuring latency, all IRs in turns"):
        measure_latency(rows, folders, image)
    derive(rows, names)
    subject = _subject(rows, recipe)
    section = used.datasets
    report = {
        "recipe": recipe.name,
        "scale": recipe.scale,
        "sets": names,
        "reference": section.reference,
        "image_shape": list(image.shape),
        "versions": versions,
        "seed": recipe.seed,
        "calibration": {
            "name": ", ".join(section.calibration_names),
            "count": section.calibration.count,
            "crop": section.calibration.crop,
        },
        "distillation_iterations": recipe.condiquant.distillation.iterations,
        "command": command,
        "rows": [
            {k: v for k, v in row.items() if k not in ("layers", "precision")} for row in rows
        ],
        "precision": {row["label"]: row["precision"] for row in rows if row.get("precision")},
        "layers": _layers(subject) if subject is not None else [],
        "crops": [],
    }
    for path in reversed(old):  # the crops last: what shows them must not stay without them
        remove(path)
    if subject is not None:
        finished = {row["id"]: folders[row["id"]] for row in rows if not row["reason"]}
        places = worst_places(folders[subject["id"]], folders[_FLOAT], source.test_sets)
        reference = _FLOAT if section.reference == "float" else None
        report["crops"] = write_crops(
            places, finished, source.test_sets, recipe.scale, out, reference
        )
    write_metrics(out / _REPORT, report)
    written: dict[str, Any] = json.loads((out / _REPORT).read_text())
    return written


def _check_export(recipe: Recipe) -> None:
    if recipe.export.u8_nhwc:
        raise InputError("compare measures IRs of float images: leave out export.u8_nhwc")
    if recipe.export.device != "CPU":
        raise InputError(
            f"compare measures on the CPU: leave out export.device={recipe.export.device}"
        )


def _static(recipe: Recipe, size: int) -> Recipe:
    """The recipe for IRs of one size: calibration crops have it too, and as many pixels in all."""
    section = recipe.datasets.calibration
    share = (section.crop / size) ** 2
    changes = {
        "crop": size,
        "count": max(round(section.count * share), 1),
        "held_out": max(round(section.held_out * share), 1),
    }
    datasets = recipe.datasets.model_copy(
        update={"calibration": section.model_copy(update=changes)}
    )
    export_section = recipe.export.model_copy(update={"static": True})
    return recipe.model_copy(update={"datasets": datasets, "export": export_section})


def _calibrated(method: Contender, job: Job, folder: Path, label: str) -> Row:
    """The row of a method, with its IR saved; that of an earlier call if it finished."""
    file = folder / "row.json"
    if file.exists():
        finished: Row = json.loads(file.read_text())
        if finished["reason"] is None:
            return finished
    remove(folder)
    folder.mkdir(parents=True)
    row: Row = {
        "id": method.id,
        "label": method.label,
        "group": method.group,
        **_bits(method.bits),
        "reason": None,
        "notes": [],
        **{key: {} for key in SCORES},
        **dict.fromkeys(("bin_bytes", "xml_bytes", "calibration_seconds", "peak_memory_bytes")),
        "layers": [],
    }
    torch.manual_seed(job.recipe.seed)
    with keeping_reason(row), job.progress.status(f"{label}: calibrating"):
        found = measured(lambda: method.calibrate(job))
        row["calibration_seconds"] = found.seconds
        row["peak_memory_bytes"] = found.peak_memory_bytes
        row |= _save(found.result, method, job, folder)
    write_metrics(file, row)
    return row


def _save(calibrated: Calibrated, method: Contender, job: Job, folder: Path) -> Row:
    """Write ``model.xml``; what is known about it afterwards."""
    if isinstance(calibrated.model, nn.Module):
        assert calibrated.recipe is not None
        figures, *_ = write_ir(
            calibrated.model, calibrated.recipe, job.source.multiple, folder, job.progress
        )
        notes = figures["notes"]
    else:
        metadata = {
            "network": job.recipe.name,
            "scale": job.recipe.scale,
            "pad_multiple": job.source.multiple,
            "method": method.id,
        }
        openvino_host.set_metadata(calibrated.model, metadata)
        figures = openvino_host.save(
            calibrated.model,
            folder / "model.xml",
            compress_to_fp16=job.recipe.export.compress_to_fp16,
        )
        notes = []
    sizes = {key: figures[key] for key in ("bin_bytes", "xml_bytes")}
    given = method.bits._replace(weight=calibrated.weight_bits or method.bits.weight)
    of_layers: Mapping[str, LayerBits] = {}
    if isinstance(calibrated.model, nn.Module):
        of_layers = precision.layer_bits(calibrated.model)
        given = precision.usual(of_layers)
    layers = [
        asdict(report) | {"bits": of_layers.get(report.name, given).weight}
        for report in calibrated.layers
    ]
    found = {}
    if calibrated.precision is not None:
        found = {"precision": asdict(calibrated.precision)}
    return {
        **sizes,
        **_bits(given),
        **found,
        "notes": [*calibrated.notes, *notes],
        "layers": layers,
    }


def _bits(bits: LayerBits) -> Row:
    return {"weight_bits": bits.weight, "activation_bits": bits.activation}


def _score(row: Row, job: Job, folders: Mapping[str, Path], label: str) -> None:
    """Add the scores on the test sets that the row has none of."""
    folder = folders[row["id"]]
    for name, pairs in job.source.test_sets.items():
        if row["reason"] or name in row["psnr"]:
            continue
        with keeping_reason(row), job.progress.bar(f"{label} on {name}", len(pairs)) as advance:
            scores = score_set(folder, folders[_FLOAT], name, pairs, job.recipe, advance)
            for key, value in scores.items():
                row[key][name] = value
        write_metrics(folder / "row.json", row)


def _subject(rows: Sequence[Row], recipe: Recipe) -> Row | None:
    """The row whose layers and worst places are shown: CondiQuant's at the recipe's bits, or the last."""
    measured = [row for row in rows if not row["reason"] and row["group"] != _FLOAT]
    own = [row for row in measured if row["id"] == condiquant_id(recipe)]
    return next(iter([*own, *reversed(measured)]), None)


def _layers(row: Row) -> list[Row]:
    keys = (
        "name",
        "bits",
        "condition_before",
        "condition_after",
        "output_error",
        "quantized_output_error_before",
        "quantized_output_error_after",
    )
    return [{key: layer[key] for key in keys} for layer in row["layers"]]
