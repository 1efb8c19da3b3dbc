import numpy as np
import openvino as ov
import openvino.opset13 as ops
import pytest

from condiquant_openvino.running.in_order import OrderedQueue
from condiquant_openvino.running.upscaling import compile_ir
from condiquant_plugin import InputError


@pytest.fixture(scope="module")
def queue():
    """Of a network that doubles images of any size."""
    x = ops.parameter(ov.PartialShape([1, 1, -1, -1]), np.float32)
    return OrderedQueue(compile_ir(ov.Model([ops.add(x, x)], [x])), streams=3)


def inputs(count):
    """Large and small in turn, so that later ones are finished first."""
    for number in range(count):
        side = 1500 if number % 4 == 0 else 2
        yield number, np.full((1, 1, side, side), number, np.float32)


def test_outputs_come_in_the_order_of_the_inputs(queue):
    found = [(item, float(array.max())) for item, array in queue.run(inputs(20))]
    assert found == [(number, 2.0 * number) for number in range(20)]


def test_numbers_pass_in_their_place(queue):
    mixed = [(0, np.ones((1, 1, 2, 2), np.float32)), (1, 0.5), (2, np.ones((1, 1, 2, 2), "f4"))]
    found = list(queue.run(iter(mixed)))
    assert [item for item, _ in found] == [0, 1, 2]
    assert found[1][1] == 0.5


def test_what_was_begun_before_bad_input_is_finished(queue):
    def failing():
        yield from inputs(5)
        raise InputError("the sixth")

    outputs = queue.run(failing())
    assert [next(outputs)[0] for _ in range(5)] == list(range(5))
    with pytest.raises(InputError, match="the sixth"):
        next(outputs)


def test_inference_that_fails_does_not_wait_for_ever(queue):
    with pytest.raises(RuntimeError):
        list(queue.run([(0, np.ones((1, 2, 2, 2), np.float32))]))
    assert [item for item, _ in queue.run(inputs(3))] == [0, 1, 2]


def test_inputs_are_taken_while_others_are_computed(queue):
    taken, given = [], []
    for item, _ in queue.run((taken.append(i), (i, array))[1] for i, array in inputs(40)):
        given.append(len(taken) - item)
    assert max(given) > 2
    assert max(given) <= 10
