"""Processes with fewer instruction sets than the CPU has."""

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import pytest

from condiquant_openvino.running.instruction_sets import (
    lower_instruction_sets,
    run_with,
    without_mvn,
)

ROWS, FEATURES = 40, 24  # 16 does not divide 24


def normalization(axes, eps_mode, normalize_variance=True):
    x = ops.parameter([-1, ROWS, FEATURES], np.float32)
    norm = ops.mvn(x, ops.constant(axes), normalize_variance, 1e-3, eps_mode)
    return ov.Model([ops.multiply(norm, ops.constant(np.float32(2)))], [x])


def inputs():
    return np.random.default_rng(0).normal(1, 2, (3, ROWS, FEATURES)).astype("f4")


def kinds_and_output(model, x):
    network = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    kinds = [
        n.get_rt_info()["layerType"].astype(str) for n in network.get_runtime_model().get_ops()
    ]
    return kinds, network([x])[0]


@pytest.mark.parametrize("axes", [[2], [-1], [1, 2]])
@pytest.mark.parametrize("eps_mode", ["inside_sqrt", "outside_sqrt"])
@pytest.mark.parametrize("normalize_variance", [True, False])
def test_normalizations_keep_their_values_without_mvn(axes, eps_mode, normalize_variance):
    expected_kinds, expected = kinds_and_output(
        normalization(axes, eps_mode, normalize_variance), inputs()
    )
    model = normalization(axes, eps_mode, normalize_variance)
    without_mvn(model)
    kinds, found = kinds_and_output(model, inputs())
    assert "MVN" in expected_kinds
    assert "MVN" not in kinds
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_a_normalization_over_an_unknown_number_of_features_stays():
    x = ops.parameter([-1, ROWS, -1], np.float32)
    model = ov.Model([ops.mvn(x, ops.constant([2]), True, 1e-3, "inside_sqrt")], [x])
    without_mvn(model)
    assert "MVN" in [node.get_type_name() for node in model.get_ops()]


def _in_child(axes):
    model = normalization(axes, "inside_sqrt")
    without_mvn(model)
    return kinds_and_output(model, inputs())[1]


@pytest.mark.parametrize("lower", lower_instruction_sets())
def test_normalizations_run_with_lower_instruction_sets(lower):
    found = run_with(lower, _in_child, [2])
    np.testing.assert_allclose(
        found, kinds_and_output(normalization([2], "inside_sqrt"), inputs())[1], atol=2e-5
    )
