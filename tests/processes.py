"""Functions that run in several processes joined by ``torch.distributed``."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import torch

# One import serves all processes.
multiprocessing.get_context("forkserver").set_forkserver_preload(
    ["torch", "condiquant_nncf", "networks"]
)


def run(work: Callable[[int, Path], None], folder: Path, count: int) -> list[int]:
    """``work(rank, folder)`` in ``count`` processes with gloo; exit codes."""
    context = torch.multiprocessing.start_processes(
        _joined, (work, folder, count), nprocs=count, join=False, start_method="forkserver"
    )
    for process in context.processes:
        process.join(240)
        process.kill()
        process.join()
    return [process.exitcode for process in context.processes]


def _joined(rank: int, work: Callable[[int, Path], None], folder: Path, count: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=count
    )
    work(rank, folder)
