"""Which kernels the CPU plugin has on this CPU, told by small graphs that are none of ours."""

from functools import cache

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import pytest

from condiquant_openvino.running.instruction_sets import sums_saturate

needs_vnni = pytest.mark.skipif(sums_saturate(), reason="int8 kernels add in 16 bits on this CPU")


def dequantized(x, scale):
    """``x`` as signed bytes times ``scale``."""
    bounds = [ops.constant(np.float32(b)) for b in (-128 * scale, 127 * scale, -128, 127)]
    rounded = ops.convert(ops.fake_quantize(x, *bounds, 256), np.int8)
    return ops.multiply(ops.convert(rounded, np.float32), ops.constant(np.float32(scale)))


def attention(queries, values, dynamic):
    """Two products with a bias and a softmax between; ``queries`` and ``values`` say what is int8."""
    shape = [-1 if dynamic else 4, 2, 64, 16]
    inputs = [ops.parameter(shape, np.float32) for _ in range(3)]
    q, k = (dequantized(x, 0.02) if queries else x for x in inputs[:2])
    scores = ops.matmul(q, k, False, True)
    scores.set_friendly_name("scores/MatMul")
    bias = np.random.default_rng(0).standard_normal((1, 2, 64, 64)).astype(np.float32)
    shares, v = ops.softmax(ops.add(scores, ops.constant(bias)), -1), inputs[2]
    if values:
        bounds = [ops.constant(np.float32(b)) for b in (0, 1, 0, 255)]
        shares = ops.convert(ops.fake_quantize(shares, *bounds, 256), np.uint8)
        shares = ops.multiply(ops.convert(shares, np.float32), ops.constant(np.float32(1 / 255)))
        v = dequantized(v, 0.02)
    result = ops.matmul(shares, v, False, False)
    result.set_friendly_name("values/MatMul")
    return ov.Model([result], inputs)


@cache
def fuses_int8_attention():
    """Whether a whole attention of bytes is one kernel."""
    compiled = ov.Core().compile_model(attention(True, True, False), "CPU")
    kernels = [
        set(node.get_rt_info()["originalLayersNames"].astype(str).split(","))
        for node in compiled.get_runtime_model().get_ops()
    ]
    return any({"scores/MatMul", "values/MatMul"} <= names for names in kernels)
