"""Post-training quantization of super-resolution networks with Brevitas: its own methods and CondiQuant.

All methods quantize the same layers and attention operands of the same float network on the same crops.

Example:
    python recipes/brevitas_sr_ptq.py --data DATA --weight-bits 4 3 --activation-bits 4 4
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from brevitas import nn as qnn
from brevitas import quant
from brevitas.graph.calibrate import bias_correction_mode, calibration_mode
from brevitas.graph.gptq import gptq_mode
from brevitas.graph.quantize import layerwise_quantize
from torch import Tensor, nn

import condiquant_basicsr
from condiquant_brevitas import quantize_sr
from condiquant_brevitas.layers import QUANT_LAYERS, find_layers
from condiquant_brevitas.products import ProductOperand, insert_stubs
from condiquant_plugin.errors import InputError
from condiquant_plugin.files import check_writable
from condiquant_plugin.methods.condiquant.reconditioning import ReconditioningConfig
from condiquant_plugin.uniform.grid import check_bits
from condiquant_recipes.recipe import load_recipe
from condiquant_recipes.recipe_files import recipe_path
from condiquant_recipes.source import Source, load_source
from condiquant_recipes.workspace import write_metrics

# Weights and activations; the weights by --granularity.
UPSTREAM = {
    "percentile": {
        "tensor": (quant.Int8WeightPerTensorFloat, quant.ShiftedUint8ActPerTensorFloat),
        "channel": (quant.Int8WeightPerChannelFloat, quant.ShiftedUint8ActPerTensorFloat),
    },
    "mse": {
        "tensor": (quant.Int8WeightPerTensorFloatMSE, quant.ShiftedUint8ActPerTensorFloatMSE),
        "channel": (quant.Int8WeightPerChannelFloatMSE, quant.ShiftedUint8ActPerTensorFloatMSE),
    },
}
RECONDITIONING: dict[str, ReconditioningConfig | Literal["auto"] | None] = {
    "bounds": None,
    "condition": ReconditioningConfig("condition"),
    "condiquant": "auto",
}


@dataclass(frozen=True)
class Method:
    """Which quantizers and weights, and the modes of Brevitas that follow."""

    title: str
    quantizers: str
    gptq: bool = False
    bias_correction: bool = False


METHODS = {
    "percentile": Method("Brevitas: percentiles", "percentile"),
    "mse": Method("Brevitas: MSE", "mse"),
    "mse_gptq": Method("Brevitas: MSE, GPTQ", "mse", True),
    "mse_bias": Method("Brevitas: MSE, bias correction", "mse", False, True),
    "mse_gptq_bias": Method("Brevitas: MSE, GPTQ, bias correction", "mse", True, True),
    "bounds": Method("learned bounds", "bounds"),
    "bounds_gptq_bias": Method("learned bounds, GPTQ, bias correction", "bounds", True, True),
    "condition": Method("CondiQuant `condition`", "condition"),
    "condiquant": Method("CondiQuant (default)", "condiquant"),
    "condiquant_gptq": Method("CondiQuant (default), GPTQ", "condiquant", True),
}


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="dat_light/x4.yml", help="YAML with the network")
    parser.add_argument("--data", help="folder of the images (default: CONDIQUANT_DATA)")
    parser.add_argument("--sets", nargs="+", default=["Set5"], help="test sets")
    parser.add_argument("--weight-bits", nargs="+", type=int, default=[4, 3, 2])
    parser.add_argument("--activation-bits", nargs="+", type=int, help="(default: --weight-bits)")
    parser.add_argument("--granularity", choices=["tensor", "channel"], default="tensor")
    parser.add_argument("--crops", type=int, default=32, help="calibration crops")
    parser.add_argument("--batch-size", type=int, default=4, help="crops in a forward pass")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    result = parser.parse_args(arguments)
    result.data = result.data or os.environ.get("CONDIQUANT_DATA")
    result.activation_bits = result.activation_bits or result.weight_bits
    return result


def check_arguments(arguments: argparse.Namespace) -> None:
    if arguments.data is None or not Path(arguments.data).is_dir():
        raise InputError(f"no data folder {arguments.data}: give --data or set CONDIQUANT_DATA")
    if len(arguments.weight_bits) != len(arguments.activation_bits):
        raise InputError("--weight-bits and --activation-bits go in pairs: give as many of each")
    for bits in arguments.weight_bits + arguments.activation_bits:
        check_bits(bits)
    if arguments.batch_size < 1:
        raise InputError(f"--batch-size={arguments.batch_size} is too small: use 1 or more")
    if arguments.json is not None:
        check_writable(arguments.json.parent)


@torch.no_grad()
def quantize_upstream(
    network: nn.Module, crops: Tensor, scope: Any, bits: tuple[int, int], quantizers: Any, size: int
) -> nn.Module:
    """Quantizers of Brevitas where ``quantize_sr`` puts learned bounds, calibrated."""
    model = deepcopy(network)
    layers = find_layers(model, crops[:1], scope)
    insert_stubs(model, [layer.product for layer in layers if layer.product])
    weight_quant, act_quant = quantizers
    settings = {
        "weight_quant": weight_quant,
        "weight_bit_width": bits[0],
        "input_quant": act_quant,
        "input_bit_width": bits[1],
        "return_quant_tensor": False,
    }
    operand = {"act_quant": act_quant, "bit_width": bits[1], "return_quant_tensor": False}
    layer_map: dict[Any, Any] = {plain: (new, settings) for plain, new in QUANT_LAYERS.items()}
    layer_map[ProductOperand] = qnn.QuantIdentity, operand
    chosen = {layer.name for layer in layers}
    left = [n for n, m in model.named_modules() if type(m) in QUANT_LAYERS and n not in chosen]
    model = layerwise_quantize(model, layer_map, name_blacklist=left)
    with calibration_mode(model):
        for batch in crops.split(size):
            model(batch)
    model(crops[:1])  # initialises the scales of weights
    return model


@torch.no_grad()
def apply_gptq(model: nn.Module, batches: Sequence[Tensor]) -> None:
    with gptq_mode(model) as gptq:
        for _ in range(gptq.num_layers):
            for batch in batches:
                gptq.model(batch)
            gptq.update()


@torch.no_grad()
def apply_bias_correction(model: nn.Module, batches: Sequence[Tensor]) -> None:
    with bias_correction_mode(model):
        for batch in batches:
            model(batch)


def quantize(
    method: Method, source: Source, scope: Any, bits: tuple[int, int], arguments: Any
) -> nn.Module:
    if method.quantizers in UPSTREAM:
        quantizers = UPSTREAM[method.quantizers][arguments.granularity]
        size = arguments.batch_size
        model = quantize_upstream(source.network, source.crops, scope, bits, quantizers, size)
    else:
        model = quantize_sr(
            source.network,
            source.crops,
            weight_bits=bits[0],
            activation_bits=bits[1],
            scope=scope,
            weight_granularity=arguments.granularity,
            reconditioning=RECONDITIONING[method.quantizers],
            bounds_crops=len(source.crops),
            batch_size=arguments.batch_size,
        )
    batches = source.crops.split(arguments.batch_size)
    if method.gptq:
        apply_gptq(model, batches)
    if method.bias_correction:
        apply_bias_correction(model, batches)
    return model


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    check_arguments(arguments)
    count = f"datasets.calibration.count={arguments.crops}"
    recipe = load_recipe(recipe_path(arguments.recipe), [count])
    torch.manual_seed(recipe.seed)
    source = load_source(recipe, Path(arguments.data), arguments.sets)

    def scores(model: nn.Module) -> dict[str, dict[str, float]]:
        upscale = partial(
            condiquant_basicsr.upscale, model, scale=recipe.scale, multiple=source.multiple
        )
        found = {
            name: condiquant_basicsr.evaluate(upscale, pairs, recipe.scale)
            for name, pairs in source.test_sets.items()
        }
        return {
            name: {key: score[key] for key in ("psnr", "ssim")} for name, score in found.items()
        }

    rows: list[dict[str, Any]] = [
        {"method": "float", "bits": None, "seconds": 0.0, "scores": scores(source.network)}
    ]
    print_row("bits", "method", *(f"{n} PSNR / SSIM | drop" for n in arguments.sets), "seconds")
    print_row(*["---"] * (3 + 2 * len(arguments.sets)))
    print_scores(rows[0], rows[0])
    for bits in zip(arguments.weight_bits, arguments.activation_bits, strict=True):
        for key in arguments.methods:
            started = time.perf_counter()
            model = quantize(METHODS[key], source, recipe.condiquant.scope, bits, arguments)
            seconds = time.perf_counter() - started
            rows.append(
                {"method": key, "bits": list(bits), "seconds": seconds, "scores": scores(model)}
            )
            print_scores(rows[-1], rows[0])
            if arguments.json is not None:
                metrics = {"recipe": recipe.name, "crops": arguments.crops, "rows": rows}
                write_metrics(arguments.json, metrics)
    return rows


def print_scores(row: dict[str, Any], reference: dict[str, Any]) -> None:
    cells = []
    for name, score in row["scores"].items():
        drop = reference["scores"][name]["psnr"] - score["psnr"]
        cells += [f"{score['psnr']:.2f} / {score['ssim']:.4f}", f"{drop:.2f}"]
    bits = "W{}A{}".format(*row["bits"]) if row["bits"] else "32"
    title = METHODS[row["method"]].title if row["bits"] else "float"
    print_row(bits, title, *cells, f"{row['seconds']:.0f}")


def print_row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    try:
        run(parse_arguments(arguments))
    except InputError as error:
        print(f"brevitas_sr_ptq: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
