"""Which objective and strength serves which bit-width: PSNR without distillation.

CONDIQUANT_DATA=... python tests/benchmarks/objectives.py [bits ...]

The default is chosen by the first column: fidelity (PSNR between outputs) to the float network on
calibration photographs that were not calibrated on. Set5 stands beside it and decides nothing.
"""

import os
import sys
from functools import partial
from pathlib import Path
from statistics import mean, median

import torch

import condiquant_basicsr as basicsr_host
import condiquant_nncf as nncf_host
from condiquant_basicsr.data.datasets import test_pairs
from condiquant_plugin.methods.condiquant.reconditioning import ReconditioningConfig
from condiquant_recipes.recipe import load_recipe
from condiquant_recipes.source import load_network

Config = ReconditioningConfig
CASES = {
    "as trained": None,
    "as trained, bounds on quantized inputs": None,
    **{f"condition, tau {t:g}": Config("condition", strength=t) for t in (1e-3, 3e-3, 1e-2, 3e-2)},
    "condition, tolerance 3 %": Config("condition", output_tolerance=0.03),
    **{f"least squares, damping {d:g}": Config(damping=d) for d in (1e-3, 1e-2, 1e-1)},
    "least squares, damping 0.1, bounds on quantized inputs": Config(damping=1e-1),
}


def main(bit_widths: list[int]) -> None:
    torch.set_num_threads(2)
    data = Path(os.environ["CONDIQUANT_DATA"])
    recipe = load_recipe(Path(__file__).parents[2] / "recipes/dat_light/x4.yml")
    network = load_network(recipe)
    upscale = partial(basicsr_host.upscale, scale=4, multiple=32)
    crops = basicsr_host.calibration_crops([data / "calibration/BSDS500_train"], 4, 32, 128, 0)
    held_out = basicsr_host.calibration_crops(
        [data / "calibration/DIV2K_valid_crop256"], 4, 64, 12, 0
    )
    pairs = test_pairs(data, "Set5", 4)
    with torch.no_grad():
        targets = [network(crop[None])[0] for crop in held_out]
    print("| bits | weights | condition number | held-out fidelity | Set5 |\n|---|---|---|---|---|")
    for bits in bit_widths:
        for name, recondition in CASES.items():
            config = nncf_host.QuantizationConfig(
                weight_bits=bits,
                activation_bits=bits,
                bounds_inputs="quantized" if "on quantized" in name else "float",
                recondition=recondition,
                rounding="nearest",
            )
            result = nncf_host.quantize_network(network, crops, config)
            with torch.no_grad():
                outputs = [result.model(crop[None])[0] for crop in held_out]
            fidelity = mean(
                basicsr_host.evaluate_pair(output, target, 4)["psnr"]
                for output, target in zip(outputs, targets, strict=True)
            )
            score = basicsr_host.evaluate(partial(upscale, result.model), pairs, 4)["psnr"]
            kappa = median(report.condition_after for report in result.reports)
            print(f"| {bits} | {name} | {kappa:.0f} | {fidelity:.2f} | {score:.2f} |", flush=True)


if __name__ == "__main__":
    main([int(bits) for bits in sys.argv[1:]] or [4, 3, 2])
