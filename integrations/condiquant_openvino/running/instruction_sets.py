"""Instruction sets that the CPU plugin's kernels are chosen by, and running with fewer of them.

oneDNN reads ``ONEDNN_MAX_CPU_ISA`` once in a process, and so does the plugin: lower sets take a process of
their own.
"""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
import openvino as ov
import openvino.opset13 as ops

from condiquant_openvino.running.reading import core_of_process, read_metadata

VARIABLE = "ONEDNN_MAX_CPU_ISA"
_SETS = ("AVX2", "AVX512_CORE")
"""Those without VNNI, each with all before it; on SSE4.1 OpenVINO 2026.4 fails with float networks too."""
_logger = logging.getLogger(__name__)
_Result = TypeVar("_Result")


_CHILD = """
import pickle, sys
job, result = sys.argv[1:]
with open(job, "rb") as file:
    sys.path[:] = pickle.load(file)
    function, arguments = pickle.load(file)
with open(result, "wb") as file:
    pickle.dump(function(*arguments), file)
"""


@cache
def sums_saturate() -> bool:
    """Whether int8 kernels of this process add products in 16 bits; measured, not read from a list."""
    channels, byte, code = 64, 255.0, 127
    x = ops.parameter([1, channels], np.float32)
    ends = [ops.constant(np.float32(end)) for end in (0.0, byte)] * 2
    integers = ops.convert(ops.fake_quantize(x, *ends, 256), ov.Type.u8)
    inputs = ops.multiply(ops.convert(integers, np.float32), ops.constant(np.float32(0.5)))
    codes = ops.constant(np.full((channels, channels), code, np.int8))
    weight = ops.multiply(ops.convert(codes, np.float32), ops.constant(np.float32(0.5)))
    model = ov.Model([ops.matmul(inputs, weight, False, True)], [x])
    (found,) = (
        core_of_process().compile_model(model, "CPU")([np.full((1, channels), byte, "f4")]).values()
    )
    return bool(np.abs(found / (byte * code * channels / 4) - 1).max() > 1e-2)


def warn_of_overflow(model: ov.Model) -> None:
    """One line in the log if an IR needs VNNI and this process has none."""
    if read_metadata(model).get("overflow") == "vnni" and sums_saturate():
        _logger.warning(
            "%s was quantized with overflow=vnni: on this CPU, without VNNI, its results are wrong",
            model.get_friendly_name(),
        )


def lower_instruction_sets() -> list[str]:
    """Names for ``ONEDNN_MAX_CPU_ISA`` of the sets without VNNI below what this process uses."""
    given = os.environ.get(VARIABLE, "").upper()
    if given in _SETS:
        return list(_SETS[: _SETS.index(given)])
    import torch  # running an IR needs none

    capability = torch.backends.cpu.get_cpu_capability()
    below = {"AVX512": 1}.get(capability, 0)
    return list(_SETS[: below if sums_saturate() else below + 1])


def without_mvn(model: ov.Model) -> None:
    """Write normalizations as sums and products, in place, for a process with a lower set.

    OpenVINO 2026.4's MVN reads past its input where AVX2 is asked of a CPU with AVX-512, unless 16 divides
    the number of features. Means would become MVN again.
    """
    for node in model.get_ordered_ops():
        if node.get_type_name() != "MVN" or node.get_input_size() < 2:
            continue
        x, axes = node.input_value(0), node.input_value(1)
        shape, along = x.get_partial_shape(), axes.get_node()
        dims = [shape[int(axis)] for axis in along.get_data()] if _is_constant(along) else []
        if not dims or any(dim.is_dynamic for dim in dims):
            continue
        share = ops.constant(np.float32(1 / np.prod([dim.get_length() for dim in dims])))
        centred = ops.subtract(x, ops.multiply(ops.reduce_sum(x, axes, True), share))
        given, result = node.get_attributes(), centred
        if given["normalize_variance"]:
            squares = ops.reduce_sum(ops.multiply(centred, centred), axes, True)
            variance, eps = ops.multiply(squares, share), ops.constant(np.float32(given["eps"]))
            if given["eps_mode"].upper() == "INSIDE_SQRT":
                deviation = ops.sqrt(ops.add(variance, eps))
            else:
                deviation = ops.add(ops.sqrt(variance), eps)
            result = ops.divide(centred, deviation)
        result.set_friendly_name(node.get_friendly_name())
        node.output(0).replace(result.output(0))


def _is_constant(node: Any) -> bool:
    return bool(node.get_type_name() == "Constant")


def run_with(instruction_set: str, function: Callable[..., _Result], *arguments: Any) -> _Result:
    """``function(*arguments)`` in a process that uses this set at most.

    Args:
        function: of a module, not nested; what it takes and returns can be pickled.

    Raises:
        RuntimeError: it failed; the message is its last line.
    """
    with TemporaryDirectory() as folder:
        job, result = Path(folder) / "job", Path(folder) / "result"
        job.write_bytes(pickle.dumps(sys.path) + pickle.dumps((function, arguments)))
        finished = subprocess.run(
            [sys.executable, "-c", _CHILD, job, result],
            # Beside another process, threads of torch would wait busily for each other.
            env={**os.environ, VARIABLE: instruction_set, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if finished.returncode:
            lines = finished.stderr.strip().splitlines() or [f"exit code {finished.returncode}"]
            raise RuntimeError(f"with {VARIABLE}={instruction_set}: {lines[-1]}")
        found: _Result = pickle.loads(result.read_bytes())
        return found
