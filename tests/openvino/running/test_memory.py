import numpy as np
import openvino as ov
import openvino.opset13 as ops
import pytest

from condiquant_openvino.running import memory
from condiquant_openvino.running.memory import free_memory, largest_tile, peak_bytes

SIDE = 64


@pytest.fixture
def model():
    """Of 3 channels, then 16, then 16, then 3: the peak is at the second convolution."""
    x = ops.parameter([1, 3, SIDE, SIDE], np.float32)
    y = x
    for inputs, outputs in ((3, 16), (16, 16), (16, 3)):
        kernel = ops.constant(np.zeros((outputs, inputs, 3, 3), np.float32))
        y = ops.convolution(y, kernel, [1, 1], [1, 1], [1, 1], [1, 1])
    return ov.Model([y], [x])


def test_peak_is_the_most_that_is_alive_at_once(model):
    assert peak_bytes(model) == (16 + 16) * SIDE * SIDE * 4


def test_what_is_used_later_stays_alive(model):
    parameter, result = model.get_parameters()[0], model.get_results()[0]
    sum_ = ops.add(result.input_value(0), parameter)
    assert peak_bytes(ov.Model([sum_], [parameter])) == (16 + 16 + 3) * SIDE * SIDE * 4


def test_tile_takes_half_of_the_free_memory(model):
    sizes = range(SIDE, 1024 + 1, 8)
    for side in (72, 200, 1000):
        free = 2 * peak_bytes(model) * side**2 // SIDE**2
        assert largest_tile(model, sizes, 1, free + 10_000) == side
        assert largest_tile(model, sizes, 1, free * 99 // 100) == side - 8
        assert largest_tile(model, sizes, 4, 4 * free + 40_000) == side


def test_tile_stays_in_its_bounds(model):
    assert largest_tile(model, range(SIDE, 129, 8), 1, 2**40) == 128
    assert largest_tile(model, range(SIDE, 129, 8), 1, 1) == SIDE


def test_a_container_has_less_than_the_machine(tmp_path, monkeypatch):
    whole = free_memory()
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert free_memory() == 4000000 < whole
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory() > 4000000
