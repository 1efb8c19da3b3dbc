"""What forms of weights take on disk and in memory when compiled, twelve products of 2048 x 2048.

python tests/benchmarks/weight_memory.py

Memory is the growth of a process by compiling and one inference; each form runs in one of its own. Times
are those of one token, with the plugin's default properties, by which CPUs with VNNI round inputs of
products with packed weights, and without that rounding, in turns.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import psutil
import torch

import condiquant_nncf
from condiquant_plugin.layerwise.moments import LayerGeometry, Moments
from condiquant_plugin.layerwise.problem import LayerProblem
from condiquant_plugin.methods.adasvd.method import AdaSVD
from condiquant_plugin.methods.arb.method import ARB
from condiquant_plugin.methods.pbs2p.method import PBS2P

SIZE, COUNT = 2048, 12
FORMS = {
    "float16": None,
    "arb_rc, u2": ARB(compensation="none"),
    "arb_rc, u1": ARB(compensation="none"),
    "pbs2p, u2": PBS2P(compensation="none"),
    "pbs2p, u2, rank 32": PBS2P(compensation="none", residual_rank=32),
    "adasvd 0.5, float16 factors": AdaSVD(0.5),
    "arb, bitmaps, unfolded": ARB(
        compensation="none", refinement="arb", bitmaps="column_group", rounds=1
    ),
}


def model_and_forms(method):
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(COUNT, SIZE, SIZE, generator=generator) / SIZE**0.5
    x = ops.parameter([-1, SIZE], ov.Type.f32)
    hidden = x
    for place, weight in enumerate(weights):
        hidden = ops.matmul(hidden, ops.constant(weight.numpy()), False, True)
        hidden.set_friendly_name(f"__module.layers.{place}/MatMul")
    model = ov.Model([hidden], [x])
    if method is None:
        return model, {}
    moments = Moments(1, torch.eye(SIZE, dtype=torch.float64)[None], torch.zeros(1, SIZE))
    return model, {
        f"layers.{place}": method.solve([LayerProblem("", weight, None, moments, LayerGeometry())])[
            0
        ].form
        for place, weight in enumerate(weights)
    }


def write(name, folder):
    model, forms = model_and_forms(FORMS[name])
    condiquant_nncf.write_compressed(model, forms, signs="u1" if name.endswith("u1") else "u2")
    ov.save_model(model, folder / "model.xml")


def measure(folder):
    process = psutil.Process()
    x = np.random.default_rng(0).standard_normal((1, SIZE)).astype(np.float32)
    before = process.memory_info().rss
    requests = {"default": request_of(folder, {})}
    requests["default"].infer([x])
    grown = process.memory_info().rss - before
    requests["exact inputs"] = request_of(folder, {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 0})
    times = {name: [] for name in requests}
    for _ in range(30):
        for name, request in requests.items():
            started = time.perf_counter()
            request.infer([x])
            times[name].append(time.perf_counter() - started)
    found = {name: 1e3 * median(each) for name, each in times.items()}
    return {"memory": grown, "milliseconds": found}


def request_of(folder, properties):
    properties = {"INFERENCE_PRECISION_HINT": "f32", **properties}
    return ov.Core().compile_model(folder / "model.xml", "CPU", properties).create_infer_request()


def main():
    print("| form | file MB | memory MB | ms, 1 token | ms, exact inputs |\n|---|---|---|---|---|")
    for name in FORMS:
        with TemporaryDirectory() as folder:
            for step in ("write", "measure"):
                found = subprocess.run(
                    [sys.executable, __file__, step, name, folder],
                    check=True, capture_output=True, text=True, env=os.environ,
                ).stdout  # fmt: skip
            size = (Path(folder) / "model.bin").stat().st_size
        row = json.loads(found.splitlines()[-1])
        times = " | ".join(f"{each:.1f}" for each in row["milliseconds"].values())
        print(f"| {name} | {size / 1e6:.1f} | {row['memory'] / 1e6:.0f} | {times} |")


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    elif sys.argv[1] == "write":
        write(sys.argv[2], Path(sys.argv[3]))
    else:
        print(json.dumps(measure(Path(sys.argv[3]))))
