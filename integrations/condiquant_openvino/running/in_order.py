"""Inference of several inputs at once whose outputs come in the order of the inputs."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

import openvino as ov
from numpy.typing import NDArray

from condiquant_plugin import InputError

Item = TypeVar("Item")
_PATIENCE = 1.0
"""Seconds until it is asked whether inference has failed."""


class OrderedQueue:
    """An ``AsyncInferQueue`` of a network of one input and one output.

    Args:
        streams: inferences that the device runs at once; one more is kept ready.
    """

    def __init__(self, network: ov.CompiledModel, streams: int) -> None:
        self._network, self._streams = network, streams

    def run(
        self, inputs: Iterable[tuple[Item, NDArray[Any] | float]]
    ) -> Iterator[tuple[Item, NDArray[Any] | float]]:
        """Outputs without their batch axis; a number among the inputs passes as it is.

        An :class:`InputError` of ``inputs`` is raised when what came before it is finished.
        """
        queue = ov.AsyncInferQueue(
            self._network, self._streams + 1
        )  # one that failed is of no more use
        queue.set_callback(_keep)
        pending: deque[tuple[Item, Future[Any]]] = deque()
        failed: InputError | None = None
        inputs = iter(inputs)
        try:
            while True:
                try:
                    item, array = next(inputs)
                except StopIteration:
                    break
                except InputError as error:
                    failed = error
                    break
                future: Future[Any] = Future()
                if isinstance(array, float):
                    future.set_result(array)
                else:
                    queue.start_async([array], userdata=future)
                pending.append((item, future))
                while pending and (pending[0][1].done() or len(pending) > 2 * len(queue)):
                    yield _next(queue, pending)
            while pending:
                yield _next(queue, pending)
        finally:
            queue.wait_all()
        if failed is not None:
            raise failed


def _next(queue: ov.AsyncInferQueue, pending: deque[tuple[Item, Future[Any]]]) -> tuple[Item, Any]:
    item, future = pending.popleft()
    while True:
        try:
            return item, future.result(timeout=_PATIENCE)
        except TimeoutError:
            if queue.is_ready():
                queue.wait_all()  # raises what inference has failed with


def _keep(request: ov.InferRequest, future: Future[Any]) -> None:
    future.set_result(request.get_output_tensor().data[0].copy())
