"""For tests of graphs that the CPU plugin computes wrongly, and of the forms that avoid it."""

import condiquant_nncf
from condiquant_openvino import check_parity, convert


def relative_error(found, expected):
    return float((found - expected).abs().max() / (expected.max() - expected.min()))


def assert_right(model, x):
    parity = check_parity(model, convert(model, x), [x])
    parity.raise_if_broken()
    assert max(layer.error for layer in parity.layers) < 1e-6
    assert parity.stretch_max_abs < 1e-5


def quantize(network, x, bits, scope, overflow="safe", **settings):
    config = condiquant_nncf.QuantizationConfig(
        bits, bits, scope, recondition=None, overflow=overflow, **settings
    )
    return condiquant_nncf.quantize_network(network.eval(), x, config).model
