"""Every host's entry behind one signature, and one view of what each returns."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import nncf
import numpy as np
import openvino as ov
import torch
from torch import Tensor

import condiquant_nncf
from algorithm_networks import constants, fake_quantizes, infer
from condiquant_brevitas import quantize_sr
from condiquant_plugin import fake_quantizers
from condiquant_plugin.configuration import QuantizationConfig
from condiquant_recipes.recipe import Recipe
from condiquant_recipes.training.jobs import NNCFQuantizer
from networks import SECTIONS

STUBS = ".product_stubs."
"""Where Brevitas keeps the quantizers of the factors of a product."""


@dataclass
class Quantized:
    """A quantized network, whichever host made it."""

    model: Any
    output: Callable[[Tensor], Tensor]
    bounds: dict[str, tuple[Tensor, Tensor]]
    """Lowest and highest level, by the names of quantizers that NNCF gives."""
    learned: dict[str, tuple[Tensor, Tensor]] | None
    """Bounds that distillation would train; an IR has none."""
    weights: dict[str, Tensor]
    """Weights and biases by their names in the network, as floats."""
    report: dict[str, float] | None
    """Condition number after reconditioning, by layer; ``None`` where the entry gives no report."""


@torch.no_grad()
def _computed(model, images):
    return model(images)


def _of_torch(model, report) -> Quantized:
    bounds, learned = {}, {}
    for quantizer in fake_quantizers(model).values():
        if quantizer.in_float:
            continue
        name = quantizer.name.replace(STUBS, "/matmul/")
        grid = quantizer.snapped()
        highest = grid.lower + grid.step * (2**quantizer.bits - 1)
        bounds[name] = grid.lower.detach(), highest.detach()
        learned[name] = quantizer.lower.detach(), quantizer.upper.detach()
    return Quantized(
        model,
        lambda images: _computed(model, images),
        bounds,
        learned,
        {n: p.detach() for n, p in model.named_parameters() if n.endswith(("weight", "bias"))},
        report and {r.name: r.condition_after for r in report},
    )


def by_network(network, crops, *, bounds_crops=32, **settings) -> Quantized:
    """NNCF's ``quantize_network``; crops in any form that it takes."""
    config = condiquant_nncf.QuantizationConfig(**settings)
    result = condiquant_nncf.quantize_network(network, crops, config, bounds_crops=bounds_crops)
    return _of_torch(result.model, result.reports)


def by_brevitas(network, crops, **settings) -> Quantized:
    """Brevitas' ``quantize_sr``."""
    bounds_crops = settings.pop("bounds_crops", 32)
    config = QuantizationConfig(**settings)
    model = quantize_sr(network, crops, config, bounds_crops=bounds_crops)
    return _of_torch(model, list(model.report.values()))


def _batches(crops):
    return [x[None] if x.ndim == 3 else x for x in crops]


def _by_pipeline(model, items, *, bounds_crops=32, **settings):
    own = {key: settings.pop(key) for key in ("weight_bits", "activation_bits") if key in settings}
    reports = []
    result = condiquant_nncf.quantize(
        model,
        nncf.Dataset(items),
        reports=reports,
        advanced_parameters=condiquant_nncf.AdvancedCondiQuantParameters(
            **settings, bounds_crops=bounds_crops
        ),
        **own,
    )
    return result, reports


def by_pipeline(network, crops, **settings) -> Quantized:
    """NNCF's pipeline on torch; every crop, or batch of crops, is an item of the dataset."""
    model, reports = _by_pipeline(network, _batches(crops), **settings)
    return _of_torch(model, reports)


def converted(network, crops) -> ov.Model:
    return ov.convert_model(network, example_input=crops[:1])


def by_ir(network, crops, **settings) -> Quantized:
    """NNCF's pipeline on an ``ov.Model``, which a torch network is converted to."""
    subject = network
    items = _batches(crops)
    if not isinstance(network, ov.Model):
        subject = converted(network, items[0] if items else torch.rand(1, 3, 16, 16))
    model, reports = _by_pipeline(subject, [x.numpy() for x in items], **settings)
    nodes = fake_quantizes(model)
    bounds = {
        name: tuple(torch.tensor(node.input_value(i).get_node().data).float() for i in (1, 2))
        for name, node in nodes.items()
    }
    weights = {
        name.removeprefix("self."): torch.tensor(np.array(data))
        for name, data in constants(model).items()
        if name.startswith("self.") and name.endswith(("weight", "bias"))
    }
    return Quantized(
        model,
        lambda images: torch.from_numpy(infer(model, images)),
        bounds,
        None,
        weights,
        {r.name: r.condition_after for r in reports},
    )


def by_training(network, crops, *, name, bounds_crops=32, recondition="auto", **settings):
    """What CondiQuantModel calls, without training."""
    section = {**settings, "bounds": {"crops": bounds_crops}, "distillation": {"iterations": 0}}
    if recondition is None:
        section["recondition"] = {"enabled": False}
    elif recondition != "auto":
        keys = ["objective"]
        keys += ["strength", "steps"] if recondition.objective == "condition" else []
        section["recondition"] = {key: getattr(recondition, key) for key in keys}
    recipe = Recipe(
        name="tiny",
        scale=2,
        network_g=SECTIONS[name],
        path={"pretrain_network_g": "net.pth"},
        condiquant=section,
    )
    return _of_torch(NNCFQuantizer(recipe).quantize(network, crops).model, None)


TORCH_ENTRIES = {"network": by_network, "pipeline": by_pipeline, "brevitas": by_brevitas}
ENTRIES = {**TORCH_ENTRIES, "ir": by_ir}
