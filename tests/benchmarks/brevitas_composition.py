"""CondiQuant among Brevitas' own modes on DAT-light x4: linear layers, weights and activations at 4 bits.

CONDIQUANT_DATA=... python tests/benchmarks/brevitas_composition.py [text in a row's name ...]

The number is the fidelity (PSNR between outputs) to the float network on calibration photographs that
were not calibrated on, 4 calibration crops of 32 x 32 pixels.
"""

import os
import sys
import time
from copy import deepcopy
from functools import partial
from pathlib import Path
from statistics import mean

import torch
from brevitas import nn as qnn
from brevitas.graph.calibrate import bias_correction_mode, calibration_mode
from brevitas.graph.equalize import activation_equalization_mode
from brevitas.graph.gpfq import gpfq_mode
from brevitas.graph.gptq import gptq_mode
from brevitas.graph.quantize import layerwise_quantize
from torch import nn

from condiquant_basicsr import evaluate_pair
from condiquant_brevitas import (
    LearnedBoundsActPerTensor,
    LearnedBoundsWeightPerTensor,
    condiquant_mode,
)
from condiquant_recipes.recipe import load_recipe
from condiquant_recipes.source import load_source

BITS = 4
SETTINGS = {
    "weight_quant": LearnedBoundsWeightPerTensor,
    "weight_bit_width": BITS,
    "input_quant": LearnedBoundsActPerTensor,
    "input_bit_width": BITS,
    "return_quant_tensor": False,
}


def float_layers(model):
    """Convolutions, and the position-bias networks, whose input is not the image."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) or (isinstance(module, nn.Linear) and ".pos." in name)
    ]


def quantize(model, crops):
    layers = {nn.Linear: (qnn.QuantLinear, SETTINGS)}
    model = layerwise_quantize(model, layers, name_blacklist=float_layers(model))
    with calibration_mode(model):
        model(crops)
    model(crops[:1])
    return model


def recondition(model, crops, **settings):
    quantized = any(isinstance(module, qnn.QuantLinear) for module in model.modules())
    left = [] if quantized else float_layers(model)
    with condiquant_mode(model, name_blacklist=left, **settings) as condiquant:
        condiquant.model(crops)
        condiquant.update()
    return model


def layer_by_layer(mode_class, model, crops):
    with mode_class(model) as mode:
        for _ in range(mode.num_layers):
            mode.model(crops)
            mode.update()
    return model


def correct_biases(model, crops):
    with bias_correction_mode(model):
        model(crops)
    return model


def equalize(model, crops):
    with activation_equalization_mode(model, 0.5, blacklist_layers=float_layers(model)):
        model(crops)
    return model


condition = recondition
least_squares = partial(recondition, objective="least_squares")
gptq, gpfq = partial(layer_by_layer, gptq_mode), partial(layer_by_layer, gpfq_mode)
ROWS = {
    "as trained": [quantize],
    "`condition`": [condition, quantize],
    "`least_squares`": [quantize, least_squares],
    "`least_squares`, `update_bias=True`": [quantize, partial(least_squares, update_bias=True)],
    "`gptq_mode`": [quantize, gptq],
    "`condition`, `gptq_mode`": [condition, quantize, gptq],
    "`least_squares`, `gptq_mode`": [quantize, least_squares, gptq],
    "`gptq_mode`, `condition`": [quantize, gptq, condition],
    "`gpfq_mode`": [quantize, gpfq],
    "`condition`, `gpfq_mode`": [condition, quantize, gpfq],
    "`least_squares`, `gpfq_mode`": [quantize, least_squares, gpfq],
    "`gpfq_mode`, `condition`": [quantize, gpfq, condition],
    "`bias_correction_mode`": [quantize, correct_biases],
    "`condition`, `bias_correction_mode`": [condition, quantize, correct_biases],
    "`least_squares`, `bias_correction_mode`": [quantize, least_squares, correct_biases],
    "`activation_equalization_mode`": [equalize, quantize],
    "`activation_equalization_mode`, `condition`": [equalize, condition, quantize],
    "`activation_equalization_mode`, `least_squares`": [equalize, quantize, least_squares],
}


@torch.no_grad()
def main(texts):
    counts = ["datasets.calibration.count=4", "datasets.calibration.held_out=16"]
    recipe = load_recipe(Path(__file__).parents[2] / "recipes/dat_light/x4.yml", counts)
    source = load_source(recipe, Path(os.environ["CONDIQUANT_DATA"]), [])
    targets = source.network(source.held_out)
    print("| in this order | fidelity, dB | seconds |\n|---|---|---|")
    for name, steps in ROWS.items():
        if texts and not any(text in name for text in texts):
            continue
        model, started = deepcopy(source.network), time.perf_counter()
        for step in steps:
            model = step(model, source.crops)
        seconds = time.perf_counter() - started
        pairs = zip(model(source.held_out), targets, strict=True)
        fidelity = mean(evaluate_pair(*pair, recipe.scale)["psnr"] for pair in pairs)
        print(f"| {name} | {fidelity:.2f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
