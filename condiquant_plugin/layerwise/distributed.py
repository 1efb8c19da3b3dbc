"""Calibration shared among the processes of ``torch.distributed``'s default group; one alone needs none.

All processes call these functions in the same order. Tensors stay on their device, so it must be one
that the group's backend moves: a GPU for NCCL.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from condiquant_plugin.errors import DistributedError, InputError
from condiquant_plugin.layerwise.moments import Moments
from condiquant_plugin.layerwise.problem import LayerProblem, Method, Solution, block_shape
from condiquant_plugin.uniform.fake_quantizer import fake_quantizers

Solver = Callable[[Sequence[LayerProblem]], list[Solution]]
_Item = TypeVar("_Item")

_BUCKET = 2**23
_REMEDY = "look at its log, then run again with --auto_resume"
_PEER_IS_GONE = re.compile(
    "gloo.*(connection (closed|reset|refused)|broken pipe|time(d )?out)|ncclRemoteError"
    "|communicator was aborted|collective operation timeout",
    re.IGNORECASE | re.DOTALL,
)


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is process 0, or the only one."""
    return _rank() == 0


@contextmanager
def of_torchrun() -> Iterator[None]:
    """The processes of ``torchrun`` as a group, on CPUs; nothing without it, or within a group."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or world_size() > 1:
        yield
        return
    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def share(items: Sequence[_Item]) -> Sequence[_Item]:
    """This process' part: every ``world_size``-th item; none if there are fewer items than processes."""
    return items[_rank() :: world_size()]


def _rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


@contextmanager
def failing_together(doing: str) -> Iterator[None]:
    """Around work without collectives: what fails in one process ends all, and none waits forever.

    Args:
        doing: the work, for the message: ``"collecting moments"``.

    Raises:
        InputError: of the lowest rank that raised one, with the same message in every process.
        DistributedError: another process ended, or failed with another exception.
    """
    if world_size() == 1:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    try:
        failures = _gather(None if error is None else _failure(error), doing)
    except DistributedError as lost:
        if error is not None:
            raise error from lost
        raise
    messages = [failure[1] for failure in failures if failure and failure[0]]
    if error is not None and (not isinstance(error, InputError) or str(error) == messages[0]):
        raise error
    if messages:
        raise InputError(messages[0]) from error
    for rank, failure in enumerate(failures):
        if failure is not None:
            raise DistributedError(f"process {rank} failed {doing} ({failure[1]}): {_REMEDY}")


def _failure(error: Exception) -> tuple[bool, str]:
    """Whether the user can act on it, and one line."""
    if isinstance(error, InputError):
        return True, str(error)
    return False, " ".join(f"{type(error).__name__}: {error}".split())


def all_reduce(moments: Iterable[Moments]) -> None:
    """Add up the moments of all processes, in place; afterwards they are the same in each."""
    distinct = list({id(m): m for m in moments}.values())
    if world_size() == 1 or not distinct:
        return
    counts = distinct[0].total.new_tensor([m.samples for m in distinct])
    sums = [getattr(m, field.name) for m in distinct for field in fields(m)[1:]]
    tensors = [counts, *(s for s in sums if s is not None)]
    _in_buckets(tensors, dist.all_reduce, "adding up moments")
    for total, count in zip(distinct, counts.tolist(), strict=True):
        total.samples = int(count)


def broadcast_bounds(model: nn.Module) -> None:
    """Give the model's fake quantizers the bounds that they have in process 0."""
    if world_size() > 1:
        found = fake_quantizers(model).values()
        bounds = [bound for quantizer in found for bound in (quantizer.lower, quantizer.upper)]
        _in_buckets(bounds, partial(dist.broadcast, src=0), "sending bounds")


def solve(
    problems: Sequence[LayerProblem], method: Method, solver: Solver | None = None
) -> list[Solution]:
    """``method.solve`` in shards.

    Each process solves its own layers and gets those of the others, bit for bit the same in all and as
    one process computes them. For that, layers of equal shape stay together where the method's solutions
    depend on the batch.

    Args:
        problems: all layers, with the moments of all processes.
        solver: what solves a shard in the place of ``method.solve``.

    Raises:
        InputError: as in one process.
        DistributedError: another process ended or failed.
    """
    solver = solver or method.solve
    if world_size() == 1:
        return solver(problems)
    shards = shard(problems, method, world_size())
    mine = shards[_rank()]
    with failing_together("reconditioning weights"):
        solved = dict(zip(mine, solver([problems[i] for i in mine]), strict=True))
    outlines = _gather({i: _outline(s) for i, s in solved.items()}, "sending reports")
    solutions: dict[int, Solution] = {}
    for owner, indices in enumerate(shards):
        for i in indices:
            solutions[i] = _materialized(outlines[owner][i], problems[i].weight.device)
        if owner == _rank():
            for i in indices:
                _copy(solved[i], solutions[i])
        sent = [tensor for i in indices for tensor in _tensors(solutions[i])]
        _in_buckets(sent, partial(dist.broadcast, src=owner), "sending weights")
    return [solutions[i] for i in range(len(problems))]


def _outline(solution: Solution) -> Solution:
    """Shapes in the place of tensors: small to send."""
    form, bias = solution.form, solution.bias
    shapes = {name: tensor.to("meta") for name, tensor in form.tensors().items()}
    bias = None if bias is None else bias.to("meta")
    return replace(solution, form=form.with_tensors(shapes), bias=bias)


def _materialized(outline: Solution, device: torch.device) -> Solution:
    shapes = outline.form.tensors().items()
    form = outline.form.with_tensors({n: torch.empty_like(t, device=device) for n, t in shapes})
    bias = None if outline.bias is None else torch.empty_like(outline.bias, device=device)
    return replace(outline, form=form, bias=bias)


def _tensors(solution: Solution) -> list[Tensor]:
    bias = [] if solution.bias is None else [solution.bias]
    return [*solution.form.tensors().values(), *bias]


@torch.no_grad()
def _copy(source: Solution, target: Solution) -> None:
    for mine, theirs in zip(_tensors(target), _tensors(source), strict=True):
        mine.copy_(theirs)


def shard(problems: Sequence[LayerProblem], method: Method, count: int) -> list[list[int]]:
    """Indices of the layers of each of ``count`` processes, at about equal cost.

    The costliest is given away first, each time to the process with the least.
    """
    units: dict[Any, list[int]] = defaultdict(list)
    costs: dict[Any, int] = defaultdict(int)
    for index, problem in enumerate(problems):
        unit = block_shape(problem) if method.is_batch_dependent else index
        units[unit].append(index)
        costs[unit] += method.cost(problem)
    shards: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for unit in sorted(units, key=costs.__getitem__, reverse=True):
        least = loads.index(min(loads))
        shards[least] += units[unit]
        loads[least] += costs[unit]
    return [sorted(indices) for indices in shards]


def agreed(value: Any) -> Any:
    """Process 0's value, small and picklable, in all of them."""
    return value if world_size() == 1 else _gather(value, "agreeing")[0]


def _gather(value: Any, doing: str) -> list[Any]:
    """A small picklable value of every process."""
    gathered: list[Any] = [None] * world_size()
    with noticing_the_end_of_others(doing):
        dist.all_gather_object(gathered, value)
    return gathered


@torch.no_grad()
def _in_buckets(tensors: Sequence[Tensor], collective: Callable[[Tensor], Any], doing: str) -> None:
    """A collective on tensors of any floating type, in place, 64 MiB of float64 at a time."""
    buckets: list[list[Tensor]] = [[]]
    for tensor in tensors:
        if sum(t.numel() for t in buckets[-1]) + tensor.numel() > _BUCKET and buckets[-1]:
            buckets.append([])
        buckets[-1].append(tensor)
    for bucket in filter(None, buckets):
        buffer = torch.cat([tensor.reshape(-1).double() for tensor in bucket])
        with noticing_the_end_of_others(doing):
            collective(buffer)
        parts = buffer.split([tensor.numel() for tensor in bucket])
        for tensor, part in zip(bucket, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


@contextmanager
def noticing_the_end_of_others(doing: str) -> Iterator[None]:
    """Around collectives: what a backend raises when another process is gone becomes a DistributedError."""
    try:
        yield
    except RuntimeError as error:
        unreachable = isinstance(error, (dist.DistNetworkError, dist.DistStoreError))
        if not unreachable and not _PEER_IS_GONE.search(str(error)):
            raise
        raise DistributedError(f"another process ended {doing}: {_REMEDY}") from error
