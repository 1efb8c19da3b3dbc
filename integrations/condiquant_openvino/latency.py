"""Latency of several IRs, paired."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any

import numpy as np
import openvino as ov

from condiquant_openvino.saving import read_ir
from condiquant_openvino.upscaling import compile_ir

_WARM_UP = 3
_PRODUCTS = {"Convolution", "Deconvolution", "FullyConnected", "MatMul"}
_INT8 = {"u8", "i8", "uint8_t", "int8_t"}


def compare_latency(
    models: Mapping[str, str | os.PathLike[str]],
    shape: Sequence[int],
    iterations: int = 30,
    device: str = "CPU",
) -> dict[str, dict[str, Any]]:
    """Time IRs against each other: every iteration runs each of them once, so drift hits all alike.

    Args:
        models: IR path by name; the first is the reference.
        shape: of the input, ``(1, 3, height, width)``.

    Returns:
        For each name ``median_ms``, ``p10_ms``, ``p90_ms``, ``ratio`` (median over the iterations
        of its time over the reference's) and ``precisions`` (:func:`executed_precisions`).

    Raises:
        InputError: on a file that is no IR or an unknown device.
    """
    compiled = {name: compile_ir(read_ir(path), device) for name, path in models.items()}
    requests = {name: model.create_infer_request() for name, model in compiled.items()}
    image = np.random.default_rng(0).random(tuple(shape), dtype=np.float32)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for iteration in range(-_WARM_UP, iterations):
        for name, request in requests.items():
            start = perf_counter()
            request.infer([image], share_inputs=True, share_outputs=True)
            if iteration >= 0:
                seconds[name].append(perf_counter() - start)
    times = {name: 1e3 * np.array(values) for name, values in seconds.items()}
    reference = next(iter(times.values()))
    return {
        name: {
            "median_ms": float(np.median(ms)),
            "p10_ms": float(np.percentile(ms, 10)),
            "p90_ms": float(np.percentile(ms, 90)),
            "ratio": float(np.median(ms / reference)),
            "precisions": executed_precisions(compiled[name]),
        }
        for name, ms in times.items()
    }


def executed_precisions(compiled: ov.CompiledModel) -> dict[str, int]:
    """Convolutions and matrix products by precision, as ``{"int8": 3, "f32": 1}``."""
    counts: Counter[str] = Counter()
    for node in compiled.get_runtime_model().get_ops():
        info = node.get_rt_info()
        if "layerType" not in info or info["layerType"].astype(str) not in _PRODUCTS:
            continue
        precision = node.get_input_element_type(0).get_type_name()
        counts["int8" if precision in _INT8 else precision] += 1
    return dict(counts)
