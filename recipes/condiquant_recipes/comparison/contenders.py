"""The methods that ``condiquant compare`` sets side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from nncf import QuantizationPreset

from condiquant_openvino.running.upscaling import compile_ir
from condiquant_openvino.writing.passes.compaction import compact
from condiquant_openvino.writing.passes.simplification import simplify
from condiquant_plugin.errors import InputError
from condiquant_plugin.layerwise import precision
from condiquant_plugin.layerwise.precision import LayerBits
from condiquant_plugin.uniform.bits import FLOAT_BITS
from condiquant_recipes.comparison import neural_compressor
from condiquant_recipes.comparison import nncf as comparison_nncf
from condiquant_recipes.comparison.job import MIXED, Calibrated, Contender, Group, Job
from condiquant_recipes.precision.rules import with_bits
from condiquant_recipes.precision.search import INPUT_BITS
from condiquant_recipes.recipe import Recipe, ReconditionSection
from condiquant_recipes.run import calibrate_network, distill_network
from condiquant_recipes.training.experiment import is_experiment, trained_network

_LOW_BITS = (4, 3, 2)
_FLOAT = LayerBits(FLOAT_BITS, FLOAT_BITS)
_INT8, _SMALL = LayerBits(8, 8), LayerBits(4, 8)
"""Of ``condiquant run --preset``."""
_ROUNDING = 1e-4


def condiquant_id(recipe: Recipe) -> str:
    """The row of CondiQuant at the recipe's own bits."""
    return f"condiquant-{recipe.bits.label}"


def all_contenders(recipe: Recipe) -> list[Contender]:
    """Every method, in the order of the table."""
    widths = sorted({recipe.bits, *(LayerBits(b, b) for b in _LOW_BITS)}, reverse=True)
    found = [
        Contender("float", "float", "float", _FLOAT, _float_graph),
        Contender(
            "float-simplified",
            "float, our graph",
            "float",
            _FLOAT,
            _float_simplified,
        ),
        *comparison_nncf.int8_contenders(),
        Contender(
            "nncf-int8-our-graph",
            "NNCF int8, our graph",
            "nncf-int8",
            _INT8,
            comparison_nncf.int8({"preset": QuantizationPreset.PERFORMANCE}, _simplified),
        ),
        *comparison_nncf.weight_contenders(),
        Contender(
            "neural-compressor-int8",
            "Neural Compressor int8",
            "neural-compressor",
            _INT8,
            neural_compressor.static_int8,
        ),
        *_low_bit("nncf-minmax", "NNCF MinMax", "nncf-low-bit", widths, comparison_nncf.minmax),
        *_low_bit(
            "2dquant-dobi",
            "2DQuant, DOBI only",
            "2dquant",
            widths,
            partial(_fake_quantized, recondition=False, distillation={"iterations": 0}),
        ),
        *_low_bit(  # which freezes the weights
            "2dquant",
            "2DQuant",
            "2dquant",
            widths,
            partial(_fake_quantized, recondition=False, distillation={"weights": False}),
        ),
        Contender(
            "condiquant-int8",
            "CondiQuant, then NNCF int8",
            "condiquant",
            LayerBits(8, 8),
            comparison_nncf.condiquant_int8,
        ),
        *_low_bit(
            "condiquant-no-dqc",
            "CondiQuant, no DQC",
            "condiquant",
            widths,
            partial(_fake_quantized, distillation={"iterations": 0}),
        ),
        *_low_bit("condiquant", "CondiQuant", "condiquant", widths, _fake_quantized),
    ]
    ids = {contender.id for contender in found}
    presets = [
        *_low_bit(
            "condiquant-no-dqc",
            "CondiQuant, no DQC",
            "condiquant",
            [_INT8],
            partial(_fake_quantized, distillation={"iterations": 0}),
        ),
        *_low_bit("condiquant", "CondiQuant", "condiquant", [_SMALL], _fake_quantized),
    ]
    mixed = [
        Contender(
            f"condiquant-mixed-w{width}",
            f"CondiQuant mixed, as large as W{width}A{INPUT_BITS}",
            "condiquant",
            LayerBits(width, INPUT_BITS),
            partial(_mixed, width=width),
        )
        for width in MIXED
    ]
    return [*found, *(contender for contender in presets if contender.id not in ids), *mixed]


def trained_contender(experiment: Path) -> Contender:
    """The network of an experiment of ``condiquant train`` beside the methods, as it is.

    Raises:
        InputError: no experiment, or one of a float network.
    """
    if not is_experiment(experiment):
        raise InputError(f"--also {experiment} is no experiment of `condiquant train`")
    recipe, network, origin = trained_network(experiment)

    def take(job: Job) -> Calibrated:
        if recipe.scale != job.recipe.scale:
            raise InputError(f"{recipe.name} is of scale {recipe.scale}, not {job.recipe.scale}")
        exported = recipe.model_copy(update={"export": job.recipe.export})
        return Calibrated(network, exported, notes=[f"trained beforehand: {origin}"])

    bits = precision.usual(precision.layer_bits(network))
    return Contender(f"trained-{recipe.name}", recipe.name, "trained", bits, take)


def choose(methods: Iterable[Contender], ids: Iterable[str]) -> list[Contender]:
    """Those with the given ids, all if there are none; the float network is always among them.

    Raises:
        InputError: an unknown id; names the known ones.
    """
    known, wanted = {method.id: method for method in methods}, set(ids)
    if unknown := sorted(wanted - known.keys()):
        raise InputError(f"no method {unknown[0]!r}; there are: {', '.join(known)}")
    return [m for m in known.values() if not wanted or m.id in wanted | {"float"}]


def _low_bit(
    name: str,
    label: str,
    group: Group,
    widths: Iterable[LayerBits],
    calibrate: Callable[..., Calibrated],
) -> list[Contender]:
    """A method at every pair of bit-widths."""
    return [
        Contender(
            f"{name}-{bits.label}",
            f"{label} {bits.label.upper()}",
            group,
            bits,
            partial(calibrate, weight_bits=bits.weight, activation_bits=bits.activation),
        )
        for bits in widths
    ]


def _float_graph(job: Job) -> Calibrated:
    return Calibrated(job.float_ir.clone())


def _simplified(job: Job) -> ov.Model:
    model = job.float_ir.clone()
    simplify(model)
    compact(model)
    model.validate_nodes_and_infer_types()
    return model


def _float_simplified(job: Job) -> Calibrated:
    """What our exporter does to the float graph, and nothing else."""
    model = _simplified(job)
    image = job.source.crops[:1].numpy()
    expected, result = (compile_ir(ir)(image)[0] for ir in (job.float_ir, model))
    difference = float(np.abs(result - expected).max() / np.ptp(expected))
    if difference > _ROUNDING:
        raise RuntimeError(f"the simplified graph differs by {difference:.2g} of the range")
    note = (
        "float operators and constants as our exporter writes them (DepthToSpace, no empty Pad, "
        "constants as tables): what the graph alone gives the rows of 2DQuant and CondiQuant"
    )
    return Calibrated(model, notes=[note])


def _mixed(job: Job, width: int) -> Calibrated:
    """The recipe with the most faithful bits for the bytes of ``width``-bit weights."""
    found = job.mixed[width]
    products = found.bits.keys() - found.sensitivity["weights"]
    recipe = with_bits(job.recipe, found.bits, products)
    result = calibrate_network(job.source, recipe)
    distill_network(result.model, result.layers, job.source, recipe, job.progress)
    counts = Counter(found.bits[name].weight for name in found.sensitivity["weights"])
    weights = ", ".join(f"{count} of {bits} bits" for bits, count in sorted(counts.items()))
    notes = [f"weights: {weights}; the search counts in the first row that needs it"]
    return Calibrated(result.model, recipe, result.reports, notes, precision=found)


def _fake_quantized(
    job: Job,
    weight_bits: int,
    activation_bits: int,
    *,
    recondition: bool = True,
    distillation: dict[str, Any] | None = None,
) -> Calibrated:
    """The recipe at other bits.

    Args:
        recondition: False leaves the weights as trained and rounds each to its nearest level.
        distillation: values instead of the recipe's; by default its own.
    """
    section, source = job.recipe.condiquant, job.source
    changes: dict[str, Any] = {
        "weight_bits": weight_bits,
        "activation_bits": activation_bits,
        "distillation": replace(section.distillation, **(distillation or {})),
    }
    if not recondition:
        changes |= {
            "recondition": ReconditionSection(enabled=False),
            "rounding": "nearest",
            "transform": "none",
            "softmax_scale": "tensor",
        }
    recipe = job.recipe.model_copy(update={"condiquant": section.model_copy(update=changes)})
    result = calibrate_network(source, recipe)
    distill_network(result.model, result.layers, source, recipe, job.progress)
    others = "float" if section.other_bits is None else f"{section.other_bits} bits"
    notes = [
        f"2DQuant here has the recipe's bounds per {section.weight_granularity} of weights, "
        f"and its other layers are {others}"
    ]
    return Calibrated(result.model, recipe, result.reports, [] if recondition else notes)
