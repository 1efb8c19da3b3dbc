"""What OpenVINO's CPU plugin makes of 4-bit weights behind float inputs: memory, time, error.

python tests/benchmarks/float_input_weights.py float|written|kernel|kernel-exact

One form for each process, as memory is that of the process. The weights of ``kernel`` are codes minus zero
times scale, which the plugin's matrix product unfolds itself; ``kernel-exact`` says in the IR that it is
not to round its inputs.
"""

import sys
import time
from collections import Counter
from pathlib import Path
from statistics import median

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import torch
from torch import nn
from torch.nn.utils import parametrize

from condiquant_openvino import convert
from condiquant_plugin import FakeQuantizer

BITS, WIDTH, ROWS, LAYERS, TIMES = 4, 1024, 64, 8, 30
FORMS = ("float", "written", "kernel", "kernel-exact")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))).eval()


def written(model: nn.Sequential, x: torch.Tensor) -> ov.Model:
    for layer in model:
        quantizer = FakeQuantizer(BITS, "weight", row_blocks=WIDTH)
        quantizer.search_bounds(layer.weight.detach())
        parametrize.register_parametrization(layer, "weight", quantizer)
    return convert(model, x, static=True)


@torch.no_grad()
def for_the_kernel(model: nn.Sequential, x: torch.Tensor) -> ov.Model:
    """The layers' weights become what the codes stand for."""
    values = parameter = ops.parameter(list(x.shape), np.float32)
    for layer in model:
        low, high = layer.weight.aminmax(dim=1, keepdim=True)
        scale = (high - low) / (2**BITS - 1)
        zero = (-low / scale).round()
        codes = (layer.weight / scale + zero).round().clamp(0, 2**BITS - 1)
        layer.weight.copy_((codes - zero) * scale)
        stored = [
            ops.convert(ops.constant(t.numpy().astype(np.uint8), dtype=ov.Type.u4), np.float32)
            for t in (codes, zero)
        ]
        weight = ops.multiply(ops.subtract(*stored), ops.constant(scale.numpy()))
        values = ops.matmul(values, weight, False, True)
        values = ops.add(values, ops.constant(layer.bias.numpy()))
    return ov.Model([values], [parameter])


def graph(form: str, model: nn.Sequential, x: torch.Tensor) -> ov.Model:
    if form == "written":
        return written(model, x)
    if form == "float":
        return ov.convert_model(model, example_input=x, input=[ov.PartialShape(list(x.shape))])
    ir = for_the_kernel(model, x)
    if form == "kernel-exact":
        ir.set_rt_info("0", ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])
    return ir


def resident() -> float:
    """MiB of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def main(form: str) -> None:
    if form not in FORMS:
        sys.exit(f"form {form!r} is not known: use {', '.join(FORMS)}")
    model, x = network(), torch.randn(1, ROWS, WIDTH)
    ir = graph(form, model, x)
    before = resident()
    compiled = ov.Core().compile_model(ir, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    added = resident() - before
    kept = Counter(
        str(node.get_rt_info()["outputPrecisions"].astype(str))
        for node in compiled.get_runtime_model().get_ops()
        if list(node.get_output_shape(0)) == [WIDTH, WIDTH]
    )
    output, seconds = compiled([x.numpy()])[0].copy(), []
    for _ in range(TIMES):
        started = time.perf_counter()
        compiled([x.numpy()])
        seconds.append(time.perf_counter() - started)
    with torch.no_grad():
        expected = model(x).numpy()
    error = np.abs(output - expected).max() / np.ptp(expected)
    weights = ", ".join(f"{count} of {precision}" for precision, count in kept.items())
    print(f"{form}: {weights}; {added:.1f} MiB; {median(seconds) * 1e3:.1f} ms; error {error:.1e}")


if __name__ == "__main__":
    main(*sys.argv[1:])
