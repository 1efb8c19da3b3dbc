"""Forward passes that stop at chosen modules, so that a network can change while it computes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from threading import Semaphore, Thread
from typing import Any

import torch
from torch import Tensor, nn

from condiquant_plugin.forward_pass import run


class _AbandonedError(BaseException):
    """Ends a pass that nobody wants to go on with."""


class PausedPass:
    """One forward pass, in a thread of its own that runs only inside :meth:`resume`.

    The pass has a copy of the network that shares its parameters and buffers: what is written into those
    while it stands still is what it goes on with.

    Args:
        model: in the mode to be run in.
        batch: a tensor, or a tuple of positional or a dict of keyword arguments.
        stops: modules, by name, before which the pass stops.
    """

    def __init__(self, model: nn.Module, batch: Any, stops: Iterable[str]) -> None:
        tensors = chain(model.parameters(), model.buffers())
        self.model: nn.Module = copy.deepcopy(model, {id(t): t for t in tensors})
        for name in stops:
            self.model.get_submodule(name).register_forward_pre_hook(self._stop_at(name))
        self._batch = batch
        self._place: tuple[str, Tensor] | None = None
        self._error: BaseException | None = None
        self._may_run, self._stands = Semaphore(0), Semaphore(0)
        self._abandoned = False
        self._threads = torch.get_num_threads()
        self._thread = Thread(target=self._run, daemon=True)

    def resume(self) -> tuple[str, Tensor] | None:
        """Go on to the next stop: its name and what the module is given; None at the end.

        Raises:
            Exception: what the network raises.
        """
        self._place = None
        if self._thread.ident is None:
            self._thread.start()
        self._may_run.release()
        self._stands.acquire()
        if self._error is not None:
            raise self._error
        return self._place

    def close(self) -> None:
        """Give up what is left of the pass."""
        self._abandoned = True
        if self._thread.is_alive():
            self._may_run.release()
            self._thread.join()

    @torch.no_grad()
    def _run(self) -> None:
        torch.set_num_threads(self._threads)  # otherwise each thread takes all cores
        self._may_run.acquire()
        try:
            if not self._abandoned:
                run(self.model, self._batch)
        except _AbandonedError:
            pass
        except BaseException as error:
            self._error = error
        self._stands.release()

    def _stop_at(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
            self._place = (name, args[0])
            self._stands.release()
            self._may_run.acquire()
            if self._abandoned:
                raise _AbandonedError

        return stop


@contextmanager
def paused(
    model: nn.Module, batches: Sequence[Any], stops: Iterable[str]
) -> Iterator[list[PausedPass]]:
    """A pass for each batch; those that have not ended when the block does are given up."""
    stops = list(stops)
    passes = [PausedPass(model, batch, stops) for batch in batches]
    try:
        yield passes
    finally:
        for each in passes:
            each.close()
