"""What rows of binarized_sr.py take as IRs: bytes, memory, milliseconds, on every instruction set at hand.

Run: ``CONDIQUANT_DATA=DATA python tests/benchmarks/binarized_ir.py FOLDER [--size 128]``, with the FOLDER
that binarized_sr.py has filled. One thread, float operators in f32; all IRs in turns, of each the fastest
run, which other work on the machine disturbs least.
"""

import argparse
import json
import os
import time
from pathlib import Path

import binarized_ir
import nncf
import openvino as ov
import psutil
import torch

from condiquant_basicsr import BiDRNSR, calibration_crops, evaluate, test_pairs
from condiquant_openvino import check_parity, convert, layer_executions, save
from condiquant_openvino.running.instruction_sets import lower_instruction_sets, run_with
from condiquant_openvino.running.upscaling import compile_ir
from condiquant_openvino.writing.from_torch import from_torch
from condiquant_recipes.exporting import example_image

PROPERTIES = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
RUNS = 61


def network_of(folder: Path, block: str) -> BiDRNSR:
    row = json.loads((folder / f"{block}_0.json").read_text())["training"]
    network = BiDRNSR(
        num_feat=row["num_feat"],
        num_block=row["num_block"],
        upscale=row["scale"],
        block=block,
        **row["options"],
    )
    network.load_state_dict(torch.load(folder / f"{block}_0.pth", weights_only=True)["params"])
    return network.eval()


def write_irs(folder: Path, size: int) -> dict[str, Path]:
    image = example_image(size)
    paths = {"float": folder / "ir" / "float.xml", "NNCF int8": folder / "ir" / "int8.xml"}
    in_float = from_torch(network_of(folder, "float"), image, input=[[1, 3, -1, -1]])
    photographs = Path(os.environ["CONDIQUANT_DATA"]) / "calibration" / "BSDS500_train"
    crops = calibration_crops([photographs], 4, 64, 16, seed=0)
    in_int8 = nncf.quantize(in_float, nncf.Dataset([crop[None].numpy() for crop in crops]))
    compiled = compile_ir(in_int8)
    pairs = test_pairs(Path(os.environ["CONDIQUANT_DATA"]), "Set5", 4)
    found = evaluate(lambda x: torch.from_numpy(compiled([x.numpy()])[0]), pairs, 4)
    print(f"NNCF int8 of the float body, Set5: {found['psnr']:.2f} dB", flush=True)
    for name, ir in (("float", in_float), ("NNCF int8", in_int8)):
        ir.reshape(list(image.shape))
        save(ir, paths[name])
    for block in ("plain", "e2fif", "bbcu", "bidrb"):
        network = network_of(folder, block)
        for kernel in ("int8", "u1"):
            ir = convert(network, image, static=True, binary_kernel=kernel)
            parity = check_parity(network, ir, [image])
            parity.raise_if_broken()
            executions = [layer.runs_as for layer in layer_executions(ir, compile_ir(ir))]
            name = f"{block}, {kernel}"
            paths[name] = folder / "ir" / f"{block}_{kernel}.xml"
            save(ir, paths[name])
            print(
                f"{name}: parity {parity.mean_abs:.1e} of the range, worst layer "
                f"{max(layer.error for layer in parity.layers):.0e}, runs as {executions}",
                flush=True,
            )
    return paths


def milliseconds(paths: dict[str, Path], size: int) -> dict[str, float]:
    """The fastest of all runs, in turns."""
    image, core = example_image(size).numpy(), ov.Core()
    requests = {
        name: core.compile_model(path, "CPU", PROPERTIES).create_infer_request()
        for name, path in paths.items()
    }
    times = {name: [] for name in paths}
    for _ in range(RUNS):
        for name, request in requests.items():
            started = time.perf_counter()
            request.infer([image])
            times[name].append(time.perf_counter() - started)
    return {name: 1000 * min(found) for name, found in times.items()}


def memory(path: Path, size: int) -> float:
    """MB that the process grows by compiling and the first inference."""
    core, image = ov.Core(), example_image(size).numpy()
    process = psutil.Process()
    before = process.memory_info().rss
    compiled = core.compile_model(path, "CPU", PROPERTIES)
    compiled([image])
    return (process.memory_info().rss - before) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=128)
    given = parser.parse_args()
    (given.folder / "ir").mkdir(exist_ok=True)
    paths = write_irs(given.folder, given.size)
    highest = os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT")
    sets = [*lower_instruction_sets(), highest]
    by_set = {s: run_with(s, binarized_ir.milliseconds, paths, given.size) for s in sets}
    print(f"| IR | bytes (.bin) | MB | {' | '.join(f'ms, {s}' for s in sets)} |")
    print("|---|---|---|" + "---|" * len(sets))
    for name, path in paths.items():
        grown = run_with(highest, binarized_ir.memory, path, given.size)
        cells = " | ".join(f"{by_set[s][name]:.1f}" for s in sets)
        print(f"| {name} | {path.with_suffix('.bin').stat().st_size} | {grown:.1f} | {cells} |")


if __name__ == "__main__":
    main()
